"""What a repair did beyond accuracy, in words: cases before and after, calibration, where maps lie.

Read from `repair.json`; a repair that was written before these were measured has nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CASE_COLUMNS", "CASE_NAMES", "after_sentences", "case_moves"]

Document = Mapping[str, Any]

CASE_NAMES = (
    "1 right, map accurate",
    "2 wrong, map accurate",
    "3 right, map inaccurate",
    "4 wrong, map inaccurate",
)
SOURCES = {
    "masks": "by masks",
    "votes": "by votes",
    "proxy": "by the proxy, which is a weak one",
}
CASE_COLUMNS = tuple(f"After: {name}" for name in CASE_NAMES)


def case_moves(repair: Document) -> list[dict[str, str]]:
    """Return the images by case before (one row each) and after (`CASE_COLUMNS`), as text."""
    cases = repair.get("cases") or {}
    table = cases.get("table")
    if not table or not cases.get("images"):
        return []
    return [
        {"Before": name, **dict(zip(CASE_COLUMNS, map(str, row), strict=True))}
        for name, row in zip(CASE_NAMES, table, strict=True)
    ]


def after_sentences(repair: Document) -> list[str]:
    """Return what changed beside accuracy, one sentence for each measure."""
    sentences = []
    cases = repair.get("cases") or {}
    if cases.get("accurate"):
        accurate, p_value = cases["accurate"], cases["accurate"]["mcnemar"]["p_value"]
        source = SOURCES.get(cases["source"], SOURCES["proxy"])
        sentences.append(
            f"Accurate maps, {source}: {_change(accurate, 100, 1, ' %')} of {cases['images']} "
            f"images (McNemar {_p_text(p_value)})."
        )
    if cases.get("note"):
        sentences.append(str(cases["note"]))
    if cases.get("insertion"):
        sentences.append(
            "Insertion, which was not trained on (probability of the true class with the map's "
            f"region alone): {_change(cases['insertion'], 1, 3)}."
        )
    if cases.get("pointing"):
        sentences.append(f"Peak on the object: {_change(cases['pointing'], 100, 1, ' %')}.")
    calibration = repair.get("calibration") or {}
    if calibration.get("before") and calibration.get("after"):
        parts = [f"{name} {_interval(value)}" for name, value in _calibrations(calibration)]
        sentences.append(f"Calibration error (ECE): {', '.join(parts)}.")
    return sentences


def _calibrations(calibration: Document) -> list[tuple[str, Document]]:
    names = {"before": "before", "after": "after", "control": "plain cross entropy"}
    return [(words, calibration[name]) for name, words in names.items() if calibration.get(name)]


def _change(pair: Document, scale: float, digits: int, unit: str = "") -> str:
    before, after = (scale * pair[when]["value"] for when in ("before", "after"))
    value, low, high = (scale * pair["difference"][key] for key in ("value", "low", "high"))
    return (
        f"{before:.{digits}f}{unit} before, {after:.{digits}f}{unit} after, difference "
        f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    )


def _interval(interval: Document) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
