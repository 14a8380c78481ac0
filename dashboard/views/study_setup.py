"""Set up a study of the chosen repair, hand out its links, and see how far the raters are."""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Sequence

import streamlit as st

from audit.rendering import part
from audit.runs import RepairFolder, Run
from audit.wording import count, moment
from dashboard.cli import read_only
from dashboard.rater_links import rater_link, this_address
from dashboard.selection import problems_shown, selected
from dashboard.study.design import TASKS, StudyDesign, Task
from dashboard.study.material import items_of
from dashboard.study.store import Study, VoteStore, store_of
from dashboard.study.tables import TASK_NAMES

MOST_RATERS, MOST_CHECKS = 200, 6
SECONDS_A_VOTE = 6
FIELD_WIDTH = 220
_LINKS = "layermend_study_links"


def main() -> None:
    run, repair = selected()
    st.html(part("section", "Study", "Let people judge the maps before and after this repair, "
                 "without knowing which is which."))  # fmt: skip
    with problems_shown():
        store = store_of(run)
        _show_links()
        if repair is None:
            st.html(part("banner", "open", "Nothing to vote on: this run has no repair yet."))
        else:
            _offer_study(run, repair)
        if store is not None:
            for study in store.studies(run.name):
                _show_study(store, study)


def _offer_study(run: Run, repair: RepairFolder) -> None:
    available = len(repair.gallery["images"])
    if not items_of(repair, available, 0, seed=0):  # raises where there are no maps
        return
    with st.expander("Set up a study", expanded=store_of(run) is None):
        title = st.text_input("Title, as raters see it", "Where does the network look?")
        with st.container(horizontal=True):
            images = int(
                st.number_input("Images", 1, available, available, width=FIELD_WIDTH, key="images")
            )
            raters = int(st.number_input("Raters", 1, MOST_RATERS, 4, width=FIELD_WIDTH))
            checks = int(
                st.number_input(
                    "Attention checks",
                    0,
                    MOST_CHECKS,
                    3,
                    width=FIELD_WIDTH,
                    help="Pairs of which one side plainly highlights nothing. Raters who fail more "
                    "than a third of them are left out of the pooled tables.",
                )
            )
        tasks = _pick_tasks()
        votes = len(tasks) * images + checks
        minutes = max(1, round(votes * SECONDS_A_VOTE / 60))
        st.caption(f"Each rater answers {count(votes, 'questions')}: about {minutes} min.")
        if raters % 2:
            st.caption(
                "Sides are mirrored between two raters: an even number of them balances fully."
            )
        if st.button("Set up the study", type="primary", disabled=read_only()):
            seed = secrets.randbelow(2**31)
            design = StudyDesign(
                seed=seed,
                tasks=tasks,
                items=items_of(repair, images, checks, seed),
                per_rater=images,
            )
            store = store_of(run, create=True)
            assert store is not None  # made just now
            study, tokens = store.create_study(
                run=run.name,
                repair=repair.name,
                title=title.strip() or "Study",
                design=design,
                raters=raters,
            )
            _keep_links(study, list(enumerate(tokens)))


def _pick_tasks() -> tuple[Task, ...]:
    optional: dict[Task, str] = {
        "trust": "Ask whether the network is right, too: trust should follow correctness",
        "accurate": "Ask whether the map lies on the object, too: decides the cases by votes",
    }
    st.caption("Raters are asked which of two images best highlights the true class.")
    chosen = {task for task, label in optional.items() if st.checkbox(label, value=True, key=task)}
    return tuple(task for task in TASKS if task == "prefer" or task in chosen)


def _show_study(store: VoteStore, study: Study) -> None:
    raters, votes = store.raters(study.id), store.votes(study.id)
    expected = len(raters) * study.design.votes_per_rater
    tasks = [TASK_NAMES[task] for task in study.design.tasks]
    st.html(part("section", study.title, f"Set up {moment(study.created_utc)} for {study.repair}."))
    st.html(
        part(
            "pairs",
            [
                ("Questions", " ".join(tasks)),
                ("Images", count(len(study.design.judged))),
                ("Raters who have begun", f"{len({v.rater for v in votes})} of {len(raters)}"),
                ("Votes", f"{count(len(votes))} of {count(expected)}"),
                ("Kept in", store.place if not store.place.startswith("sqlite") else "this run"),
            ],
        )
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        lost = st.selectbox(
            "A rater lost the link",
            [rater.number for rater in raters],
            index=None,
            placeholder="Rater",
            format_func=lambda number: f"Rater {number + 1}",
            width=FIELD_WIDTH,
            key=f"lost-{study.id}",
        )
        idle = lost is None or read_only()
        if st.button("New link", disabled=idle, key=f"new-{study.id}") and lost is not None:
            _keep_links(study, [(lost, store.new_token(study.id, lost))])
        if st.button("Two more raters", disabled=read_only(), key=f"more-{study.id}"):
            _keep_links(study, store.add_raters(study.id, 2))


def _keep_links(study: Study, tokens: Sequence[tuple[int, str]]) -> None:
    """Remember links for this visit: the store has no more than a hash of their tokens."""
    st.session_state[_LINKS] = (study, list(tokens))
    st.rerun()


def _show_links() -> None:
    if _LINKS not in st.session_state:
        return
    study, tokens = st.session_state[_LINKS]
    address = this_address()
    links = [(number + 1, rater_link(address, study.id, token)) for number, token in tokens]
    notes = ["Copy them now: they are shown once, and only a fingerprint of each is kept."]
    if "//localhost" in address or "//127." in address:
        notes.append(
            "They open on this machine only. For others, run `dashboard --host ADDRESS "
            "--study-only`, which shows them the study and nothing else."
        )
    st.html(part("banner", "good", f"One link for each rater of {study.title}", notes))
    st.code("\n".join(f"Rater {number}: {link}" for number, link in links), language=None)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("rater", "link"), *links])
    with st.container(horizontal=True):
        st.download_button(
            "Links, CSV", text.getvalue(), file_name="links.csv", mime="text/csv", on_click="ignore"
        )
        if st.button("Done"):
            del st.session_state[_LINKS]
            st.rerun()


main()
