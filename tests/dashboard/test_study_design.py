"""Who is asked what: balanced by design, the same on another day, blind to the truth."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboard.study.design import (
    TASKS,
    StudyDesign,
    answer_meaning,
    failed_checks_allowed,
    questions,
)
from tests.dashboard.study_material import design, side_of

FIXED = [
    *(("trust", 1, "before"), ("trust", 0, "after"), ("trust", 2, "after"), ("trust", 3, "before")),
    *(("prefer", 1, "before"), ("prefer", 3, "after"), ("prefer", 2, "after")),
    *(("prefer", 0, "before"), ("prefer", 4, "after")),
    *(("accurate", 3, "after"), ("accurate", 0, "after"), ("accurate", 2, "before")),
    ("accurate", 1, "before"),
]


@settings(max_examples=25, deadline=None)
@given(items=st.integers(2, 12), checks=st.integers(0, 4), pairs=st.integers(1, 6), data=st.data())
def test_full_pairs_see_every_item_equally_often_on_both_sides(items, checks, pairs, data) -> None:  # type: ignore[no-untyped-def]
    plan = design(items, checks, per_rater=data.draw(st.integers(1, items)), seed=pairs)
    asked = [question for rater in range(2 * pairs) for question in questions(plan, rater)]
    for task in TASKS:
        sides = {"before": Counter(), "after": Counter()}
        for question in asked:
            if question.task == task:
                sides[question.left or question.shown][question.item.number] += 1
        assert sides["before"] == sides["after"]
        shown = [sides["after"][item.number] for item in plan.judged]
        assert max(shown) - min(shown) <= 1
        assert sum(shown) == pairs * plan.per_rater


def test_one_rater_is_asked_everything_once_and_trust_first() -> None:
    plan = design(9, 3)
    for rater in range(4):
        asked = questions(plan, rater)
        assert len(asked) == plan.votes_per_rater == 30
        assert len({(question.task, question.item.number) for question in asked}) == 30
        tasks = [question.task for question in asked]
        assert tasks == sorted(tasks, key=TASKS.index)
        for task in TASKS:
            placed = Counter(q.left or q.shown for q in asked if q.task == task)
            assert abs(placed["before"] - placed["after"]) <= 2


def test_checks_stand_apart_and_never_first() -> None:
    plan = design(12, 3)
    for rater in range(20):
        prefer = [q for q in questions(plan, rater) if q.task == "prefer"]
        places = [place for place, q in enumerate(prefer) if q.item.check]
        assert len(places) == 3 and places[0] > 0
        assert all(question.item.check is None for question in questions(plan, rater)[:12])


def test_questions_are_those_of_the_day_before() -> None:
    """Written down once: an upgrade that changes them would change a study under way."""
    asked = questions(design(4, 1), 2)
    assert [(q.task, q.item.number, q.left or q.shown) for q in asked] == FIXED
    assert questions(design(4, 1, seed=1), 2) != asked


def test_raters_see_different_orders_and_seeds_differ() -> None:
    orders = {
        tuple(question.item.number for question in questions(design(10), rater)[:10])
        for rater in range(10)
    }
    assert len(orders) == 10


def test_a_design_survives_its_record() -> None:
    import json

    plan = design(5, 2)
    assert StudyDesign.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_answers_are_freed_of_their_sides() -> None:
    for question in (q for rater in range(2) for q in questions(design(6, 2), rater)):
        if question.task != "prefer":
            assert answer_meaning(question, "yes") == "yes"
            continue
        real, other = ("real", "decoy") if question.item.check else ("after", "before")
        assert answer_meaning(question, side_of(question, "after")) == real
        assert answer_meaning(question, side_of(question, "before")) == other
        assert answer_meaning(question, "same") == "same"
        with pytest.raises(ValueError, match="'yes'"):
            answer_meaning(question, "yes")


def test_a_third_of_the_checks_may_fail() -> None:
    assert [failed_checks_allowed(n) for n in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_impossible_designs_are_refused() -> None:
    plan = design(4, 1)
    for change in ({"per_rater": 5}, {"per_rater": 0}, {"tasks": ("trust",)}):
        with pytest.raises(ValueError):
            StudyDesign(**{**vars(plan), **change})
    with pytest.raises(ValueError, match="numbered"):
        StudyDesign(**{**vars(plan), "items": plan.items[1:]})
