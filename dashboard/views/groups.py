"""Errors that share something: which images fail alike, and where the network looked."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from audit.group_cards import GroupCard, group_cards, groups_note
from audit.rendering import part
from audit.runs import Run
from dashboard import address
from dashboard.selection import folder_state, problems_shown, selected


def main() -> None:
    run, _ = selected()
    with problems_shown():
        note = groups_note(run.groups)
        st.html(part("section", "Errors that share something", note))
        if not note:
            st.html(part("banner", "open", "No error groups were sought in this scan yet."))
            return
        cards = _cards(run, folder_state(run.path, run.path / "maps"))
        if not cards:
            st.html(part("banner", "open", "No group of errors beats chance."))
            return
        st.html(part("map_legend"))
        linked = [replace(one, href=address.link("images", group=one.id)) for one in cards]
        st.html(part("groups", linked))


@st.cache_resource(max_entries=4, show_spinner=False)
def _cards(_run: Run, state: tuple[tuple[str, int, int], ...]) -> list[GroupCard]:
    return group_cards(_run)


main()
