"""A plot over depth as plain numbers: where each layer's mark, interval and label stand.

Across, places are in percent of the plot, so that it fills whatever is there without a script;
down, they are in pixels. One large panel shows an estimate with its interval for each layer, small
ones beneath it further scores of the same layers. The template draws lines, dots and text from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from audit.rendering import round_shares
from audit.wording import percent

__all__ = ["DepthPlot", "DepthRow", "Mark", "Panel", "Score", "Scores", "Tone", "depth_plot"]

Tone = str  # a class of the stylesheet: flagged, other, short, untried

TOP, HEIGHT = 14, 210  # of the large panel
PANEL_HEADING, PANEL_HEIGHT, PANEL_GAP = 18, 40, 12
LONGEST_LABEL = 26  # characters
CHARACTER = 6.3  # pixels, of the labels' font
LABEL_PITCH = 13  # pixels that one label set upright takes
# How far apart layers stand at least, in pixels, up to so many of them: 200 still fit a desktop's
# window, and up to 55 each has its label.
PITCHES = ((55, 15), (100, 8), (math.inf, 4))


@dataclass(frozen=True, kw_only=True)
class DepthRow:
    """One layer: its names, the estimate (NaN where there is none) and how it is colored."""

    label: str
    said: str
    value: float
    low: float
    high: float
    tone: Tone


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score of every layer, in the order of the rows; NaN where there is none.

    Attributes:
        reference: The value that says nothing, from which the others are seen.
        largest: The largest score as text.
    """

    heading: str
    values: Sequence[float]
    lows: Sequence[float] | None = None
    highs: Sequence[float] | None = None
    reference: float = 0.0
    largest: str = ""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One layer in the large panel; `y` is None where there is no estimate."""

    x: float
    y: float | None
    low: float | None
    high: float | None
    cut: bool
    tone: Tone
    said: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Score:
    x: float
    y: float
    low: float | None
    high: float | None
    tone: Tone


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A small panel of one score, `reference` being where its bars begin."""

    heading: str
    largest: str
    top: float
    bottom: float
    reference: float
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class DepthPlot:
    """The whole plot. `step` is the width of one layer in percent, `cut` whether a mark is cut,
    `radius` that of a mark in pixels."""

    marks: tuple[Mark, ...]
    cut: bool
    panels: tuple[Panel, ...]
    ticks: tuple[tuple[float, str], ...]
    zero: float
    limit: float | None
    top: float
    bottom: float
    labels_at: float
    height: float
    step: float
    least_width: int
    largest_width: int
    radius: float


def depth_plot(
    rows: Sequence[DepthRow], scores: Sequence[Scores] = (), *, limit: float | None = None
) -> DepthPlot:
    """Return where everything stands, rows from left to right.

    Args:
        rows: The layers in the order of computation, at least one.
        scores: What the small panels show.
        limit: A value of the estimate to draw a line at.
    """
    lowest, highest = _range(rows, limit)

    def place(value: float) -> float:
        share = (highest - max(value, lowest)) / (highest - lowest)
        return round(TOP + HEIGHT * share, 1)

    step = 100 / len(rows)
    across = [round(step * (number + 0.5), 3) for number in range(len(rows))]
    pixels = next(pitch for most, pitch in PITCHES if len(rows) <= most)
    labels = _labels(rows, pixels)
    panels, bottom = _panels(scores, rows, across)
    upright = max((CHARACTER * len(label) for label in labels), default=0.0)
    return DepthPlot(
        marks=tuple(
            _mark(row, x, label, place, lowest)
            for row, x, label in zip(rows, across, labels, strict=True)
        ),
        cut=any(row.value < lowest for row in rows),
        panels=panels,
        ticks=tuple((place(tick), percent(tick, 0)) for tick in round_shares(lowest, highest)),
        zero=place(0.0),
        limit=place(limit) if limit is not None else None,
        top=TOP,
        bottom=TOP + HEIGHT,
        labels_at=bottom + 8,
        height=math.ceil(bottom + 16 + upright),
        step=round(step, 3),
        least_width=pixels * len(rows),
        largest_width=90 * len(rows),
        radius=min(4.5, pixels / 2.4),
    )


def _range(rows: Sequence[DepthRow], limit: float | None) -> tuple[float, float]:
    """Return the ends of the axis; far below zero it is cut, or the rest would be flat."""
    ends = [end for row in rows for end in (row.low, row.value, row.high) if math.isfinite(end)]
    highest = max([0.05, *ends, *([] if limit is None else [1.2 * limit])])
    return max(min([0.0, *ends]), -0.6 * highest), highest


def _mark(
    row: DepthRow, x: float, label: str, place: Callable[[float], float], lowest: float
) -> Mark:
    def at(value: float) -> float | None:
        return place(value) if math.isfinite(value) else None

    return Mark(
        x=x,
        y=at(row.value),
        low=at(row.low),
        high=at(row.high),
        cut=row.value < lowest,
        tone=row.tone,
        said=row.said,
        label=label,
    )


def _labels(rows: Sequence[DepthRow], pixels: int) -> list[str]:
    """Return the labels that have room at the least width, flagged layers first; else empty."""
    order = sorted(range(len(rows)), key=lambda place: rows[place].tone != "flagged")
    shown: list[int] = []
    for place in order:
        if all(abs(place - other) * pixels >= LABEL_PITCH for other in shown):
            shown.append(place)
    return [_short(row.label) if place in shown else "" for place, row in enumerate(rows)]


def _short(label: str) -> str:
    if len(label) <= LONGEST_LABEL:
        return label
    kept = (LONGEST_LABEL - 1) // 2
    return f"{label[:kept]}\N{HORIZONTAL ELLIPSIS}{label[-kept:]}"


def _panels(
    scores: Sequence[Scores], rows: Sequence[DepthRow], across: Sequence[float]
) -> tuple[tuple[Panel, ...], float]:
    """Return the small panels and where the last one ends."""
    panels, bottom = [], float(TOP + HEIGHT)
    for score in scores:
        top = bottom + PANEL_GAP + PANEL_HEADING
        bottom = top + PANEL_HEIGHT
        panels.append(_panel(score, rows, across, top, bottom))
    return tuple(panels), bottom


def _panel(
    score: Scores, rows: Sequence[DepthRow], across: Sequence[float], top: float, bottom: float
) -> Panel:
    missing = [float("nan")] * len(rows)
    lows, highs = score.lows or missing, score.highs or missing
    ends = [end for end in (*score.values, *lows, *highs) if math.isfinite(end)]
    low, high = min([score.reference, *ends]), max([score.reference, *ends])
    width = (high - low) or 1.0

    def at(value: float) -> float | None:
        if not math.isfinite(value):
            return None
        return round(bottom - (bottom - top) * (value - low) / width, 1)

    drawn = []
    for x, value, least, most, row in zip(across, score.values, lows, highs, rows, strict=True):
        y = at(value)
        if y is not None:
            # How long its trial was says nothing about the other scores.
            tone = "flagged" if row.tone == "flagged" else "other"
            drawn.append(Score(x=x, y=y, low=at(least), high=at(most), tone=tone))
    return Panel(
        heading=score.heading,
        largest=score.largest,
        top=top,
        bottom=bottom,
        reference=at(score.reference) or bottom,
        scores=tuple(drawn),
    )
