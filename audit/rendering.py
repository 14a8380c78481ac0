"""Templates filled in: the parts of the report and of the dashboard, as escaped HTML.

Autoescaping is on for every template and no text is ever marked safe, so a file or class name that
holds markup is shown as the text it is. Backticks in sentences become code, escaped like the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.wording import percent

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["Forest", "ForestRow", "Mark", "forest", "page", "part", "round_shares", "stylesheet"]

TEMPLATES = Path(__file__).parent / "templates"
TONES = {"right": "good", "fixed": "good", "wrong": "bad", "broken": "bad", "unknown": "open"}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An estimate with its interval on a row's track, all in percent of the track's width."""

    at: float
    low: float
    width: float
    tone: str = "good"
    open: bool = False


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """One row of an interval plot."""

    label: str
    detail: str
    value: str
    marks: tuple[Mark, ...]
    flagged: bool = False


@dataclass(frozen=True, kw_only=True)
class Forest:
    """An interval plot of shares: rows, and where zero and the labels of the axis stand."""

    rows: tuple[ForestRow, ...]
    ticks: tuple[tuple[float, str], ...]
    zero: float | None


def part(macro: str, *values: Any, **named: Any) -> str:
    """Return one part of `parts.html`, filled in."""
    return str(getattr(_environment().get_template("parts.html").module, macro)(*values, **named))


def page(template: str, **context: Any) -> str:
    """Return a whole template, filled in."""
    return _environment().get_template(template).render(**context)


def stylesheet() -> str:
    return (TEMPLATES / "parts.css").read_text(encoding="utf-8")


def forest(rows: Iterable[Mapping[str, Any]]) -> Forest:
    """Return an interval plot of shares, scaled to the widest interval and to zero.

    Args:
        rows: `label`, `detail`, `value` (as text), `flagged`, and `marks`: `(interval, tone, open)`
            with the interval's `value`, `low` and `high`; marks without a value are left out.
    """
    rows = [{**row, "marks": [mark for mark in row["marks"] if _finite(mark[0])]} for row in rows]
    ends = [0.0]
    for row in rows:
        for interval, _, _ in row["marks"]:
            ends += [float(end) for end in _ends(interval)]
    low, high = min(ends), max(ends)
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / width, 2)

    drawn = tuple(
        ForestRow(
            label=str(row["label"]),
            detail=str(row.get("detail") or ""),
            value=str(row["value"]),
            flagged=bool(row.get("flagged")),
            marks=tuple(_mark(mark, place) for mark in row["marks"]),
        )
        for row in rows
    )
    ticks = tuple((place(tick), percent(tick, 0)) for tick in round_shares(low, high))
    return Forest(rows=drawn, ticks=ticks, zero=place(0.0) if low < 0 else None)


def round_shares(low: float, high: float) -> list[float]:
    """Return about five round shares between two ends."""
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
    step = next((step for step in steps if (high - low) / step <= 6), high - low)
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _mark(mark: Sequence[Any], place: Any) -> Mark:
    interval, tone, hollow = mark
    low, value, high = (place(float(end)) for end in _ends(interval))
    return Mark(at=value, low=low, width=round(high - low, 2), tone=tone, open=hollow)


def _ends(interval: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return low, value and high; the value stands in for an end that is not known."""
    value = interval["value"]
    low, high = (
        value if end is None or math.isnan(end) else end
        for end in (interval.get("low"), interval.get("high"))
    )
    return low, value, high


def _finite(interval: Mapping[str, Any] | None) -> bool:
    value = (interval or {}).get("value")
    return value is not None and math.isfinite(value)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from audit.gallery import color_scale

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(tones=TONES, color_scale=color_scale())
    environment.filters["code_spans"] = _code_spans
    return environment


def _code_spans(sentence: str) -> Markup:
    """Set what stands between backticks as code; everything is escaped."""
    from markupsafe import Markup

    parts = sentence.split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner is only a backtick
        return Markup.escape(sentence)
    marked = [Markup("<code>{}</code>" if i % 2 else "{}").format(p) for i, p in enumerate(parts)]
    return Markup("").join(marked)
