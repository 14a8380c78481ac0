"""Charts that answer to the pointer; colors as in the report, safe for every color vision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BAD", "GOOD", "history_chart", "profile_chart"]

GOOD, BAD, THIRD = "#2b7fc3", "#d9652b", "#8a7fb8"

_ROLES = {  # of a training's history: what the legend calls it, and its color
    "repair": ("repair", GOOD),
    "ce": ("control: plain cross entropy", THIRD),
    "shuffled": ("control: shuffled maps", BAD),
    "next-layer": ("control: next best layer", "#3f9b6d"),
    "random-layer": ("control: random layer", "#b8992e"),
    "last-layer": ("control: last linear layer", "#6d7680"),
    "full": ("control: all layers", "#a3567a"),
    "auto-rgn": ("control: all layers, by gradient norm", "#5a5a2e"),
}
_UNKNOWN_COLOR = "#a9b0b7"


def profile_chart(rows: pd.DataFrame, title: str, *, as_percent: bool) -> Any:
    """Return one number per layer over depth, with its interval where there is one.

    Args:
        rows: `index`, `label`, `value`, `low`, `high` (may be null) and `flagged`.
    """
    order = rows.sort_values("index")["label"].tolist()
    shown = ".1%" if as_percent else ".3~g"
    x = alt.X(
        "label:N",
        sort=order,
        title=None,
        axis=alt.Axis(labelAngle=-45, labelOverlap="greedy", ticks=False, domain=False),
    )
    color = alt.Color(
        "flagged:N", scale=alt.Scale(domain=[True, False], range=[BAD, GOOD]), legend=None
    )
    axis = alt.Axis(format=".0%" if as_percent else ".3~g", tickCount=6)
    chart = alt.Chart(rows)
    tooltip = [
        alt.Tooltip("name:N", title="Layer"),
        alt.Tooltip("value:Q", title=title, format=shown),
        alt.Tooltip("low:Q", title="95 % from", format=shown),
        alt.Tooltip("high:Q", title="95 % to", format=shown),
    ]
    zero = alt.Chart(rows.head(1)).mark_rule(strokeDash=[4, 3], color="#8a9199")
    layers = [
        chart.mark_rule(strokeWidth=5, strokeCap="round", opacity=0.45).encode(
            x=x, y=alt.Y("low:Q", title=title, axis=axis), y2="high:Q", color=color
        ),
        chart.mark_circle(size=95, opacity=1).encode(
            x=x, y=alt.Y("value:Q", title=title, axis=axis), color=color, tooltip=tooltip
        ),
    ]
    if as_percent:
        layers.insert(0, zero.encode(y=alt.datum(0)))
    return alt.layer(*layers).properties(height=340)


def history_chart(history: pd.DataFrame) -> Any:
    """Return the validation cross entropy over the epochs of the repair and of its controls."""
    drawn = {
        role: _ROLES.get(role, (f"control: {role}", _UNKNOWN_COLOR))
        for role in dict.fromkeys(history["role"])
    }
    rows = history.assign(trained=[drawn[role][0] for role in history["role"]])
    color = alt.Color(
        "trained:N",
        scale=alt.Scale(
            domain=[name for name, _ in drawn.values()],
            range=[color for _, color in drawn.values()],
        ),
        legend=alt.Legend(title=None, orient="top", columns=3, labelLimit=240),
    )
    base = alt.Chart(rows).encode(
        x=alt.X("epoch:Q", title="Epoch", axis=alt.Axis(tickMinStep=1, format="d", grid=False)),
        y=alt.Y("val_ce:Q", title="Validation cross entropy", scale=alt.Scale(zero=False)),
        color=color,
        tooltip=["trained", "epoch", alt.Tooltip("val_ce:Q", format=".4f")],
    )
    best = base.transform_filter("datum.best").mark_circle(size=110, opacity=1)
    return alt.layer(base.mark_line(strokeWidth=2.5), best).properties(height=280)
