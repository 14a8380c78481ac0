"""What a rater sees: three questions about themselves, then one question after another.

Opened by a rater's link only, blind to which map is which, and without a way to anything else. An
answer is acknowledged, by the next question, once it is committed; who stops finds the place again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from audit.console import say
from audit.errors import RunError
from audit.record_shapes import reading
from audit.rendering import page, part
from audit.runs import RepairFolder, Run, open_repair
from dashboard.cli import RUNS_VARIABLE
from dashboard.rater_links import rater_of_link
from dashboard.study.design import ANSWERS, BACKGROUND, LEVELS, Question, Task, questions
from dashboard.study.material import pictures
from dashboard.study.store import Rater, Study, VoteStore, find_study
from dashboard.study.tables import question_text

_PLACE, _SINCE, _BACK, _PROBLEM = (f"layermend_study_{n}" for n in ("place", "since", "back", "no"))


def main() -> None:
    link = rater_of_link()
    if link is None:
        _say("This address is for raters.", "Open the whole link that you were sent.")
        return
    try:
        with reading(Path(os.environ.get(RUNS_VARIABLE, "runs"))):
            _show_study(*link)
    except RunError as error:
        # The reason may name folders, which are not for raters.
        say(f"study: {error}")
        _say("The study cannot be shown just now.", "Your answers are kept; try again later.")


def _show_study(study_id: str, token: str) -> None:
    found = _found(study_id)
    rater = found[1].rater(study_id, token) if found else None
    if found is None or rater is None:
        _say("This link is not valid.", "Ask who sent it for a new one.")
        return
    run, store, study = found
    if rater.background is None:
        _ask_background(store, study, rater)
    else:
        _ask(open_repair(run.path / "repairs" / Path(study.repair).name), store, study, rater)


def _found(study_id: str) -> tuple[Run, VoteStore, Study] | None:
    """Return the study; once found, its place is remembered for the visit."""
    place = st.session_state.get(_PLACE)
    root = Path(os.environ.get(RUNS_VARIABLE, "runs"))
    if place and place[0] == study_id:
        found = find_study(place[1], study_id)
        if found:
            return found
    found = find_study(root, study_id)
    if found:
        st.session_state[_PLACE] = (study_id, found[0].path)
    return found


def _ask_background(store: VoteStore, study: Study, rater: Rater) -> None:
    n = study.design.votes_per_rater
    note = (
        f"Then {n} questions about images. You can stop at any time and come back by the same "
        "link; what you answered stays."
    )
    st.html(part("headline", study.title, "First, three questions about yourself.", [note]))
    with st.form("background", border=False):
        levels = {
            name: st.radio(question, LEVELS, index=None, horizontal=True, key=name)
            for name, question in BACKGROUND.items()
        }
        sent = st.form_submit_button("Start", type="primary", shortcut="Ctrl+Enter")
    if not sent:
        return
    if None in levels.values():
        st.html(part("banner", "open", "Please answer all three."))
        return
    told = {name: LEVELS.index(level) for name, level in levels.items() if level is not None}
    store.save_background(rater, told)
    st.rerun()


def _ask(repair: RepairFolder, store: VoteStore, study: Study, rater: Rater) -> None:
    asked = questions(study.design, rater.number)
    given = {(vote.task, vote.item) for vote in store.votes(study.id, rater.number)}
    done = sum((question.task, question.item.number) in given for question in asked)
    back = st.session_state.get(_BACK)
    place = back if back is not None else _first_open(asked, given)
    st.progress(done / len(asked), text=f"{done} of {len(asked)} answered")
    if problem := st.session_state.pop(_PROBLEM, None):
        st.html(part("banner", "bad", problem))
    if place is None:
        note = "Every answer is kept. You can close this page."
        st.html(part("headline", study.title, "Thank you, that was all.", [note]))
        _offer_back(len(asked))
        return
    question = asked[place]
    _show(repair, question)
    _note_time(place)
    with st.container(horizontal=True):
        for key, (answer, label) in enumerate(ANSWERS[question.task].items(), start=1):
            st.button(
                label,
                key=f"answer-{place}-{answer}",
                shortcut=str(key),
                on_click=_answer,
                args=(store, rater, question, answer, back is not None),
            )
    _offer_back(place)


def _show(repair: RepairFolder, question: Question) -> None:
    told, sentence = question_text(question)
    shown = pictures(repair, question)
    st.html(page("study_question.html", question=sentence, told=told, pictures=shown))
    st.html(part("map_legend", False))


def _answer(store: VoteStore, rater: Rater, question: Question, answer: str, revise: bool) -> None:
    since = st.session_state.get(_SINCE)
    seconds = None if since is None or revise else round(time.time() - since[1], 2)
    try:
        store.record(rater, question, answer, seconds=seconds, revise=revise)
    except RunError as error:
        say(f"study: {error}")
        st.session_state[_PROBLEM] = "Your last answer could not be kept. Please give it again."
    else:
        st.session_state[_BACK] = None


def _offer_back(place: int) -> None:
    if place > 0 and st.session_state.get(_BACK) is None:
        st.button(
            "Change the last answer",
            key=f"back-{place}",
            type="tertiary",
            on_click=lambda: st.session_state.update({_BACK: place - 1}),
        )


def _first_open(asked: Sequence[Question], given: set[tuple[Task, int]]) -> int | None:
    for place, question in enumerate(asked):
        if (question.task, question.item.number) not in given:
            return place
    return None


def _note_time(place: int) -> None:
    since = st.session_state.get(_SINCE)
    if since is None or since[0] != place:
        st.session_state[_SINCE] = (place, time.time())


def _say(sentence: str, more: str) -> None:
    st.html(part("headline", "", sentence, [more]))


main()
