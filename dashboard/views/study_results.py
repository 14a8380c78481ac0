"""What the raters said: preferences by case, trust, agreement, background; and cases by votes."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from audit.errors import RunError
from audit.rendering import part
from audit.runs import Run, open_repair
from audit.wording import count, moment, percent
from dashboard.cli import read_only
from dashboard.selection import problems_shown, selected
from dashboard.study.material import write_cases_by_votes
from dashboard.study.results import (
    agreement,
    background_effects,
    cases_of,
    flagged,
    preferences,
    preferences_by_rater,
    side_balance,
    summaries,
    trust,
    votes_csv,
)
from dashboard.study.store import Rater, Study, Vote, VoteStore, store_of
from dashboard.study.tables import (
    FEW_RATERS,
    agreement_rows,
    background_rows,
    headline,
    preference_rows,
    rater_rows,
    trust_rows,
)


def main() -> None:
    run, _ = selected()
    with problems_shown():
        store = store_of(run)
        studies = store.studies(run.name) if store else []
        if store is None or not studies:
            st.html(part("section", "Votes"))
            sentence = "No study in this run yet; set one up on the page Study."
            st.html(part("banner", "open", sentence))
            return
        _show_study(run, store, _pick(studies))


def _pick(studies: list[Study]) -> Study:
    names = {study.id: f"{study.title}, {moment(study.created_utc)}" for study in studies}
    if len(studies) == 1:
        return studies[0]
    # Equal labels would be one choice.
    labels = {
        key: name if [*names.values()].count(name) == 1 else f"{name} ({key})"
        for key, name in names.items()
    }
    chosen = st.selectbox("Study", list(labels), format_func=lambda key: labels[key])
    return next((study for study in studies if study.id == chosen), studies[0])


def _show_study(run: Run, store: VoteStore, study: Study) -> None:
    votes, raters = store.votes(study.id), store.raters(study.id)
    out = flagged(study.design, votes)
    without = _left_out(out)
    counted = [vote for vote in votes if vote.rater not in without]
    by_votes = _case_source(study, counted)
    cases = cases_of(study.design, counted if by_votes else ())
    source = "by these votes" if by_votes else "as the repair recorded them"
    table = preferences(study.design, votes, cases, without)
    alone = preferences_by_rater(study.design, votes)
    people = len({vote.rater for vote in counted})
    st.html(
        part(
            "headline",
            f"{study.title}, {count(len(counted), 'votes')} of {count(people, 'raters')}",
            headline(table),
            _notes(study, out, without, people),
        )
    )
    if not votes:
        return
    st.html(
        part(
            "section",
            "Which map is preferred",
            "Share of votes in each case (Table 3), in percent with 95 % intervals: the wider of a "
            f"bootstrap over raters and Wilson's. Cases {source}.",
        )
    )
    rater = _pick_rater([row["rater"] for row in alone])
    if rater is not None:
        own = [vote for vote in votes if vote.rater == rater]
        table = preferences(study.design, own, cases)
    _table(preference_rows(table))
    _show_trust(study, votes, without)
    _show_reliability(study, raters, votes, without)
    st.html(part("section", "Rater by rater", "Wilson intervals. Everyone, left out or not."))
    _table(rater_rows(summaries(study.design, raters, votes), alone))
    _offer_csv(study, raters, votes)
    if "accurate" in study.design.tasks:
        _offer_cases(run, study, votes, without)


def _left_out(out: set[int]) -> set[int]:
    if not out:
        return set()
    keep = st.checkbox(f"Count {count(len(out), 'raters')} who failed the attention checks too")
    return set() if keep else out


def _pick_rater(raters: list[int]) -> int | None:
    """Return the rater whose votes alone are to be shown, None for all together."""
    return st.selectbox(
        "Votes of",
        [None, *raters],
        format_func=lambda rater: "All raters" if rater is None else f"Rater {rater + 1}",
        width=220,
    )


def _case_source(study: Study, votes: list[Vote]) -> bool:
    if not any(vote.task == "accurate" for vote in votes):
        return False
    sources = {"repair": "As recorded", "votes": "By these votes"}
    chosen = st.segmented_control(
        "Cases", list(sources), default="repair", format_func=lambda key: sources[key]
    )
    return chosen == "votes"


def _notes(study: Study, out: set[int], without: set[int], people: int) -> list[str]:
    notes = []
    if out:
        names = ", ".join(str(number + 1) for number in sorted(out))
        what = "are left out" if without else "are counted all the same"
        notes.append(f"Failed more than a third of their attention checks and {what}: {names}.")
    if 0 < people < FEW_RATERS:
        notes.append("With so few raters the intervals are narrower than they should be.")
    if not study.design.checks:
        notes.append("This study has no attention checks.")
    return notes


def _show_trust(study: Study, votes: list[Vote], without: set[int]) -> None:
    rows = trust(study.design, votes, without)
    if not any(row[outcome]["votes"] for row in rows for outcome in ("right", "wrong")):
        return
    note = (
        "Trust should follow correctness: yes where the network is right, no where it is wrong. "
        "Raters saw the map of the true class and were not told which class is true."
    )
    st.html(part("section", "Whom raters trust", note))
    _table(trust_rows(rows))


def _show_reliability(
    study: Study, raters: list[Rater], votes: list[Vote], without: set[int]
) -> None:
    found = agreement(study.design, votes, without)
    if found:
        note = "1 is full agreement, 0 is what chance gives. Intervals by a bootstrap over items."
        st.html(part("section", "Do raters agree", note))
        _table(agreement_rows(found))
    st.html(
        part(
            "section",
            "Does background matter",
            "Experience against a rater's preference for the map after, by rank; permutation test.",
        )
    )
    _table(background_rows(background_effects(study.design, raters, votes, without)))
    balance = side_balance(study.design, votes)
    if balance["votes"]:
        st.caption(
            f"The map after stood on the left in {balance['left']} of {balance['votes']} pairs "
            f"({percent(balance['value'])}); no image leans to a side by more than "
            f"{balance['largest']}."
        )


def _offer_csv(study: Study, raters: list[Rater], votes: list[Vote]) -> None:
    st.download_button(
        "All votes, CSV",
        votes_csv(study.design, raters, votes),
        file_name=f"votes-{study.id}.csv",
        mime="text/csv",
        on_click="ignore",
    )


def _offer_cases(run: Run, study: Study, votes: list[Vote], without: set[int]) -> None:
    st.html(
        part(
            "section",
            "Cases by votes",
            "Lets these votes say which maps are accurate, in the repair's record and tables. What "
            "was measured stays beside it; images nobody voted on have no case then.",
        )
    )
    if st.button("Decide the cases by these votes", disabled=read_only()):
        try:
            repair = open_repair(run.path / "repairs" / Path(study.repair).name)
            written = write_cases_by_votes(repair, study, votes, without)
        except RunError as error:
            st.html(part("banner", "bad", "The cases were not changed.", [str(error)]))
        else:
            sentence = f"The cases of {count(written['images'], 'images')} are now by votes."
            st.html(part("banner", "good", sentence))


def _table(rows: list[dict[str, str]]) -> None:
    numeric = [name for name in rows[0] if name != next(iter(rows[0]))] if rows else []
    if rows:
        st.html(part("table", rows, numeric))


main()
