"""Which layer is at fault: the evidence over depth, ranked, and one image through every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from audit.errors import RunError
from audit.gallery import layer_strip
from audit.rendering import part
from audit.runs import Run
from audit.wording import method_title
from dashboard.charts import profile_chart
from dashboard.selection import aliases, problems_shown, selected

if TYPE_CHECKING:
    import pandas as pd
    from streamlit.elements.lib.column_types import ColumnConfig

# Column of layers.parquet: how it is called, what it says, whether it is a share.
EVIDENCE = {
    "trial_gain": (
        "Trial gain",
        "Share of the held-out cross entropy that a short trial repair of the layer removes; "
        "below zero it made things worse.",
        True,
    ),
    "blame": (
        "Share of blame",
        "How likely the layer is the one at fault, by evidence and trials together.",
        True,
    ),
    "channel_gain": (
        "Channel trial gain",
        "Share of the held-out cross entropy that scaling and shifting its channels removes.",
        True,
    ),
    "trial_broken": (
        "Turned wrong by the trial",
        "Share of right held-out images that the trial repair turns wrong.",
        True,
    ),
    "gradient_snr": (
        "Gradient signal-to-noise",
        "How well the images agree on where the layer's weights should move.",
        False,
    ),
    "relative_gradient_norm": (
        "Relative gradient norm",
        "Size of the gradient beside the size of the weights.",
        False,
    ),
    "gradient_norm": ("Gradient norm", "Size of the gradient.", False),
    "map_auroc": (
        "Map AUROC",
        "How well the mean of the layer's map tells right images from wrong ones; 0.5 is chance.",
        False,
    ),
    "penalty": (
        "Penalty R1 + R2",
        "Mean of the penalty of the repair's loss over the images.",
        False,
    ),
    "map_mean_right": (
        "Map mean, right images",
        "How much of the map is lit on right images.",
        False,
    ),
    "map_mean_wrong": (
        "Map mean, wrong images",
        "How much of the map is lit on wrong images.",
        False,
    ),
}
COLUMNS = {
    "rank": "Rank",
    "title": "Layer",
    "name": "Module path",
    "shape": "Weight",
    "parameters": "Parameters",
    "trial_gain": "Trial gain",
    "trial_gain_low": "95 % from",
    "trial_gain_high": "to",
    "trial_broken": "Turned wrong",
    "gradient_snr": "Gradient SNR",
    "relative_gradient_norm": "Relative gradient",
    "map_auroc": "Map AUROC",
    "penalty": "Penalty",
}


def main() -> None:
    run, _ = selected()
    st.html(part("section", "Layers, from input to output"))
    with problems_shown():
        known = run.aliases
        titles = [known.get(name, name) for name in run.layers["name"]]
        layers = run.layers.assign(title=titles)
        flagged = _flagged(run)
        _show_profile(layers, flagged)
        _show_ranking(layers, flagged)
    with problems_shown():
        _show_strip(run)


def _flagged(run: Run) -> list[str]:
    if not (run.path / "verdict.json").is_file():
        return []
    try:
        return [str(name) for name in run.verdict.get("layers") or []]
    except RunError:  # the overview says so
        return []


def _show_profile(layers: pd.DataFrame, flagged: list[str]) -> None:
    held = [name for name in EVIDENCE if layers[name].notna().any()]
    if not held:
        st.html(part("banner", "open", "This scan holds no evidence about its layers yet."))
        return
    chosen = st.selectbox("Evidence", held, format_func=lambda name: EVIDENCE[name][0])
    title, meaning, as_percent = EVIDENCE[chosen]
    rows = layers[["index", "name", "title"]].rename(columns={"title": "label"})
    rows["value"] = layers[chosen]
    for end in ("low", "high"):
        column = f"{chosen}_{end}"
        rows[end] = layers.get(column)
    rows["flagged"] = layers["name"].isin(flagged)
    st.caption(meaning)
    st.altair_chart(profile_chart(rows, title, as_percent=as_percent), width="stretch")
    if flagged:
        st.html(part("legend", [("bad", "named by the verdict"), ("good", "other layers")]))


def _show_ranking(layers: pd.DataFrame, flagged: list[str]) -> None:
    st.html(part("section", "Ranked, most likely at fault first"))
    shares = ["Trial gain", "95 % from", "to", "Turned wrong"]
    ranked = layers.sort_values("rank")[list(COLUMNS)].rename(columns=COLUMNS)
    ranked[shares] = 100 * ranked[shares]
    formats: dict[str, ColumnConfig | str | None] = {
        name: st.column_config.NumberColumn(format="%.1f %%") for name in shares
    }
    formats |= {
        name: st.column_config.NumberColumn(format="%.3f")
        for name in ("Gradient SNR", "Relative gradient", "Map AUROC", "Penalty")
    }
    formats["Parameters"] = st.column_config.NumberColumn(format="localized")
    formats["Layer"] = st.column_config.TextColumn(pinned=True)
    formats["Rank"] = st.column_config.NumberColumn(pinned=True, width="small")
    st.dataframe(ranked, hide_index=True, column_config=formats, height="auto")


def _show_strip(run: Run) -> None:
    gallery = run.gallery
    if not gallery["images"] or not gallery["layers"]:
        return
    st.html(part("section", "One image through the layers", "Maps of the true class."))
    entries = gallery["images"]
    left, right = st.columns([3, 1])
    place = left.selectbox(
        "Image", range(len(entries)), format_func=lambda n: _image_label(entries[n])
    )
    method = right.selectbox("Method", gallery["methods"], format_func=method_title)
    st.html(part("map_legend"))
    known = aliases(run)
    titles = {name: known.get(name) or name for name in gallery["layers"]}
    flagged = [titles.get(name, name) for name in _flagged(run)]
    st.html(part("strip", layer_strip(run, place or 0, method, titles), flagged))


def _image_label(entry: dict[str, object]) -> str:
    right = "right" if entry.get("right") else f"taken for {entry.get('predicted_name')}"
    return f"{entry.get('path')} ({right})"


main()
