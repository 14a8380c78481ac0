"""Cases 1 to 4: who gets which, by which source, and their table."""

from __future__ import annotations

import subprocess
import sys

import pytest
from scipy.stats import binomtest

from audit.cases import (
    assign_cases,
    by_masks,
    by_proxy,
    by_votes,
    case_table,
    vote_share,
)

NAN = float("nan")


def test_cases_are_those_of_the_papers_figure_2() -> None:
    right = [True, False, True, False, True]
    accurate = [True, True, False, False, None]
    assert assign_cases(right, accurate) == [1, 2, 3, 4, None]


def test_masks_ask_for_a_share_of_the_energy_inside() -> None:
    found = by_masks([0.5, 0.499, 1.0, 0.0, NAN], 0.5)
    assert found.source == "masks" and found.threshold == 0.5
    assert found.accurate == (True, False, True, False, None)
    assert "50%" in found.rule
    assert by_masks([0.5, 0.8], 0.75).accurate == (False, True)


def test_the_proxy_calls_itself_one() -> None:
    found = by_proxy([0.99, 0.2, NAN], 0.99)
    assert found.accurate == (True, False, None)
    assert found.source == "proxy" and found.rule.startswith("Proxy:")


@pytest.mark.parametrize("score", [0.3, 1.0])
def test_a_proxy_that_tells_nothing_apart_gives_no_cases_and_says_so(score: float) -> None:
    found = by_proxy([score] * 60, 0.99)
    assert set(found.accurate) == {None}
    assert f"{60 if score == 1 else 0} of 60 maps reach its threshold" in found.note
    mixed = by_proxy([score] * 57 + [0.3, 1.0, 1.0], 0.99)
    assert None not in mixed.accurate and mixed.note == ""
    assert None not in by_proxy([score] * 10, 0.99).accurate  # too few to say


def test_the_majority_of_votes_decides_and_ties_do_not() -> None:
    votes = {"a": [True, True, False], "b": [False], "c": [True, False], "d": []}
    found = by_votes(["a", "b", "c", "d", "e"], votes)
    assert found.source == "votes"
    assert found.accurate == (True, False, None, None, None)


def test_votes_have_wilsons_interval() -> None:
    share = vote_share([True, True, False, True])
    ends = binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert (share.value, share.low, share.high) == pytest.approx((0.75, ends.low, ends.high))


def test_the_table_has_every_case_over_all_images_and_class_by_class() -> None:
    cases = [1, 1, 3, 4, None, 2, 1, None]
    names = ["cat", "cat", "cat", "dog", "dog", "dog", "dog", "cow"]
    table = case_table(cases, names)
    assert [row["class"] for row in table] == [None, "cat", "dog", "cow"]
    assert [(row["n"], row["without"]) for row in table] == [(6, 2), (3, 0), (3, 1), (0, 1)]
    counts = [[row[f"case{case}"]["count"] for case in (1, 2, 3, 4)] for row in table]
    assert counts == [[3, 1, 1, 1], [2, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    for row in table[:3]:
        assert sum(row[f"case{case}"]["value"] for case in (1, 2, 3, 4)) == pytest.approx(1)
        for case in (1, 2, 3, 4):
            share = row[f"case{case}"]
            ends = binomtest(share["count"], row["n"]).proportion_ci(0.95, method="wilson")
            assert (share["low"], share["high"]) == pytest.approx((ends.low, ends.high))


def test_cases_and_classes_of_different_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 cases for 2 images"):
        case_table([1], ["a", "b"])


def test_cases_need_no_torch() -> None:
    check = "import sys, audit.cases, audit.cases_section; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
