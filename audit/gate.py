"""Is a run good enough to ship? Thresholds for a pipeline, each held against the run folder.

A criterion is a lower or an upper limit on one number that a scan, or a repair of it, has written
down. By default the estimate itself is compared, as a reader of the report would; `confident`
compares the end of its 95 % interval that lies nearer to failing, so that a pass on a handful of
images is no accident. A limit that is met exactly is met. What was not measured is an error with
its remedy and never a pass.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from audit.criteria import CRITERIA, OF_A_REPAIR, Criterion, Kind, Measured, Sense, Subject
from audit.errors import RunError, UsageError
from audit.record_shapes import reading
from audit.runs import RepairFolder, Run

__all__ = ["SPLITS", "GateConfig", "GateResult", "Limits", "Outcome", "gate"]

SPLITS = ("all", "train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run has to meet; None where nothing is asked. Shares are in [0, 1].

    Attributes:
        min_accuracy: Share of images that are right.
        min_worst_class: Share of right images of the class that does worst.
        max_cross_entropy: Mean over the images, in nats.
        min_case1: Share of right images with an accurate map, among images that have a case.
        max_case2: Wrong with an accurate map. `max_case3`: right, `max_case4`: wrong, with an
            inaccurate one.
        max_flagged: Layers that the verdict names; 0 demands the verdict `none`.
        max_groups: Error groups that beat chance.
        max_group_share: Share of the errors in the largest of them.
    """

    min_accuracy: float | None = None
    min_worst_class: float | None = None
    max_cross_entropy: float | None = None
    min_case1: float | None = None
    max_case2: float | None = None
    max_case3: float | None = None
    max_case4: float | None = None
    max_flagged: int | None = None
    max_groups: int | None = None
    max_group_share: float | None = None

    def __post_init__(self) -> None:
        if not self.asked:
            options = ", ".join(one.option for one in CRITERIA.values())
            raise UsageError(
                f"a gate without a criterion would let everything pass; give {options}"
            )
        for name, limit in self.asked.items():
            criterion = CRITERIA[name]
            highest = 1.0 if criterion.kind == "share" else math.inf
            if not 0 <= limit <= highest:  # false for NaN as well
                expected = "a share from 0 to 1" if highest == 1 else "zero or more"
                raise UsageError(f"{criterion.option} is {limit:g}; expected {expected}")

    @property
    def asked(self) -> dict[str, float]:
        """The limits that were given, in the order of the fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Which numbers are held against the limits.

    Attributes:
        limits: What has to be met.
        split: Images whose numbers count: `all`, `train`, `val` or `test`. None is all images of
            the scan, and the held-out test split of a repair, which knows no other.
        confident: Compare the end of the 95 % interval that lies nearer to failing.
        repair: Judge the newest accepted repair of the run in place of the scanned network.
    """

    limits: Limits
    split: str | None = None
    confident: bool = False
    repair: bool = False

    def __post_init__(self) -> None:
        if self.split not in (None, *SPLITS):
            raise UsageError(f"--split is {self.split!r}; expected one of {', '.join(SPLITS)}")
        if not self.repair:
            return
        if self.split not in (None, "test"):
            raise UsageError(
                f"--split {self.split} with --repair: a repair is judged on the test split only"
            )
        scanned = [CRITERIA[name] for name in self.limits.asked if name not in OF_A_REPAIR]
        if scanned:
            raise UsageError(
                f"{scanned[0].option} with --repair: a repair does not measure that; scan the "
                "repaired weights (repairs/.../weights.safetensors) and gate that run"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One criterion beside what was measured.

    Attributes:
        option: As it is typed.
        title: What is limited, in words.
        kind: How its numbers are written.
        sense: Whether the limit is the least or the most that is allowed.
        required: The limit.
        judged: The number that was compared: the estimate, or an end of its interval.
    """

    option: str
    title: str
    kind: Kind
    sense: Sense
    required: float
    measured: Measured
    judged: float

    @property
    def passed(self) -> bool:
        if self.sense == "min":
            return self.judged >= self.required
        return self.judged <= self.required


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Every criterion of a gate with its outcome, and what was judged."""

    run: str
    repair: str | None
    split: str
    confident: bool
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if not outcome.passed)

    def as_dict(self) -> dict[str, Any]:
        """Return one JSON document: what was judged, `passed`, and every criterion."""
        criteria = [{**asdict(one), "passed": one.passed} for one in self.outcomes]
        head = {"run": self.run, "repair": self.repair, "split": self.split}
        passed = not self.failed
        return {**head, "confident": self.confident, "passed": passed, "criteria": criteria}


def gate(run: Run, config: GateConfig) -> GateResult:
    """Return how a finished run, or its newest accepted repair, stands against the limits.

    Raises:
        RunError: The scan is not finished, no repair was accepted, or a number was not measured;
            the message says how to get it.
    """
    if run.status != "complete":
        raise RunError(f"{run.name} is {run.status}; a gate needs a finished scan")
    repair = _accepted_repair(run) if config.repair else None
    split = config.split or ("test" if repair else "all")
    subject = Subject(run=run, repair=repair, split=split, confident=config.confident)
    with reading(run.path):
        outcomes = tuple(
            _outcome(CRITERIA[name], limit, subject) for name, limit in config.limits.asked.items()
        )
    return GateResult(
        run=str(run.path),
        repair=repair.name if repair else None,
        split=split,
        confident=config.confident,
        outcomes=outcomes,
    )


def _outcome(criterion: Criterion, limit: float, subject: Subject) -> Outcome:
    measured = criterion.measure(subject)
    _check_possible(criterion, measured, subject)
    nearer = measured.low if criterion.sense == "min" else measured.high
    bounded = subject.confident and nearer is not None
    return Outcome(
        option=criterion.option,
        title=criterion.title,
        kind=criterion.kind,
        sense=criterion.sense,
        required=limit,
        measured=measured,
        judged=nearer if bounded and nearer is not None else measured.value,
    )


def _check_possible(criterion: Criterion, measured: Measured, subject: Subject) -> None:
    """Raise RunError where a number cannot be one: a gate has no opinion on a damaged run."""
    for number in (measured.value, measured.low, measured.high):
        if number is None:
            continue
        highest = 1.0 if criterion.kind == "share" else math.inf
        if not isinstance(number, int | float) or not 0 <= number <= highest:
            raise RunError(
                f"{criterion.title} of {subject.run.name} is {number!r}, which it cannot be; the "
                "run is damaged: scan again"
            )


def _accepted_repair(run: Run) -> RepairFolder:
    repairs = run.repairs
    accepted = next((one for one in repairs if one.decision == "accepted"), None)
    if accepted is None:
        decided = [one.decision for one in repairs if one.decision]
        last = f" (the newest was {decided[0]})" if decided else ""
        raise RunError(
            f"no accepted repair in {run.name}{last}; make one with "
            f"`repair layer --run {run.path.as_posix()}`"
        )
    return accepted
