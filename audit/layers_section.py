"""The report's section on the layers: a profile over depth, then all of them ranked, with scores.

Which scores there are is said once, in `EVIDENCE`: a further column of `layers.parquet` is one
entry there. Columns that a run lacks, or that are null for every layer, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from audit.depth_plot import DepthPlot, DepthRow, Scores, depth_plot
from audit.wording import NOT_THERE, count, layer_title, number, percent, span

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EVIDENCE", "Cell", "Evidence", "LayerRow", "LayersSection", "layers_section"]

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One score of a layer: its column, what it is called, what it says, how it is written.

    `COLUMN_low` and `COLUMN_high`, where the table has them, are its 95 % interval.

    Attributes:
        panel: Whether it is drawn over depth beneath the trial gain.
        reference: The value that says nothing, from which it is drawn.
    """

    column: str
    heading: str
    explanation: str
    format: Literal["share", "number", "decimals", "count"] = "number"
    panel: bool = False
    reference: float = 0.0


EVIDENCE = (
    Evidence(
        column="blame",
        heading="Share of blame",
        explanation="How likely the layer is the one at fault, by evidence and trials together.",
        format="share",
        panel=True,
    ),
    Evidence(
        column="trial_gain",
        heading="Trial gain",
        explanation="Share of the held-out cross entropy that a short trial repair of the layer "
        "removes; below zero it made things worse.",
        format="share",
    ),
    Evidence(
        column="trial_steps",
        heading="Steps",
        explanation="How many steps that trial took; layers that did not promise much get a "
        "shorter one.",
        format="count",
    ),
    Evidence(
        column="channel_gain",
        heading="Channel trial gain",
        explanation="Share of the held-out cross entropy that scaling and shifting the layer's "
        "channels removes.",
        format="share",
        panel=True,
    ),
    Evidence(
        column="moves_gain",
        heading="Channel moves gain",
        explanation="Share of the held-out cross entropy that exchanging two of the layer's "
        "channels, or changing the sign of one, removes.",
        format="share",
        panel=True,
    ),
    Evidence(
        column="norm_outlier",
        heading="Weight norm",
        explanation="How surely the norm of the layer's weights is above that of the other "
        "convolutions: -log10 of the p-value of Grubbs' test, 2 for one in a hundred.",
        format="decimals",
    ),
    Evidence(
        column="silent_channels",
        heading="Silent channels",
        explanation="Share of the layer's channels that say the same whatever the image.",
        format="share",
    ),
    Evidence(
        column="trial_broken",
        heading="Turned wrong",
        explanation="Share of right held-out images that the trial repair turns wrong.",
        format="share",
    ),
    Evidence(
        column="gradient_snr",
        heading="Gradient signal-to-noise",
        explanation="How far the images' gradients by the layer's weights share one direction, "
        "beside how much they scatter.",
        panel=True,
    ),
    Evidence(
        column="relative_gradient_norm",
        heading="Relative gradient norm",
        explanation="Size of the gradient of the error beside the size of the weights.",
        panel=True,
    ),
    Evidence(
        column="gradient_norm",
        heading="Gradient norm",
        explanation="Size of the gradient of the error by the layer's weights.",
        panel=True,
    ),
    Evidence(
        column="gradient_agreement",
        heading="Gradient agreement",
        explanation="How alike the gradients of two wrong images are, on average: their cosine, 1 "
        "for the same direction.",
        format="decimals",
        panel=True,
    ),
    Evidence(
        column="gradient_conflict",
        heading="Gradient conflict",
        explanation="How far the mean gradient of wrong images opposes that of right ones: minus "
        "their cosine, 1 where one undoes what the other does.",
        format="decimals",
        panel=True,
    ),
    Evidence(
        column="bn_drift",
        heading="Drift",
        explanation="How far the layer's output is from what the batch norm behind it remembers, "
        "in nats; on images without the artefact that an error group shares, where there is one.",
        panel=True,
    ),
    Evidence(
        column="bn_drift_onset",
        heading="Onset of drift",
        explanation="How many times more it drifts than anything that feeds it, as a logarithm.",
        format="decimals",
        panel=True,
    ),
    Evidence(
        column="bn_drift_unexplained",
        heading="Unexplained drift",
        explanation="Of a first layer that drifts: what no change of the images' size, contrast, "
        "brightness or color explains, in nats.",
    ),
    Evidence(
        column="bn_drift_by_signs",
        heading="Drift by signs",
        explanation="How much of the drift goes when signs of the layer's channels are changed, in "
        "nats: they were where that is most of it.",
    ),
    Evidence(
        column="map_auroc",
        heading="Map AUROC",
        explanation="How well the mean of the layer's map tells right images from wrong ones; 0.5 "
        "is chance.",
        format="decimals",
        panel=True,
        reference=0.5,
    ),
    Evidence(
        column="penalty",
        heading="Penalty R1 + R2",
        explanation="Mean of the penalty of the repair's loss over the images.",
    ),
    Evidence(
        column="energy_inside",
        heading="Map on the object",
        explanation="Mean share of the layer's map that lies on the object, by the masks.",
        format="share",
        panel=True,
    ),
    Evidence(
        column="energy_drop",
        heading="Lost from the object",
        explanation="How much of that share was lost since the layer before it.",
        format="share",
        panel=True,
    ),
    Evidence(
        column="pointing_game",
        heading="Peak on the object",
        explanation="Share of images whose map has its peak on the object.",
        format="share",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A score as text, with its 95 % interval beneath where it has one."""

    value: str
    interval: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of the ranked table."""

    title: str
    detail: str
    flagged: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class LayersSection:
    """What the template shows. `legend` is pairs of a mark's class and what it means."""

    plot: DepthPlot
    described: str
    legend: tuple[tuple[str, str], ...]
    limit: str
    columns: tuple[Evidence, ...]
    rows: tuple[LayerRow, ...]


def layers_section(
    layers: pd.DataFrame, aliases: Mapping[str, str], verdict: Mapping[str, Any]
) -> LayersSection | None:
    """Return the profile and the ranked table of a run's layers, None where there are none.

    Args:
        layers: `layers.parquet`, one row a layer.
        verdict: `verdict.json`, whose `layers` are marked; empty where it cannot be read.
    """
    if layers.empty:
        return None
    flagged = [str(name) for name in verdict.get("layers") or []]
    columns = tuple(one for one in EVIDENCE if _has(layers, one.column))
    by_depth = layers.sort_values("index").to_dict("records")
    longest = max((_real(row, "trial_steps") for row in by_depth), key=_or_least)
    drawn = [_depth_row(row, aliases, flagged, longest) for row in by_depth]
    limit = (verdict.get("numbers") or {}).get("flag_threshold")
    panels = [_scores(one, by_depth) for one in columns if one.panel]
    ranked = layers.sort_values(["rank", "index"], na_position="last").to_dict("records")
    return LayersSection(
        plot=depth_plot(drawn, panels, limit=limit),
        described=_described(by_depth, aliases),
        legend=_legend({row.tone for row in drawn}, verdict),
        limit=percent(limit, 0) if limit is not None else "",
        columns=columns,
        rows=tuple(_row(row, columns, aliases, row["name"] in flagged) for row in ranked),
    )


# --- over depth -----------------------------------------------------------------------------------


def _depth_row(
    row: Row, aliases: Mapping[str, str], flagged: Sequence[str], longest: float
) -> DepthRow:
    gain = _interval(row, "trial_gain")
    return DepthRow(
        label=aliases.get(row["name"], row["name"]),
        said=f"{_place(row)}{layer_title(row['name'], aliases.get(row['name']))}: {_said(row)}",
        value=gain["value"],
        low=gain["low"],
        high=gain["high"],
        tone=_tone(row, flagged, longest),
    )


def _tone(row: Row, flagged: Sequence[str], longest: float) -> str:
    if row["name"] in flagged:
        return "flagged"
    if math.isnan(_real(row, "trial_gain")):
        return "untried"
    # Dropped on the way: its gain is not comparable with that of a longer trial.
    return "short" if _real(row, "trial_steps") < longest else "other"


def _said(row: Row) -> str:
    gain = _interval(row, "trial_gain")
    if math.isnan(gain["value"]):
        return "not tried"
    interval = span(gain)
    between = "" if interval == NOT_THERE else f" [{interval}]"
    steps = _real(row, "trial_steps")
    after = "" if math.isnan(steps) else f" after {count(steps, 'steps')}"
    return f"trial gain {percent(gain['value'])}{between}{after}"


def _described(rows: Sequence[Row], aliases: Mapping[str, str]) -> str:
    """Return the plot in one sentence, for those who cannot see it."""
    tried = [row for row in rows if not math.isnan(_real(row, "trial_gain"))]
    said = f"Trial gain of {count(len(rows), 'layers')} over depth"
    if not tried:
        return f"{said}; none was tried."
    best = max(tried, key=lambda row: _real(row, "trial_gain"))
    return f"{said}; largest for {aliases.get(best['name'], best['name'])}, {_said(best)}."


def _legend(tones: set[str], verdict: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    localized = verdict.get("verdict") == "localized"
    meaning = {
        "flagged": "the layer at fault" if localized else "the layers that share the blame",
        "other": "other layers",
        "short": "given up after a shorter trial",
        "untried": "not tried",
    }
    return tuple((tone, said) for tone, said in meaning.items() if tone in tones)


def _scores(one: Evidence, rows: Sequence[Row]) -> Scores:
    def column(name: str) -> list[float]:
        return [_real(row, name) for row in rows]

    values, highs = column(one.column), column(f"{one.column}_high")
    line = f", line at {one.reference:g}" if one.reference else ""
    return Scores(
        heading=f"{one.heading}{line}",
        values=values,
        lows=column(f"{one.column}_low"),
        highs=highs,
        reference=one.reference,
        largest=_text(one, max([*values, *highs], key=_or_least)),
    )


# --- ranked ---------------------------------------------------------------------------------------


def _row(
    row: Row, columns: Sequence[Evidence], aliases: Mapping[str, str], flagged: bool
) -> LayerRow:
    name = row["name"]
    what = f"{row['kind']} {row['shape']}, {count(row['parameters'], 'parameters')}"
    return LayerRow(
        title=f"{_place(row)}{aliases.get(name, name)}",
        detail=f"{name}, {what}" if name in aliases else what,
        flagged=flagged,
        cells=tuple(_cell(one, row) for one in columns),
    )


def _cell(one: Evidence, row: Row) -> Cell:
    interval = _interval(row, one.column)
    between = span(interval)
    if one.format != "share" and between != NOT_THERE:
        between = f"{_text(one, interval['low'])} to {_text(one, interval['high'])}"
    return Cell(
        value=_text(one, interval["value"]), interval="" if between == NOT_THERE else between
    )


def _text(one: Evidence, value: float) -> str:
    match one.format:
        case "share":
            return percent(value)
        case "number":
            return number(value)
        case "decimals":
            return number(value, 2)
        case "count":
            return count(value)


def _place(row: Row) -> str:
    rank = _real(row, "rank")
    return "" if math.isnan(rank) else f"{count(rank)}. "


def _interval(row: Row, name: str) -> dict[str, float]:
    keys = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
    return {key: _real(row, column) for key, column in keys.items()}


def _real(row: Row, name: str) -> float:
    """Return a number of the table, NaN where it is null or the column is not there."""
    value = row.get(name)
    return float("nan") if value is None else float(value)


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _has(layers: pd.DataFrame, column: str) -> bool:
    return column in layers.columns and bool(layers[column].notna().any())
