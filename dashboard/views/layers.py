"""Which layer is at fault: every score over depth, ranked, and one image through every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from audit.errors import RunError
from audit.gallery import layer_strip
from audit.layers_section import EVIDENCE, Evidence
from audit.rendering import part
from audit.runs import Run
from audit.wording import method_title
from dashboard import address
from dashboard.charts import profile_chart
from dashboard.selection import aliases, problems_shown, selected

if TYPE_CHECKING:
    import pandas as pd
    from streamlit.elements.lib.column_types import ColumnConfig

BY_COLUMN = {one.column: one for one in EVIDENCE}
FIRST = "trial_gain"
EVERY = "every"
FURTHER = {"name": "Module path", "shape": "Weight", "parameters": "Parameters"}


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


def _held(layers: pd.DataFrame) -> list[Evidence]:
    return [one for one in EVIDENCE if layers[one.column].notna().any()]


def _show_profile(layers: pd.DataFrame, flagged: list[str]) -> None:
    held = [one.column for one in _held(layers)]
    if not held:
        st.html(part("banner", "open", "This scan holds no evidence about its layers yet."))
        return
    default = FIRST if FIRST in held else held[0]
    address.begin("layers-evidence", "evidence", default, (*held, EVERY))
    chosen = st.selectbox(
        "Evidence",
        [*held, EVERY],
        format_func=lambda name: "All scores" if name == EVERY else BY_COLUMN[name].heading,
        key="layers-evidence",
        width=320,
    )
    address.write("evidence", chosen, default)
    if chosen == EVERY:
        st.caption("Each score on its own scale, 95 % intervals where they were measured.")
        for name in held:
            one = BY_COLUMN[name]
            chart = profile_chart(
                _profile_rows(layers, name, flagged),
                one.heading,
                as_percent=one.format == "share",
                small=True,
                named=name == held[-1],
            )
            st.altair_chart(chart, width="stretch")
    else:
        one = BY_COLUMN[str(chosen)]
        st.caption(one.explanation)
        rows = _profile_rows(layers, one.column, flagged)
        chart = profile_chart(rows, one.heading, as_percent=one.format == "share")
        st.altair_chart(chart, width="stretch")
    if flagged:
        marks = [("bad", "named by the verdict"), ("good", "other layers")]
        st.html(part("legend", marks))


def _profile_rows(layers: pd.DataFrame, column: str, flagged: list[str]) -> pd.DataFrame:
    rows = layers[["index", "name", "title"]].rename(columns={"title": "label"})
    rows["value"] = layers[column]
    for end in ("low", "high"):
        rows[end] = layers.get(f"{column}_{end}", float("nan"))
    rows["flagged"] = layers["name"].isin(flagged)
    return rows


def _show_ranking(layers: pd.DataFrame, flagged: list[str]) -> None:
    st.html(part("section", "Ranked, most likely at fault first"))
    columns = {"rank": "Rank", "title": "Layer", **FURTHER}
    formats: dict[str, ColumnConfig | str | None] = {
        "Parameters": st.column_config.NumberColumn(format="localized"),
        "Layer": st.column_config.TextColumn(pinned=True),
        "Rank": st.column_config.NumberColumn(pinned=True, width="small"),
    }
    shares = []
    for one in _held(layers):
        columns[one.column] = one.heading
        ends = {f"{one.column}_{end}": f"{one.heading}, {end}" for end in ("low", "high")}
        columns |= {name: title for name, title in ends.items() if name in layers}
        for title in [one.heading, *ends.values()]:
            shown = (
                "%.1f %%" if one.format == "share" else "%.0f" if one.format == "count" else "%.3g"
            )
            formats[title] = st.column_config.NumberColumn(format=shown, help=one.explanation)
            if one.format == "share":
                shares.append(title)
    ranked = layers.sort_values(["rank", "index"], na_position="last")
    ranked = ranked[list(columns)].rename(columns=columns)
    shares = [title for title in shares if title in ranked]
    ranked[shares] = 100 * ranked[shares]
    st.dataframe(ranked, hide_index=True, column_config=formats, height="auto")


def _show_strip(run: Run) -> None:
    gallery = run.gallery
    if not gallery["images"] or not gallery["layers"]:
        return
    st.html(part("section", "One image through the layers", "Maps of the true class."))
    entries = gallery["images"]
    with st.container(horizontal=True):
        place = st.selectbox(
            "Image",
            range(len(entries)),
            format_func=lambda n: _image_label(entries[n]),
            width=420,
        )
        method = st.selectbox("Method", gallery["methods"], format_func=method_title, width=176)
    st.html(part("map_legend"))
    known = aliases(run)
    titles = {name: known.get(name) or name for name in gallery["layers"]}
    flagged = [titles.get(name, name) for name in _flagged(run)]
    st.html(part("strip", layer_strip(run, place or 0, method, titles), flagged))
    left_out = len(run.layers) - len(titles)
    if left_out > 0 and len(titles) == 1:
        st.caption(
            "This run keeps the maps of one layer only. A scan with `--layers '*'` keeps those of "
            "every layer that has maps."
        )


def _image_label(entry: dict[str, object]) -> str:
    right = "right" if entry.get("right") else f"taken for {entry.get('predicted_name')}"
    path = str(entry.get("path"))
    shown = path if len(path) <= 60 else f"\N{HORIZONTAL ELLIPSIS}{path[-58:]}"
    return f"{shown} ({right})"


main()
