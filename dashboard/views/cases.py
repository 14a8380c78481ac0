"""Right or wrong, looking at the object or not: each case, and what a repair made of it."""

from __future__ import annotations

import streamlit as st

from audit.after_section import after_sentences
from audit.case_grid import moves_grid, scan_grid
from audit.cases_section import NUMBERS, cases_section
from audit.rendering import part
from audit.runs import RepairFolder, Run
from dashboard import address
from dashboard.selection import aliases, selected


def main() -> None:
    run, repair = selected()
    if repair is not None:
        _show_moves(repair)
    _show_scan(run)


def _show_moves(repair: RepairFolder) -> None:
    grid = moves_grid(
        repair.info,
        lambda before, after: address.link("images", case_before=before, case_after=after),
    )
    st.html(part("section", "Cases before and after the repair", "A cell opens its images."))
    if grid is None:
        st.html(part("banner", "open", "This repair has not judged any maps before and after."))
        return
    st.html(part("case_table", grid))
    told = after_sentences(repair.info)
    if told:
        st.html(part("section", "Beyond accuracy", " ".join(told)))


def _show_scan(run: Run) -> None:
    section = cases_section(run.info, aliases(run))
    if section is None:
        st.html(part("section", "Cases of the scan"))
        st.html(part("banner", "open", "This scan has not judged its maps, so there are no cases."))
        return
    st.html(part("section", section["title"], section["caption"]))
    if section["caution"]:
        st.html(part("banner", "open", section["caution_title"], [section["caution"]]))
    grid = scan_grid(run.info, lambda case: address.link("images", case=case))
    if grid is not None:
        st.html(part("case_table", grid))
        st.html(part("figures", section["figures"]))
    if section["rows"]:
        st.html(part("section", section["rows_title"], section["rows_note"]))
        st.html(part("table", section["rows"], NUMBERS))
    st.html(part("pairs", section["facts"]))


main()
