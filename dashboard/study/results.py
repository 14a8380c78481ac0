"""A study's votes in tables: who prefers which map in which case, whom raters trust, who was awake.

Table 3 of Halliwell and Lecue 2020: the share of votes for the map before the repair, for the one
after it, for "They look the same" and for "Can't distinguish", by the case of the map before.
Functions that pool take the raters to leave out: those of `flagged`, unless they are asked for.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audit.cases import CASES, assign_cases, by_votes
from audit.chance import holm
from audit.statistics import Interval, wilson
from dashboard.study.agreement import (
    BackgroundEffect,
    difference_over_raters,
    krippendorff_alpha,
    rank_association,
    share_over_raters,
)
from dashboard.study.design import BACKGROUND, LEVELS, StudyDesign, failed_checks_allowed
from dashboard.study.material import accuracy_votes
from dashboard.study.store import Rater, Vote

__all__ = [
    "PREFERENCES",
    "RaterSummary",
    "agreement",
    "background_effects",
    "cases_of",
    "flagged",
    "preferences",
    "preferences_by_rater",
    "side_balance",
    "summaries",
    "trust",
    "votes_csv",
]

PREFERENCES = ("before", "after", "same", "cant")
Cases = Mapping[int, int | None]


@dataclass(frozen=True, kw_only=True)
class RaterSummary:
    """How far one rater came, and whether they paid attention.

    Attributes:
        failed: Attention checks that they failed, of `checked`.
        flagged: More of them failed than a third.
        seconds: Median time for an answer, None where nothing was timed.
    """

    number: int
    answered: int
    asked: int
    failed: int
    checked: int
    flagged: bool
    seconds: float | None
    background: Mapping[str, int] | None


def summaries(
    design: StudyDesign, raters: Sequence[Rater], votes: Sequence[Vote]
) -> list[RaterSummary]:
    """Return one summary per rater, in their order."""
    given: dict[int, list[Vote]] = {rater.number: [] for rater in raters}
    for vote in votes:
        given.setdefault(vote.rater, []).append(vote)
    found = []
    for rater in raters:
        own = given[rater.number]
        checks = [vote for vote in own if _is_check(design, vote)]
        failed = sum(vote.answer != "real" for vote in checks)
        times = [vote.seconds for vote in own if vote.seconds is not None]
        found.append(
            RaterSummary(
                number=rater.number,
                answered=len(own),
                asked=design.votes_per_rater,
                failed=failed,
                checked=len(checks),
                flagged=failed > failed_checks_allowed(len(checks)),
                seconds=statistics.median(times) if times else None,
                background=rater.background,
            )
        )
    return found


def flagged(design: StudyDesign, votes: Iterable[Vote]) -> set[int]:
    """Return the raters who failed more than a third of their attention checks."""
    checks = [vote for vote in votes if _is_check(design, vote)]
    outcomes: dict[int, list[bool]] = {}
    for vote in checks:
        outcomes.setdefault(vote.rater, []).append(vote.answer == "real")
    return {
        rater
        for rater, passed in outcomes.items()
        if passed.count(False) > failed_checks_allowed(len(passed))
    }


def cases_of(
    design: StudyDesign, votes: Sequence[Vote] = (), without: Iterable[int] = ()
) -> dict[int, int | None]:
    """Return the case before the repair of each item: as measured, or by the votes given.

    Args:
        votes: Those whose answers to `accurate` decide instead of the scan.
        without: Raters who are left out of them.
    """
    items = design.judged
    if not votes:
        return {item.number: item.case_before for item in items}
    table = accuracy_votes(design, votes, "before", without)
    verdict = by_votes([item.path for item in items], table)
    cases = assign_cases([item.right_before for item in items], verdict.accurate)
    return {item.number: case for item, case in zip(items, cases, strict=True)}


def preferences(
    design: StudyDesign, votes: Sequence[Vote], cases: Cases, without: Iterable[int] = ()
) -> list[dict[str, Any]]:
    """Return Table 3: one row over all votes, one per case, and one for images without a case.

    A row has `case` (None over all, 0 without a case), `votes`, `raters`, `items`, of each of
    `PREFERENCES` its `count` and share with its 95 % interval over raters, and `difference`, after
    minus before. Rows of cases that no vote was given on are left out.
    """
    counting = _counting(design, votes, "prefer", without)
    rows = [_preference_row(None, counting, design.seed)]
    for case in (*CASES, 0):
        members = [vote for vote in counting if (cases.get(vote.item) or 0) == case]
        if members:
            rows.append(_preference_row(case, members, design.seed))
    return rows


def preferences_by_rater(design: StudyDesign, votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Return the first row of Table 3 for each rater alone, flagged or not, by `rater`.

    The intervals are Wilson's: there is one rater.
    """
    counting = _counting(design, votes, "prefer", ())
    rows = []
    for rater in sorted({vote.rater for vote in counting}):
        own = [vote for vote in counting if vote.rater == rater]
        rows.append({"rater": rater, **_preference_row(None, own, design.seed)})
    return rows


def trust(
    design: StudyDesign, votes: Sequence[Vote], without: Iterable[int] = ()
) -> list[dict[str, Any]]:
    """Return how often raters took the network for right, where it was and where it was not.

    One row per side, `before` and `after`: `right` and `wrong`, each with `count`, `votes` and the
    share of "Yes" with its interval over raters; and `gap`, right minus wrong. Trust that follows
    correctness has a gap of 1, blind trust or blind doubt one of 0. "Can't tell" is no "Yes".
    """
    counting = _counting(design, votes, "trust", without)
    raters = sorted({vote.rater for vote in counting})
    rows = []
    for side in ("before", "after"):
        shown = [vote for vote in counting if vote.shown == side]
        row: dict[str, Any] = {"side": side}
        hits, totals = {}, {}
        for outcome in ("right", "wrong"):
            members = [v for v in shown if _network_right(design, v) == (outcome == "right")]
            hits[outcome] = _per_rater(raters, [v for v in members if v.answer == "yes"])
            totals[outcome] = _per_rater(raters, members)
            share = share_over_raters(hits[outcome], totals[outcome], seed=design.seed)
            row[outcome] = {
                "count": sum(hits[outcome]),
                "votes": len(members),
                **share.as_dict(),
            }
        gap = difference_over_raters(
            (hits["right"], hits["wrong"]), (totals["right"], totals["wrong"]), seed=design.seed
        )
        rows.append({**row, "gap": gap.as_dict()})
    return rows


def agreement(
    design: StudyDesign, votes: Sequence[Vote], without: Iterable[int] = ()
) -> dict[str, Interval]:
    """Return Krippendorff's alpha of each task that was voted on.

    In `trust` and `accurate` an item before and the same item after are two things to agree on.
    """
    found = {}
    for task in design.tasks:
        units: dict[tuple[int, str | None], dict[int, str]] = {}
        for vote in _counting(design, votes, task, without):
            units.setdefault((vote.item, vote.shown), {})[vote.rater] = vote.answer
        if units:
            found[str(task)] = krippendorff_alpha(list(units.values()), seed=design.seed)
    return found


def background_effects(
    design: StudyDesign,
    raters: Sequence[Rater],
    votes: Sequence[Vote],
    without: Iterable[int] = (),
) -> list[dict[str, Any]]:
    """Return, for each question about the background, whether it goes with the votes.

    The score of a rater is the share of their preferences for the map after, less that for the map
    before. Each row has `question`, `rho`, `p_value`, `p_adjusted` (Holm over the questions),
    `exact` and `raters`.
    """
    counting = _counting(design, votes, "prefer", without)
    scores: dict[int, float] = {}
    for rater in sorted({vote.rater for vote in counting}):
        answers = [vote.answer for vote in counting if vote.rater == rater]
        scores[rater] = (answers.count("after") - answers.count("before")) / len(answers)
    told = [(r.background, scores[r.number]) for r in raters if r.background and r.number in scores]
    effects: list[BackgroundEffect] = [
        rank_association(
            [background[question] for background, _ in told],
            [score for _, score in told],
            seed=design.seed,
        )
        for question in BACKGROUND
    ]
    adjusted = holm([effect.p_value for effect in effects])
    return [
        {"question": question, **effect.as_dict(), "p_adjusted": p_adjusted}
        for question, effect, p_adjusted in zip(BACKGROUND, effects, adjusted, strict=True)
    ]


def side_balance(design: StudyDesign, votes: Sequence[Vote]) -> dict[str, Any]:
    """Return how often the map after stood left, over all and as the largest excess of one item.

    `left` of `votes`, the share with its Wilson interval, and `largest`: of any item, how many more
    votes were given with it on one side than on the other.
    """
    counting = _counting(design, votes, "prefer", ())
    left = Counter(vote.item for vote in counting if vote.left == "after")
    items = Counter(vote.item for vote in counting)
    largest = max((abs(2 * left[item] - votes_on) for item, votes_on in items.items()), default=0)
    share = wilson(left.total(), items.total()).as_dict()
    return {"left": left.total(), "votes": items.total(), **share, "largest": largest}


def votes_csv(design: StudyDesign, raters: Sequence[Rater], votes: Sequence[Vote]) -> str:
    """Return every vote as CSV, one a line, with the item, the rater's background and the checks.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    out = flagged(design, votes)
    backgrounds = {rater.number: rater.background or {} for rater in raters}
    columns = [
        *("rater", "flagged", "task", "item", "check", "image", "label", "predicted_before"),
        *("predicted_after", "right_before", "right_after", "case_before", "case_after"),
        *("left", "shown", "answer", "seconds", "created_utc", *BACKGROUND),
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for vote in votes:
        item, background = design.items[vote.item], backgrounds.get(vote.rater, {})
        row = {
            "rater": vote.rater + 1,
            "flagged": vote.rater in out,
            "task": vote.task,
            "item": item.number,
            "check": item.check,
            "image": item.path,
            "label": item.label_name,
            "predicted_before": item.predicted_before,
            "predicted_after": item.predicted_after,
            "right_before": item.right_before,
            "right_after": item.right_after,
            "case_before": item.case_before,
            "case_after": item.case_after,
            "left": vote.left,
            "shown": vote.shown,
            "answer": vote.answer,
            "seconds": vote.seconds,
            "created_utc": vote.created_utc,
            **{question: LEVELS[level] for question, level in background.items()},
        }
        writer.writerow({name: _harmless(value) for name, value in row.items()})
    return text.getvalue()


# --- pieces ---------------------------------------------------------------------------------------


def _is_check(design: StudyDesign, vote: Vote) -> bool:
    return design.items[vote.item].check is not None


def _counting(
    design: StudyDesign, votes: Iterable[Vote], task: str, without: Iterable[int]
) -> list[Vote]:
    """Return the votes of a task that count: no checks, nobody who is left out."""
    left_out = set(without)
    return [
        vote
        for vote in votes
        if vote.task == task and vote.rater not in left_out and not _is_check(design, vote)
    ]


def _preference_row(case: int | None, votes: Sequence[Vote], seed: int) -> dict[str, Any]:
    raters = sorted({vote.rater for vote in votes})
    totals = _per_rater(raters, votes)
    counts = {a: _per_rater(raters, [v for v in votes if v.answer == a]) for a in PREFERENCES}
    row: dict[str, Any] = {
        "case": case,
        "votes": len(votes),
        "raters": len(raters),
        "items": len({vote.item for vote in votes}),
    }
    for answer, hits in counts.items():
        share = share_over_raters(hits, totals, seed=seed)
        row[answer] = {"count": sum(hits), **share.as_dict()}
    pair = (counts["after"], counts["before"])
    difference = difference_over_raters(pair, (totals, totals), seed=seed)
    return {**row, "difference": difference.as_dict()}


def _per_rater(raters: Sequence[int], votes: Sequence[Vote]) -> list[int]:
    given = Counter(vote.rater for vote in votes)
    return [given[rater] for rater in raters]


def _network_right(design: StudyDesign, vote: Vote) -> bool:
    item = design.items[vote.item]
    return item.right_after if vote.shown == "after" else item.right_before


def _harmless(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value
