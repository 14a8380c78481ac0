"""What the network looks at: the gallery of the scan, or of a repair before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import streamlit as st

from audit.gallery import card, outcome
from audit.rendering import part
from audit.runs import RepairFolder, Run
from audit.wording import count, layer_title, method_title
from dashboard.selection import aliases, problems_shown, selected

PER_PAGE = 12
FILTER_WIDTH = 176  # pixels: two fit beside each other on a phone
ALL = "all"
Entry = Mapping[str, Any]


def main() -> None:
    run, repair = selected()
    st.html(part("section", "Images", "Where the network looks for the true class."))
    with problems_shown():
        folder = _pick_gallery(run, repair)
        gallery = folder.gallery
        if not gallery["images"]:
            st.html(part("banner", "open", "There are no maps here yet."))
            return
        with st.container(horizontal=True):
            layer, method = _pick_maps(gallery, aliases(run))
        with st.container(horizontal=True):
            places = _filtered(gallery["images"])
        st.html(part("map_legend"))
        _show_cards(folder, places, method, layer)


def _pick_gallery(run: Run, repair: RepairFolder | None) -> Run | RepairFolder:
    if repair is None or not repair.gallery["images"]:
        return run
    names = {"repair": "Before and after the repair", "scan": "As scanned"}
    chosen = st.segmented_control(
        "Maps", list(names), default="repair", format_func=lambda name: names[name]
    )
    return run if chosen == "scan" else repair


def _pick_maps(gallery: Entry, known: Mapping[str, str]) -> tuple[str, str]:
    layers, methods = gallery["layers"], gallery["methods"]
    shown_layer, shown_method = gallery.get("shown_layer"), gallery.get("shown_method")
    layer = st.selectbox(
        "Layer",
        layers,
        index=layers.index(shown_layer) if shown_layer in layers else 0,
        format_func=lambda name: layer_title(name, known.get(name)),
        width=2 * FILTER_WIDTH,
    )
    method = st.selectbox(
        "Method",
        methods,
        index=methods.index(shown_method) if shown_method in methods else 0,
        format_func=method_title,
        width=FILTER_WIDTH,
    )
    return str(layer), str(method)


def _filtered(entries: Sequence[Entry]) -> list[int]:
    """Show the filters; return the positions of the images that pass, in the chosen order."""
    outcomes = [ALL, *sorted({outcome(entry) for entry in entries})]
    wanted = st.selectbox("Outcome", outcomes, format_func=str.capitalize, width=FILTER_WIDTH)
    classes = st.multiselect(
        "Class",
        sorted({str(entry.get("label_name")) for entry in entries}),
        placeholder="All",
        width=FILTER_WIDTH,
    )
    splits = [ALL, *sorted({str(entry.get("split")) for entry in entries})]
    split = st.selectbox("Split", splits, format_func=str.capitalize, width=FILTER_WIDTH)
    orders: dict[str, Callable[[Entry], Any]] = {
        "As in the run": lambda entry: 0,
        "Least sure first": lambda entry: _last_if_none(entry.get("p_true")),
    }
    if any(entry.get("ssim") is not None for entry in entries):
        orders["Maps changed most"] = lambda entry: _last_if_none(entry.get("ssim"))
    order = st.selectbox("Order", list(orders), width=FILTER_WIDTH)
    places = [
        place
        for place, entry in enumerate(entries)
        if wanted in (ALL, outcome(entry))
        and (not classes or str(entry.get("label_name")) in classes)
        and split in (ALL, str(entry.get("split")))
    ]
    return sorted(places, key=lambda place: orders[order](entries[place]))


def _show_cards(folder: Run | RepairFolder, places: list[int], method: str, layer: str) -> None:
    if not places:
        st.html(part("banner", "open", "No image of this gallery passes these filters."))
        return
    first = 0
    if len(places) > PER_PAGE:
        starts = range(0, len(places), PER_PAGE)
        first = st.selectbox(
            "Shown",
            starts,
            format_func=lambda n: f"{n + 1} to {min(n + PER_PAGE, len(places))} of {len(places)}",
            width=FILTER_WIDTH,
        )
    else:
        st.caption(count(len(places), "images"))
    shown = places[first : first + PER_PAGE]
    st.html(part("cards", [card(folder, place, method, layer) for place in shown]))


def _last_if_none(value: Any) -> float:
    return float("inf") if value is None else float(value)


main()
