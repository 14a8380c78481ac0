"""Every image of the run: filtered, sorted, searched, in a grid or one by one, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from audit.errors import RunError
from audit.gallery import GRID_CELLS, Card, Picture, image_facts
from audit.rendering import part
from audit.runs import RepairFolder, Run
from audit.wording import count, layer_title, method_title
from dashboard import address
from dashboard.image_table import ORDERS, ImageTable, Query, open_image_table
from dashboard.pictures import kept_pictures, scanned_picture
from dashboard.selection import aliases, folder_state, problems_shown, selected

PER_PAGE = 12
VIEWER_CELLS = 28  # a side, of the values that the pointer finds on a large map
WIDTH = 176  # pixels: two fit beside each other on a phone
ALL = "all"
VIEWS = {"grid": "Grid", "one": "One by one"}
SOURCES = {"repair": "Before and after", "scan": "As scanned"}
NO_MAPS: dict[str, Any] = {"images": [], "layers": [], "methods": []}


def main() -> None:
    run, repair = selected()
    st.html(part("section", "Images", "Where the network looks for the true class."))
    with problems_shown():
        table = _table(run, repair, folder_state(run.path, *([repair.path] if repair else [])))
        query = _show_filters(table)
        found = table.find(query)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            view, source = _pick_view(repair)
            layer, method = _pick_maps(run, repair if source == "repair" else None)
            if view == "one":
                opacity = st.slider("Opacity of maps", 0, 100, 80, key="opacity", width=WIDTH)
            else:
                opacity = 80
        if not len(found):
            st.html(part("banner", "open", "No image passes these filters."))
            return
        shown = _Shown(run, repair if source == "repair" else None, table, layer, method)
        st.html(part("map_legend"))
        if view == "one":
            _show_one(shown, found.tolist(), opacity)
        else:
            _show_grid(shown, found.tolist())


class _Shown:
    """What every card of the page is drawn from."""

    def __init__(
        self, run: Run, repair: RepairFolder | None, table: ImageTable, layer: str, method: str
    ) -> None:
        self.run, self.repair, self.table = run, repair, table
        self.layer, self.method = layer, method

    def card(self, place: int, *, cells: int, href: str = "") -> Card:
        row = self.table.row(place)
        pictures, told = self._pictures(row, cells)
        known: Mapping[str, Any] = {**row, "case": row["case_before"] or row["case"]}
        facts = [*image_facts(known), ("Split", str(row["split"]))]
        if told:
            facts.append(("Maps", told))
        return Card(
            name=str(row["path"]),
            outcome=row["outcome"],
            pictures=pictures,
            facts=tuple(facts),
            href=href,
        )

    def _pictures(self, row: Mapping[str, Any], cells: int) -> tuple[tuple[Picture, ...], str]:
        """Return the pictures of one image, and why there are no maps where there are none."""
        told = "none kept of this image"
        for folder, place in ((self.repair, row["repair_place"]), (self.run, row["scan_place"])):
            if folder is None or place is None:
                continue
            layer, method = self._kept_maps(folder)
            try:
                return kept_pictures(folder, place, method, layer, cells=cells), ""
            except RunError as error:
                told = str(error)
        try:
            return (scanned_picture(self.run, str(row["path"])),), told
        except RunError as error:
            return (), f"{told}; {error}"

    def _kept_maps(self, folder: Run | RepairFolder) -> tuple[str, str]:
        """Return layer and method to show; a repair's maps are of its own layer."""
        index = folder.gallery
        layer = self.layer if self.layer in index["layers"] else index.get("shown_layer")
        method = self.method if self.method in index["methods"] else index.get("shown_method")
        return str(layer), str(method)


@st.cache_resource(max_entries=4, show_spinner=False)
def _table(
    _run: Run, _repair: RepairFolder | None, state: tuple[tuple[str, int, int], ...]
) -> ImageTable:
    return open_image_table(_run, _repair)


# --- filters --------------------------------------------------------------------------------------


def _show_filters(table: ImageTable) -> Query:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        address.begin("images-search", "search", "")
        search = st.text_input(
            "Search", key="images-search", placeholder="Part of the name", max_chars=200,
            live=True, width=WIDTH,
        )  # fmt: skip
        outcome = _one_of("Outcome", "outcome", [str(one) for one in table.values("outcome")])
        case = _pick_case(table, "Case", "case")
        before = _pick_case(table, "Case before", "case_before")
        after = _pick_case(table, "Case after", "case_after")
        orders = [name for name in ORDERS if not (name == "changed" and not table.has("ssim"))]
        address.begin("images-order", "order", "maps", orders)
        order = st.selectbox(
            "Order", orders, format_func=lambda name: ORDERS[name], key="images-order",
            width=WIDTH + 60,
        )  # fmt: skip
    with st.expander("More filters"), st.container(horizontal=True, vertical_alignment="bottom"):
        labels = _many_of("Class", "label", table.values("label_name"))
        answers = _many_of("Said", "said", table.values("predicted_name"))
        split = _one_of("Split", "split", [str(one) for one in table.values("split")])
        group = _pick_group(table)
        confidence = _range("Chance of the label", "confidence", (0.0, 1.0))
        similarity = (
            _range("Similarity of maps", "ssim", (-1.0, 1.0)) if table.has("ssim") else (-1.0, 1.0)
        )
    address.write("search", search)
    address.write("order", order, "maps")
    return Query(
        search=search or "",
        labels=tuple(labels),
        answers=tuple(answers),
        outcome=outcome or None,
        case=case,
        case_before=before,
        case_after=after,
        split=split or None,
        group=group or None,
        confidence=confidence,
        similarity=similarity,
        order=order,
    )


def _pick_case(table: ImageTable, title: str, column: str) -> int | None:
    if not table.has(column):
        return None
    chosen = _one_of(title, column, [str(case) for case in table.values(column)], "Case {}")
    return int(chosen) if chosen else None


def _one_of(title: str, name: str, choices: Sequence[str], written: str = "{}") -> str:
    """Show a filter of one choice; return it, empty where all pass."""
    key = f"images-{name}"
    address.begin(key, name, ALL, (ALL, *choices))
    chosen = st.selectbox(
        title,
        [ALL, *choices],
        format_func=lambda one: "All" if one == ALL else written.format(one).capitalize(),
        key=key,
        width=WIDTH - 40,
    )
    address.write(name, chosen, ALL)
    return "" if chosen in (None, ALL) else str(chosen)


def _many_of(title: str, name: str, choices: Sequence[str]) -> list[str]:
    key = f"images-{name}"
    address.begin_many(key, name, choices)
    chosen = st.multiselect(
        title, choices, key=key, format_func=_short, placeholder="All", width=WIDTH
    )
    address.write(name, list(chosen))
    return list(chosen)


def _range(title: str, name: str, whole: tuple[float, float]) -> tuple[float, float]:
    key = f"images-{name}"
    address.begin_range(key, name, whole)
    chosen: Any = st.slider(title, *whole, step=0.01, key=key, width=WIDTH + 40)
    low, high = (float(end) for end in chosen)
    address.write(name, (low, high), whole)
    return low, high


def _pick_group(table: ImageTable) -> str:
    if not table.groups:
        return ""
    address.begin("images-group", "group", ALL, (ALL, *table.groups))
    chosen = st.selectbox(
        "Error group",
        [ALL, *table.groups],
        format_func=lambda one: "All" if one == ALL else _short(table.titles[one], 90),
        key="images-group",
        width=2 * WIDTH,
    )
    address.write("group", chosen, ALL)
    return "" if chosen in (None, ALL) else str(chosen)


def _pick_view(repair: RepairFolder | None) -> tuple[str, str]:
    address.begin("images-view", "view", "grid", VIEWS)
    view = st.segmented_control(
        "View", list(VIEWS), format_func=lambda one: VIEWS[one], key="images-view", required=True
    )
    address.write("view", view, "grid")
    if repair is None:
        return str(view), "scan"
    address.begin("images-source", "maps", "repair", SOURCES)
    source = st.segmented_control(
        "Maps", list(SOURCES), format_func=lambda one: SOURCES[one], key="images-source",
        required=True,
    )  # fmt: skip
    address.write("maps", source, "repair")
    return str(view), str(source)


def _pick_maps(run: Run, repair: RepairFolder | None) -> tuple[str, str]:
    """Show which maps there are to choose from, of the repair where it has any."""
    indices = []
    for folder in (repair, run):
        with problems_shown():
            indices.append(folder.gallery if folder is not None else NO_MAPS)
    index = next((one for one in indices if one["images"]), NO_MAPS)
    layers, methods = list(index["layers"]), list(index["methods"])
    if not layers or not methods:
        return "", ""
    known = aliases(run)
    shown_layer, shown_method = index.get("shown_layer"), index.get("shown_method")
    address.begin("images-layer", "layer", str(shown_layer or layers[0]), layers)
    address.begin("images-method", "method", str(shown_method or methods[0]), methods)
    layer = st.selectbox(
        "Layer", layers, format_func=lambda name: layer_title(name, known.get(name)),
        key="images-layer", width=WIDTH + 60,
    )  # fmt: skip
    method = st.selectbox(
        "Method", methods, format_func=method_title, key="images-method", width=WIDTH - 30
    )
    address.write("layer", layer, shown_layer)
    address.write("method", method, shown_method)
    return str(layer), str(method)


# --- images ---------------------------------------------------------------------------------------


def _show_grid(shown: _Shown, places: list[int]) -> None:
    pages = -(-len(places) // PER_PAGE)
    page = min(st.session_state.get("images-page", 0), pages - 1)
    first = page * PER_PAGE
    last = min(first + PER_PAGE, len(places))
    told = f"{first + 1:,} to {last:,} of {count(len(places), 'images')}"
    _show_steps("images-page", page, pages, told)
    cards = [
        shown.card(place, cells=GRID_CELLS, href=_image_link(str(shown.table.row(place)["path"])))
        for place in places[first:last]
    ]
    st.html(part("cards", cards))


def _show_one(shown: _Shown, places: list[int], opacity: int) -> None:
    if "images-one" not in st.session_state:
        wanted = shown.table.place(st.query_params.get("image", ""))
        st.session_state["images-one"] = places.index(wanted) if wanted in places else 0
    at = min(st.session_state["images-one"], len(places) - 1)
    _show_steps("images-one", at, len(places), f"{at + 1:,} of {count(len(places), 'images')}")
    card = shown.card(places[at], cells=VIEWER_CELLS)
    address.write("image", card.name)
    pictures = tuple(
        replace(one, title=f"{one.title}, {method_title(shown.method)}") if one.heat else one
        for one in card.pictures
    )
    body = part("cards", [replace(card, pictures=pictures)])
    st.html(f'<div class="lm-viewer" style="--heat: {opacity / 100:.2f}">{body}</div>')


def _show_steps(key: str, at: int, steps: int, told: str) -> None:
    """Show where one is, and the ways on: buttons, and the arrow keys."""

    def go(to: int) -> None:
        st.session_state[key] = to

    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Previous", key=f"{key}-back", on_click=go, args=(at - 1,), disabled=at <= 0,
            shortcut="Left",
        )  # fmt: skip
        st.button(
            "Next", key=f"{key}-on", on_click=go, args=(at + 1,), disabled=at >= steps - 1,
            shortcut="Right",
        )  # fmt: skip
        st.caption(told)


def _image_link(path: str) -> str:
    """Return the address of one image, large, within what is filtered now."""
    now = {name: st.query_params.get_all(name) for name in st.query_params}
    return address.link("images", **{**now, "view": "one", "image": path})


def _short(name: str, length: int = 60) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


main()
