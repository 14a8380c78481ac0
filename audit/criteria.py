"""What a gate can ask of a run: one number each, and where in the run folder it stands.

A table, so that a new criterion is one line here and one option of `audit gate`. A number that was
not measured is an error that says how to get it, since a gate must never pass for want of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from audit.errors import RunError
from audit.runs import RepairFolder, Run
from audit.statistics import wilson

__all__ = ["CRITERIA", "OF_A_REPAIR", "Criterion", "Kind", "Measured", "Sense", "Subject"]

Kind = Literal["share", "nats", "count"]
Sense = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One number of a run; `low` and `high` end its 95 % interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a gate reads its numbers from."""

    run: Run
    repair: RepairFolder | None
    split: str
    confident: bool


@dataclass(frozen=True)
class Criterion:
    """One line of the table: as it is typed, in words, how it is written, which way it limits."""

    option: str
    title: str
    kind: Kind
    sense: Sense
    measure: Callable[[Subject], Measured]


def _accuracy(subject: Subject) -> Measured:
    metrics = _metrics(subject)
    return _measured(subject, metrics.get("accuracy"), "accuracy", metrics.get("n"))


def _cross_entropy(subject: Subject) -> Measured:
    metrics = _metrics(subject)
    return _measured(subject, metrics.get("cross_entropy"), "cross entropy", metrics.get("n"))


def _worst_class(subject: Subject) -> Measured:
    """Return the class that does worst: by its estimate, or by what its images can vouch for.

    A class of five images that are all right is not the worst one, and yet the one that is least
    sure to do well: a confident gate has to hold for every class.
    """
    metrics = _metrics(subject)
    found = metrics.get("worst_class")
    if subject.confident:
        known = [row for row in metrics.get("per_class") or [] if row.get("low") is not None]
        found = min(known, key=lambda row: row["low"], default=None)
    note = str((found or {}).get("name", ""))
    return _measured(subject, found, "accuracy per class", (found or {}).get("n"), note)


def _case(number: int) -> Callable[[Subject], Measured]:
    def measure(subject: Subject) -> Measured:
        images = subject.run.images
        chosen = images if subject.split == "all" else images[images["split"] == subject.split]
        cases = chosen["case"].dropna()
        if cases.empty:
            raise RunError(_without_cases(subject))
        share = wilson(int((cases == number).sum()), len(cases))
        without = len(chosen) - len(cases)
        source = (subject.run.info.get("cases") or {}).get("source")
        notes = [f"maps judged by {source}"] if source else []
        notes += [f"{without:,} further images have no case"] if without else []
        return Measured(
            value=share.value, low=share.low, high=share.high, n=len(cases), note="; ".join(notes)
        )

    return measure


def _flagged(subject: Subject) -> Measured:
    verdict = subject.run.verdict
    layers = verdict.get("layers") or []
    if verdict.get("verdict") not in ("none", "localized", "spread"):
        raise RunError(f"verdict.json of {subject.run.name} holds no verdict; scan again")
    number = 0 if verdict["verdict"] == "none" else max(1, len(layers))
    named = ", ".join(map(str, layers[:3])) + (", ..." if len(layers) > 3 else "")
    return Measured(value=number, note=f"{verdict['verdict']}: {named}".removesuffix(": "))


def _groups(subject: Subject) -> Measured:
    groups = _error_groups(subject.run)
    return Measured(value=len(groups), note=_largest(groups))


def _group_share(subject: Subject) -> Measured:
    groups = _error_groups(subject.run)
    if any(group.get("share_of_errors") is None for group in groups):
        raise RunError(f"groups.json of {subject.run.name} lacks a share_of_errors; scan again")
    shares = [float(group["share_of_errors"]) for group in groups]
    return Measured(value=max(shares, default=0.0), note=_largest(groups))


CRITERIA = {
    "min_accuracy": Criterion("--min-accuracy", "accuracy", "share", "min", _accuracy),
    "min_worst_class": Criterion("--min-worst-class", "worst class", "share", "min", _worst_class),
    "max_cross_entropy": Criterion(
        "--max-cross-entropy", "cross entropy", "nats", "max", _cross_entropy
    ),
    "min_case1": Criterion("--min-case1", "right, accurate map", "share", "min", _case(1)),
    "max_case2": Criterion("--max-case2", "wrong, accurate map", "share", "max", _case(2)),
    "max_case3": Criterion("--max-case3", "right, inaccurate map", "share", "max", _case(3)),
    "max_case4": Criterion("--max-case4", "wrong, inaccurate map", "share", "max", _case(4)),
    "max_flagged": Criterion("--no-flag", "flagged layers", "count", "max", _flagged),
    "max_groups": Criterion("--max-groups", "error groups", "count", "max", _groups),
    "max_group_share": Criterion(
        "--max-group-share", "errors in one group", "share", "max", _group_share
    ),
}
OF_A_REPAIR = ("min_accuracy", "min_worst_class", "max_cross_entropy")


# --- reading --------------------------------------------------------------------------------------


def _metrics(subject: Subject) -> Mapping[str, Any]:
    if subject.repair:
        return subject.repair.info.get("after") or {}
    metrics = subject.run.info.get("metrics") or {}
    if subject.split not in metrics:
        there = ", ".join(metrics) or "none"
        raise RunError(
            f"{subject.run.name} has no images in the split '{subject.split}'; splits: {there}"
        )
    found: Mapping[str, Any] = metrics[subject.split]
    return found


def _measured(
    subject: Subject, interval: Mapping[str, Any] | None, what: str, n: Any, note: str = ""
) -> Measured:
    if interval is None or interval.get("value") is None:
        raise RunError(f"{subject.run.name} holds no {what} of its images; scan again")
    low, high = interval.get("low"), interval.get("high")
    return Measured(value=interval["value"], low=low, high=high, n=n, note=note)


def _without_cases(subject: Subject) -> str:
    said = (subject.run.info.get("cases") or {}).get("note")
    why = said or "The accuracy of the maps was not measured; scan again with --masks DIR."
    where = "" if subject.split == "all" else f" in the split '{subject.split}'"
    return f"no image of {subject.run.name}{where} has a case: {why}"


def _error_groups(run: Run) -> list[Mapping[str, Any]]:
    if not (run.path / "groups.json").is_file():  # which a run from before reads as no groups
        raise RunError(f"{run.name} has no groups.json, so no error groups were sought; scan again")
    groups: list[Mapping[str, Any]] = run.groups["groups"]
    return groups


def _largest(groups: list[Mapping[str, Any]]) -> str:
    largest = max(groups, key=lambda group: group.get("share_of_errors") or 0, default={})
    return str(largest.get("sentence", ""))
