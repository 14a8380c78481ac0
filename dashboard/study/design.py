"""Who is asked what: tasks, items, attention checks, orders and sides, all from one seed.

Raters come in pairs. Both raters of a pair get the same items, and where one has the map after the
repair on the left the other has it on the right; so over every full pair each item was shown
equally often both ways. Pairs take the items in turn, so each item is shown equally often, give or
take one. Everything follows from hashes of seed, task, pair and item: a rater who comes back on
another day, to another server or after an upgrade of NumPy finds the same questions.

Tasks come one after the other: `trust` first, for it must not be told the true class, which the
other two name.

Source of the question and its four answers: Halliwell and Lecue 2020, section 4.2.1. Differs from
source: attention checks, and the tasks `trust` and `accurate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = [
    "ANSWERS",
    "BACKGROUND",
    "LEVELS",
    "TASKS",
    "Check",
    "Item",
    "Question",
    "Side",
    "StudyDesign",
    "Task",
    "answer_meaning",
    "failed_checks_allowed",
    "questions",
]

Task = Literal["trust", "prefer", "accurate"]
Side = Literal["before", "after"]
Check = Literal["blank", "scrambled"]
TASKS: tuple[Task, ...] = get_args(Task)
CHECKS: tuple[Check, ...] = get_args(Check)

ANSWERS: dict[Task, dict[str, str]] = {
    "trust": {"yes": "Yes, it is right", "no": "No, it is wrong", "cant": "Can't tell"},
    "prefer": {
        "left": "The left image",
        "right": "The right image",
        "same": "They look the same",
        "cant": "Can't distinguish",
    },
    "accurate": {"yes": "Yes", "no": "No", "cant": "Can't tell"},
}
BACKGROUND = {
    "machine_learning": "How much experience do you have with machine learning?",
    "explanations": "How much experience do you have with explanations of models, such as maps of "
    "where a network looks?",
    "subject": "How well do you know what these images show?",
}
LEVELS = ("None", "A little", "Some", "A lot")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a study with what the network said about it; or an attention check.

    `path` and the truth are for the results, and are never shown to a rater.

    Attributes:
        number: Its place in the study.
        image: Its place in the gallery of the repair.
        case_before: Case of the map before the repair by the scan's own rule, None where it has
            none; `case_after` likewise.
        check: What the decoy beside the real map is; None in an item that counts.
    """

    number: int
    image: int
    path: str
    label_name: str
    predicted_before: str
    predicted_after: str
    right_before: bool
    right_after: bool
    case_before: int | None = None
    case_after: int | None = None
    check: Check | None = None


@dataclass(frozen=True, kw_only=True)
class StudyDesign:
    """What a study asks of whom.

    Attributes:
        seed: Of every order and side.
        tasks: In the order of `TASKS`.
        items: Those that count, then the attention checks.
        per_rater: How many items one rater sees in each task, checks not counted.
    """

    seed: int
    tasks: tuple[Task, ...]
    items: tuple[Item, ...]
    per_rater: int

    def __post_init__(self) -> None:
        if "prefer" not in self.tasks or any(task not in TASKS for task in self.tasks):
            raise ValueError(f"tasks {self.tasks}: expected `prefer` and others of {TASKS}")
        if [item.number for item in self.items] != list(range(len(self.items))):
            raise ValueError("items have to be numbered from 0 on, in order")
        if not 1 <= self.per_rater <= len(self.judged):
            raise ValueError(f"{self.per_rater} items a rater: expected 1 to {len(self.judged)}")

    @property
    def judged(self) -> tuple[Item, ...]:
        """The items that count."""
        return tuple(item for item in self.items if item.check is None)

    @property
    def checks(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.check is not None)

    @property
    def votes_per_rater(self) -> int:
        return len(self.tasks) * self.per_rater + len(self.checks)

    def as_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> StudyDesign:
        """Return the design that `as_dict` gave; raises KeyError, TypeError or ValueError."""
        return cls(
            seed=record["seed"],
            tasks=tuple(record["tasks"]),
            items=tuple(Item(**item) for item in record["items"]),
            per_rater=record["per_rater"],
        )


@dataclass(frozen=True, kw_only=True)
class Question:
    """One screen: an item in a task, and which map is where.

    Attributes:
        left: In `prefer`, which map is on the left; of a check, `after` stands for the real one.
        shown: In the other tasks, the one map that is shown.
    """

    task: Task
    item: Item
    left: Side | None = None
    shown: Side | None = None


def questions(design: StudyDesign, rater: int) -> tuple[Question, ...]:
    """Return what one rater is asked, in order.

    Args:
        rater: The rater's number in the study, from 0 on.
    """
    pair, second = divmod(rater, 2)
    chosen = _turn(design, pair)
    asked: list[Question] = []
    for task in (task for task in TASKS if task in design.tasks):
        placed = _halved(chosen, f"{design.seed}/{task}/side/{pair}", flip=bool(second))
        order = _shuffled(chosen, f"{design.seed}/{task}/order/{rater}")
        if task == "prefer":
            placed |= _halved(design.checks, f"{design.seed}/checks/{pair}", flip=bool(second))
            order = _with_checks(order, design.checks, f"{design.seed}/places/{rater}")
            asked += [Question(task=task, item=item, left=placed[item.number]) for item in order]
        else:
            asked += [Question(task=task, item=item, shown=placed[item.number]) for item in order]
    return tuple(asked)


def answer_meaning(question: Question, answer: str) -> str:
    """Return what an answer says once the sides are undone.

    `left` and `right` become `before` or `after`, and in a check `real` or `decoy`; every other
    answer stays.

    Raises:
        ValueError: The task does not offer the answer.
    """
    if answer not in ANSWERS[question.task]:
        raise ValueError(
            f"answer {answer!r}: {question.task} has {', '.join(ANSWERS[question.task])}"
        )
    if answer not in ("left", "right"):
        return answer
    after = (answer == "left") == (question.left == "after")
    if question.item.check is not None:
        return "real" if after else "decoy"
    return "after" if after else "before"


def failed_checks_allowed(answered: int) -> int:
    """Return how many of a rater's attention checks may fail: a third, rounded down."""
    return answered // 3


def _turn(design: StudyDesign, pair: int) -> tuple[Item, ...]:
    """Return the items of one pair of raters: the next ones of an endless round."""
    round_ = _shuffled(design.judged, f"{design.seed}/items")
    start = pair * design.per_rater
    return tuple(round_[(start + step) % len(round_)] for step in range(design.per_rater))


def _halved(items: Sequence[Item], key: str, *, flip: bool) -> dict[int, Side]:
    """Return `after` for a random half of the items and `before` for the other."""
    order = _shuffled(items, key)
    # Of an odd number, which half is the larger one is random as well.
    cut = (len(order) + _draw(f"{key}/odd") % 2) // 2
    first: set[int] = {item.number for item in order[:cut]}
    return {i.number: "after" if (i.number in first) != flip else "before" for i in items}


def _with_checks(order: list[Item], checks: Sequence[Item], key: str) -> list[Item]:
    """Return the order with the checks spread over it: one in each of as many equal parts."""
    mixed = list(order)
    for place, check in reversed(list(enumerate(_shuffled(checks, key)))):
        low = place * len(order) // len(checks)
        width = max(1, (place + 1) * len(order) // len(checks) - low)
        mixed.insert(low + 1 + _draw(f"{key}/{place}") % width, check)
    return mixed


def _shuffled(items: Sequence[Item], key: str) -> list[Item]:
    return sorted(items, key=lambda item: _draw(f"{key}/{item.number}"))


def _draw(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
