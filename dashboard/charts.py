"""Charts that answer to the pointer; colors as in the report, safe for every color vision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from audit.training_curves import training_role

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BAD", "GOOD", "history_chart", "profile_chart"]

GOOD, BAD = "#2b7fc3", "#d9652b"


def profile_chart(
    rows: pd.DataFrame, title: str, *, as_percent: bool, small: bool = False, named: bool = True
) -> Any:
    """Return one number per layer over depth, with its interval where there is one.

    Args:
        rows: `index`, `label`, `value`, `low`, `high` (may be null) and `flagged`.
        small: Whether it stands among others, its title above it.
        named: Whether the layers' names stand beneath.
    """
    order = rows.sort_values("index")["label"].tolist()
    shown = ".1%" if as_percent else ".3~g"
    x = alt.X(
        "label:N",
        sort=order,
        title=None,
        axis=alt.Axis(
            labels=named, labelAngle=-45, labelOverlap="greedy", ticks=False, domain=False
        ),
    )
    color = alt.Color(
        "flagged:N", scale=alt.Scale(domain=[True, False], range=[BAD, GOOD]), legend=None
    )
    axis = alt.Axis(format=".0%" if as_percent else ".3~g", tickCount=3 if small else 6)
    y_title = None if small else title
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
            x=x, y=alt.Y("low:Q", title=y_title, axis=axis), y2="high:Q", color=color
        ),
        chart.mark_circle(size=60 if small else 95, opacity=1).encode(
            x=x, y=alt.Y("value:Q", title=y_title, axis=axis), color=color, tooltip=tooltip
        ),
    ]
    if as_percent:
        layers.insert(0, zero.encode(y=alt.datum(0)))
    whole = alt.layer(*layers)
    if not small:
        return whole.properties(height=340)
    heading = alt.Title(title, anchor="start", fontSize=12, fontWeight=500)
    return whole.properties(height=170 if named else 110, title=heading)


def history_chart(history: pd.DataFrame) -> Any:
    """Return the validation cross entropy over the epochs of the repair and of its controls."""
    drawn = {role: training_role(role) for role in dict.fromkeys(history["role"])}
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
