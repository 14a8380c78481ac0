"""The study in words: the questions as raters read them, and the tables as reviewers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audit.statistics import Interval
from audit.wording import count, fixed, number, p_value, percent, points, span
from dashboard.study.design import BACKGROUND, LEVELS, Question
from dashboard.study.results import PREFERENCES, RaterSummary

__all__ = [
    "FEW_RATERS",
    "agreement_rows",
    "background_rows",
    "headline",
    "preference_rows",
    "question_text",
    "rater_rows",
    "trust_rows",
]

FEW_RATERS = 5
COLUMNS = {
    "before": "Before",
    "after": "After",
    "same": "Look the same",
    "cant": "Can't distinguish",
}
CASE_NAMES = {
    None: "All images",
    1: "1: right, accurate map",
    2: "2: wrong, accurate map",
    3: "3: right, inaccurate map",
    4: "4: wrong, inaccurate map",
    0: "Without a case",
}
TASK_NAMES = {
    "trust": "Is the network right?",
    "prefer": "Which map is better?",
    "accurate": "Does the map lie on the object?",
}
BACKGROUND_NAMES = {
    "machine_learning": "Machine learning",
    "explanations": "Explanations of models",
    "subject": "Subject of the images",
}
_NONE = "\N{EN DASH}"


def question_text(question: Question) -> tuple[str, str]:
    """Return what a rater is told first, empty where nothing is, and what they are asked."""
    item = question.item
    if question.task == "trust":
        said = item.predicted_after if question.shown == "after" else item.predicted_before
        return f"A network says that this is: {said}.", "Is the network right?"
    if question.task == "prefer":
        asked = f"Which image best highlights the {item.label_name} in the original image?"
        return "", asked
    return "", f"Does the highlighted part lie on the {item.label_name}?"


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the first row of Table 3 as a sentence."""
    whole = rows[0]
    if not whole["votes"]:
        return "No votes on the maps yet."
    after, before = whole["after"], whole["before"]
    return (
        f"{percent(after['value'], 0)} of the votes prefer the map after the repair "
        f"({span(after)}), {percent(before['value'], 0)} the one before ({span(before)})."
    )


def preference_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return Table 3 as text."""
    return [
        {
            "Case before the repair": CASE_NAMES[row["case"]],
            "Votes": count(row["votes"]),
            **{COLUMNS[answer]: _share(row[answer]) for answer in PREFERENCES},
            "After less before": _difference(row["difference"]),
        }
        for row in rows
    ]


def trust_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "Network": row["side"].capitalize(),
            "Said to be right, where it is": _share(row["right"]),
            "Said to be right, where it is wrong": _share(row["wrong"]),
            "Difference": _difference(row["gap"]),
            "Votes": count(row["right"]["votes"] + row["wrong"]["votes"]),
        }
        for row in rows
    ]


def agreement_rows(found: Mapping[str, Interval]) -> list[dict[str, str]]:
    return [
        {
            "Question": TASK_NAMES[task],
            "Krippendorff's alpha": fixed(alpha.value),
            "95 %": span(alpha.as_dict(), "number"),
        }
        for task, alpha in found.items()
    ]


def background_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "Experience with": BACKGROUND_NAMES[row["question"]],
            "Rank correlation": fixed(row["rho"]),
            "p": p_value(row["p_value"]),
            "p, after Holm": p_value(row["p_adjusted"]),
            "Test": "every order" if row["exact"] else "20,000 orders drawn",
            "Raters": count(row["raters"]),
        }
        for row in rows
    ]


def rater_rows(
    summaries: Sequence[RaterSummary], alone: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Return one row per rater.

    Args:
        alone: `preferences_by_rater`.
    """
    shares = {row["rater"]: row for row in alone}
    rows = []
    for one in summaries:
        own = shares.get(one.number)
        told = one.background or {}
        rows.append(
            {
                "Rater": f"{one.number + 1}{', left out' if one.flagged else ''}",
                "Answered": f"{one.answered} of {one.asked}",
                "Checks failed": f"{one.failed} of {one.checked}" if one.checked else _NONE,
                **{COLUMNS[a]: _share(own[a]) if own else _NONE for a in PREFERENCES},
                "Seconds, median": number(one.seconds, 1) if one.seconds is not None else _NONE,
                **{
                    BACKGROUND_NAMES[name]: LEVELS[told[name]] if name in told else _NONE
                    for name in BACKGROUND
                },
            }
        )
    return rows


def _share(share: Mapping[str, Any]) -> str:
    if share["value"] != share["value"]:  # NaN: nobody was asked
        return _NONE
    return f"{percent(share['value'], 0)} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


def _difference(interval: Mapping[str, Any]) -> str:
    if interval["value"] != interval["value"]:
        return _NONE
    if interval["low"] != interval["low"]:
        return points(interval["value"], 0)
    low, high = 100 * interval["low"], 100 * interval["high"]
    return f"{points(interval['value'], 0)} [{low:+.0f}, {high:+.0f}]"
