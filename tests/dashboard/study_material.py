"""A repair with cases, and raters who vote by rule, for the tests of the study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from audit.runs import RepairFolder, Run
from dashboard.study.design import Item, Question, StudyDesign, answer_meaning, questions
from dashboard.study.store import Rater, Vote
from tests.run_builder import build_run

Chooser = Callable[[Rater, Question], str]


def build_repaired_run(root: Path, **settings: Any) -> tuple[Run, RepairFolder]:
    """Return a run with one accepted repair whose images have cases, as measured by a proxy."""
    run = build_run(root, repairs=("accepted",), **settings)
    repair = run.repairs[0]
    images = repair.images
    rows = {name: images[name].tolist() for name in images.columns}
    for side in ("before", "after"):
        rows[f"case_{side}"] = [
            (3 if place % 3 == 0 else 1) + (0 if right else 1)
            for place, right in enumerate(images[f"right_{side}"])
        ]
    repair.write_images(rows)
    repair.write_info(cases={"source": "proxy", "insertion": {"kept": True}, "images": 1})
    return run, run.repairs[0]


def design(
    items: int = 8, checks: int = 3, *, per_rater: int | None = None, seed: int = 0
) -> StudyDesign:
    """Return a design of invented items: every third one wrong before, every fourth after."""
    invented = [
        Item(
            number=number,
            image=number,
            path=f"class/{number:03d}.png",
            label_name=f"class {number % 3}",
            predicted_before="a",
            predicted_after="b",
            right_before=number % 3 != 0,
            right_after=number % 4 != 0,
            case_before=(None, 1, 2, 3, 4)[number % 5],
            check=None if number < items else ("blank", "scrambled")[number % 2],
        )
        for number in range(items + checks)
    ]
    return StudyDesign(
        seed=seed,
        tasks=("trust", "prefer", "accurate"),
        items=tuple(invented),
        per_rater=per_rater or items,
    )


def votes_of(raters: Sequence[Rater], choose: Chooser, plan: StudyDesign) -> list[Vote]:
    """Return what raters vote who answer everything, as a store gives it back."""
    return [
        Vote(
            rater=rater.number,
            item=question.item.number,
            task=question.task,
            answer=answer_meaning(question, choose(rater, question)),
            left=question.left,
            shown=question.shown,
            seconds=1.5,
            created_utc=f"2026-01-01T00:{rater.number:02d}:{place:02d}Z",
        )
        for rater in raters
        for place, question in enumerate(questions(plan, rater.number))
    ]


def side_of(question: Question, wanted: str) -> str:
    """Return `left` or `right`, wherever the wanted map is."""
    return "left" if question.left == wanted else "right"
