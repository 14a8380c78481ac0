"""Validation cross entropy over the epochs of a repair and of its controls, as lines to draw.

Every training is a line, the epoch whose weights were kept a dot. `ROLES` says once what the
trainings of `history.parquet` are called and how they are colored, here and in the dashboard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audit.wording import number

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ROLES", "Curve", "Curves", "training_curves", "training_role"]

ROLES = {  # of a training's history: what the legend calls it, and its color
    "repair": ("repair", "#2b7fc3"),
    "ce": ("control: plain cross entropy", "#8a7fb8"),
    "shuffled": ("control: shuffled maps", "#d9652b"),
    "originals": ("control: images as they are", "#52b0c7"),
    "labels": ("control: labels alone", "#c48a9f"),
    "logits": ("control: logits as they are", "#9c5a3c"),
    "next-layer": ("control: next best layer", "#3f9b6d"),
    "random-layer": ("control: random layer", "#b8992e"),
    "last-layer": ("control: last linear layer", "#6d7680"),
    "full": ("control: all layers", "#a3567a"),
    "auto-rgn": ("control: all layers, by gradient norm", "#5a5a2e"),
}
UNKNOWN_COLOR = "#a9b0b7"

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 26


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training: `line` is an SVG path, `kept` where its best epoch stands."""

    title: str
    color: str
    line: str
    kept: tuple[float, float] | None
    said: str


@dataclass(frozen=True, kw_only=True)
class Curves:
    """All trainings on one pair of axes, in pixels of a drawing of `width` by `height`."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    curves: tuple[Curve, ...]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]


def training_role(role: str) -> tuple[str, str]:
    """Return what a training of the history is called, and its color."""
    return ROLES.get(role, (f"control: {role}", UNKNOWN_COLOR))


def training_curves(history: pd.DataFrame) -> Curves | None:
    """Return the curves of a repair's history, None where no epoch was judged.

    Args:
        history: `history.parquet`: `role`, `epoch`, `val_ce`, `best`.
    """
    known = history[history["val_ce"].notna()]
    if known.empty:
        return None
    lowest, highest = float(known["val_ce"].min()), float(known["val_ce"].max())
    first, last = int(known["epoch"].min()), int(known["epoch"].max())
    spread = (highest - lowest) or 1.0

    def x(epoch: float) -> float:
        inside = WIDTH - LEFT - RIGHT
        return round(LEFT + inside * (epoch - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (highest - value) / spread, 1)

    curves = []
    for role in dict.fromkeys(known["role"]):
        rows = known[known["role"] == role].sort_values("epoch")
        places = [(x(e), y(v)) for e, v in zip(rows["epoch"], rows["val_ce"], strict=True)]
        best = rows[rows["best"].fillna(False).astype(bool)]
        title, color = training_role(str(role))
        kept, said = None, title
        if len(best):
            epoch, value = int(best["epoch"].iloc[-1]), float(best["val_ce"].iloc[-1])
            kept = (x(epoch), y(value))
            said = f"{title}: lowest {number(value)} after epoch {epoch}"
        line = "M" + " L".join(f"{across} {down}" for across, down in places)
        curves.append(Curve(title=title, color=color, line=line, kept=kept, said=said))
    step = max(1, math.ceil((last - first) / 8))
    return Curves(
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
        curves=tuple(curves),
        rows=tuple((y(v), number(v, 2)) for v in (lowest, (lowest + highest) / 2, highest)),
        columns=tuple((x(e), str(e)) for e in range(first, last + 1, step)),
    )
