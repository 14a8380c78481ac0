"""The tables of a study, against other packages, worked examples and plain loops."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from scipy import stats

from audit.after_section import after_sentences, case_moves
from audit.cases import by_votes
from audit.errors import RunError
from audit.runs import open_repair
from audit.statistics import wilson
from dashboard.study.agreement import (
    difference_over_raters,
    krippendorff_alpha,
    rank_association,
    share_over_raters,
)
from dashboard.study.design import BACKGROUND, Question, StudyDesign
from dashboard.study.material import accuracy_votes, items_of, pictures, write_cases_by_votes
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
from dashboard.study.store import Rater, Study, Vote
from tests.dashboard.study_material import build_repaired_run, design, side_of, votes_of

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: four observers,
# twelve units, missing data; his alpha for nominal data is 0.743.
EXAMPLE = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)


def test_alpha_is_that_of_krippendorffs_own_example() -> None:
    units = [
        {rater: str(row[unit]) for rater, row in enumerate(EXAMPLE) if row[unit] is not None}
        for unit in range(12)
    ]
    found = krippendorff_alpha(units, seed=0)
    assert found.value == pytest.approx(0.743, abs=5e-4)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("seed", range(6))
def test_alpha_equals_another_implementation(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 4, (5, 15)).astype(float)
    values[:, : seed + 4] = values[0, : seed + 4]  # some that all agree on
    values[generator.random(values.shape) < 0.3] = np.nan
    units = [
        {r: str(values[r, u]) for r in range(5) if not np.isnan(values[r, u])} for u in range(15)
    ]
    theirs = krippendorff.alpha(reliability_data=values, level_of_measurement="nominal")
    assert krippendorff_alpha(units, seed=0).value == pytest.approx(theirs, abs=1e-12)


def test_alpha_says_nothing_where_there_is_nothing_to_compare() -> None:
    for units in ([], [{0: "a"}, {1: "b"}], [{0: "a", 1: "a"}, {0: "a", 1: "a"}]):
        assert math.isnan(krippendorff_alpha(units, seed=0).value)


@pytest.mark.parametrize("n", [5, 6])
def test_the_exact_test_of_background_is_scipys(n: int) -> None:
    generator = np.random.default_rng(n)
    levels, scores = generator.integers(0, 4, n), generator.normal(size=n).round(1)
    found = rank_association(levels, scores, seed=0)
    theirs = stats.permutation_test(
        (levels,),
        lambda drawn: stats.spearmanr(drawn, scores).statistic,
        permutation_type="pairings",
        n_resamples=np.inf,
        vectorized=False,
    )
    assert found.exact
    assert found.rho == pytest.approx(theirs.statistic, abs=1e-12)
    # scipy doubles the smaller tail; ours counts both, so scipy's null gives our p.
    farther = np.abs(theirs.null_distribution) >= abs(theirs.statistic) - 1e-12
    assert found.p_value == pytest.approx(farther.mean(), abs=1e-12)


def test_a_drawn_test_of_background_is_near_the_asymptotic_one() -> None:
    generator = np.random.default_rng(1)
    levels = generator.integers(0, 4, 60)
    scores = 0.08 * levels + generator.normal(0, 0.4, 60)
    found = rank_association(levels, scores, seed=0)
    theirs = stats.spearmanr(levels, scores)
    assert not found.exact and found.rho == pytest.approx(theirs.statistic, abs=1e-12)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=0.25)


def test_background_that_does_not_vary_has_no_effect() -> None:
    found = rank_association([2, 2, 2], [0.1, 0.4, -0.3], seed=0)
    assert math.isnan(found.rho) and found.p_value == 1.0


def test_intervals_over_raters_see_that_raters_differ() -> None:
    hits, votes = [20, 19, 0, 1, 18, 2], [20] * 6
    found = share_over_raters(hits, votes, seed=0)
    independent = wilson(60, 120)
    assert found.value == independent.value == 0.5
    assert found.low < independent.low - 0.1 and found.high > independent.high + 0.1
    means = [np.mean(row) for row in np.random.default_rng(9).choice(hits, (20_000, 6)) / 20]
    # Hesterberg 2015: percentiles of the bootstrap, expanded for six raters.
    tail = stats.norm.sf(np.sqrt(6 / 5) * stats.t.isf(0.025, 5))
    low, high = np.quantile(means, [tail, 1 - tail])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)


def test_raters_of_one_mind_do_not_make_a_share_certain() -> None:
    assert share_over_raters([8, 8], [8, 8], seed=0) == wilson(16, 16)
    assert share_over_raters([3], [8], seed=0) == wilson(3, 8)
    assert math.isnan(share_over_raters([], [], seed=0).value)


def test_a_difference_has_its_sign_and_holds_its_value() -> None:
    found = difference_over_raters(([6, 8, 7], [1, 0, 2]), ([10] * 3, [10] * 3), seed=0)
    assert found.value == pytest.approx(0.6) and 0 < found.low <= 0.6 <= found.high
    assert math.isnan(difference_over_raters(([6], [1]), ([10], [10]), seed=0).low)


# --- a study whose raters vote by rule ------------------------------------------------------------


def _rule(rater: Rater, question: Question) -> str:
    """Rater 3 sleeps; the others see through the checks and mostly prefer the map after."""
    number = question.item.number
    if question.task == "prefer":
        if rater.number == 3:
            return side_of(question, "before")
        if question.item.check or (number + rater.number) % 3:
            return side_of(question, "after")
        return ("same", "cant", side_of(question, "before"))[number % 3]
    if question.task == "trust":
        right = question.item.right_after if question.shown == "after" else False
        return "yes" if right or number == 0 else ("no", "cant")[rater.number % 2]
    return "yes" if question.shown == "after" and number % 4 else ("no", "cant")[number % 2]


@dataclass(frozen=True)
class _Voted:
    plan: StudyDesign
    raters: list[Rater]
    votes: list[Vote]


@pytest.fixture(scope="module")
def voted() -> _Voted:
    """Six raters, the last of whom has said nothing about their background."""
    raters = [
        Rater(
            study="study",
            number=number,
            background=dict(zip(BACKGROUND, (number % 4, 3 - number % 2, 1), strict=True))
            if number < 5
            else None,
        )
        for number in range(6)
    ]
    plan = design(10, 3)
    return _Voted(plan, raters, votes_of(raters, _rule, plan))


def test_who_sleeps_is_flagged_and_left_out(voted: _Voted) -> None:
    plan, raters, votes = voted.plan, voted.raters, voted.votes
    assert flagged(plan, votes) == {3}
    told = summaries(plan, raters, votes)
    assert [one.flagged for one in told] == [False, False, False, True, False, False]
    assert [one.failed for one in told] == [0, 0, 0, 3, 0, 0]
    assert all(one.answered == one.asked == 33 and one.seconds == 1.5 for one in told)


def test_table_3_counts_what_was_voted(voted: _Voted) -> None:
    plan, votes = voted.plan, voted.votes
    rows = preferences(plan, votes, cases_of(plan), without={3})
    expected: dict[int, Counter[str]] = {}
    for rater in (0, 1, 2, 4, 5):
        for item in plan.judged:
            answer = ("after", "same", "cant", "before")
            n = 0 if (item.number + rater) % 3 else 1 + item.number % 3
            case = item.case_before or 0
            expected.setdefault(case, Counter())[answer[n]] += 1
    assert [row["case"] for row in rows] == [None, 1, 2, 3, 4, 0]
    for row in rows[1:]:
        counted = {a: row[a]["count"] for a in ("before", "after", "same", "cant")}
        assert {a: n for a, n in counted.items() if n} == dict(expected[row["case"]])
        assert row["votes"] == sum(counted.values()) == 10 and row["items"] == 2
    whole = sum(expected.values(), Counter())
    assert rows[0]["votes"] == 50 and rows[0]["raters"] == 5
    assert rows[0]["after"]["value"] == whole["after"] / 50
    assert rows[0]["difference"]["value"] == pytest.approx((whole["after"] - whole["before"]) / 50)
    everybody = preferences(plan, votes, cases_of(plan))[0]
    assert everybody["votes"] == 60 and everybody["before"]["count"] == whole["before"] + 10
    alone = preferences_by_rater(plan, votes)
    assert [row["rater"] for row in alone] == [0, 1, 2, 3, 4, 5]
    assert alone[3]["before"]["value"] == 1.0 and alone[3]["before"]["low"] == wilson(10, 10).low


def test_trust_is_split_by_side_and_by_what_was_right(voted: _Voted) -> None:
    plan, votes = voted.plan, voted.votes
    rows = {row["side"]: row for row in trust(plan, votes, without={3})}
    for side, row in rows.items():
        shown = [v for v in votes if v.task == "trust" and v.shown == side and v.rater != 3]
        for outcome in ("right", "wrong"):
            own = [
                vote.answer == "yes"
                for vote in shown
                if getattr(plan.items[vote.item], f"right_{side}") == (outcome == "right")
            ]
            assert (row[outcome]["count"], row[outcome]["votes"]) == (sum(own), len(own))
        gap = row["right"]["value"] - row["wrong"]["value"]
        assert row["gap"]["value"] == pytest.approx(gap)
    assert rows["after"]["right"]["value"] == 1.0 and rows["before"]["right"]["value"] == 0.0


def test_agreement_and_background_are_those_of_the_votes(voted: _Voted) -> None:
    plan, raters, votes = voted.plan, voted.raters, voted.votes
    codes = {"before": 0.0, "after": 1.0, "same": 2.0, "cant": 3.0}
    values = np.full((6, 10), np.nan)
    for vote in votes:
        if vote.task == "prefer" and vote.item < 10 and vote.rater != 3:
            values[vote.rater, vote.item] = codes[vote.answer]
    theirs = krippendorff.alpha(reliability_data=values, level_of_measurement="nominal")
    found = agreement(plan, votes, without={3})
    assert found["prefer"].value == pytest.approx(theirs)
    assert set(found) == {"trust", "prefer", "accurate"}

    effects = background_effects(plan, raters, votes, without={3})
    assert [row["question"] for row in effects] == list(BACKGROUND)
    told = [0, 1, 2, 4]  # rater 5 has not said anything
    scores = [(values[r] == 1).mean() - (values[r] == 0).mean() for r in told]
    expected = stats.spearmanr([r % 4 for r in told], scores).statistic
    assert effects[0]["raters"] == 4
    assert effects[0]["rho"] == pytest.approx(expected, nan_ok=True)
    smallest = min(row["p_value"] for row in effects)
    assert min(row["p_adjusted"] for row in effects) == pytest.approx(min(1.0, 3 * smallest))


def test_full_pairs_of_voters_saw_every_item_as_often_on_either_side(voted: _Voted) -> None:
    balance = side_balance(voted.plan, voted.votes)
    assert (balance["left"], balance["votes"], balance["largest"]) == (30, 60, 0)


def test_votes_on_maps_become_the_table_that_cases_take(voted: _Voted) -> None:
    plan, votes = voted.plan, voted.votes
    table = accuracy_votes(plan, votes, "after", without={3})
    assert set(table) == {item.path for item in plan.judged}
    accurate = by_votes([item.path for item in plan.judged], table).accurate
    assert [a for a in accurate if a is not None] == [
        bool(i.number % 4) for i in plan.judged if i.number % 4 or i.number % 2 == 0
    ]
    cases = cases_of(plan, votes, without={3})
    assert all(
        cases[i.number] == (3 if i.right_before else 4) for i in plan.judged if not i.number % 2
    )
    assert cases_of(plan) == {item.number: item.case_before for item in plan.judged}


def test_the_csv_has_every_vote_and_no_formula(voted: _Voted) -> None:
    votes = voted.votes
    hostile = {**vars(voted.plan.items[0]), "label_name": "=HYPERLINK(1)"}
    items = (type(voted.plan.items[0])(**hostile), *voted.plan.items[1:])
    plan = StudyDesign(**{**vars(voted.plan), "items": items})
    rows = list(csv.DictReader(io.StringIO(votes_csv(plan, voted.raters, votes))))
    assert len(rows) == len(votes) == 6 * 33
    assert {row["label"] for row in rows if row["item"] == "0"} == {"'=HYPERLINK(1)"}
    assert {row["flagged"] for row in rows if row["rater"] == "4"} == {"True"}
    assert {row["machine_learning"] for row in rows if row["rater"] == "2"} == {"A little"}
    assert [row["answer"] for row in rows] == [vote.answer for vote in votes]


# --- a study of a repair --------------------------------------------------------------------------


def test_items_are_the_repairs_images_with_their_cases(tmp_path: Path) -> None:
    _, repair = build_repaired_run(tmp_path)
    entries = repair.gallery["images"]
    items = items_of(repair, images=5, checks=3, seed=4)
    assert [item.check for item in items] == [None] * 5 + ["blank", "scrambled", "blank"]
    table = repair.images.set_index("path")
    for item in items[:5]:
        assert entries[item.image]["path"] == item.path
        assert table.loc[item.path, "right_after"] == item.right_after
        assert table.loc[item.path, "case_before"] == item.case_before
    assert len({item.path for item in items[:5]}) == 5
    kinds = Counter((bool(e["right"]), bool(e["right_after"])) for e in entries)
    drawn = Counter((item.right_before, item.right_after) for item in items[:5])
    assert all(drawn[kind] >= min(n, 1) for kind, n in kinds.items())
    assert all(item.right_after for item in items[5:])
    assert items_of(repair, images=5, checks=3, seed=5) != items


def test_pictures_follow_the_sides_and_decoys_show_nothing(tmp_path: Path) -> None:
    _, repair = build_repaired_run(tmp_path)
    items = items_of(repair, images=4, checks=2, seed=0)
    one, other = (Question(task="prefer", item=items[0], left=side) for side in ("before", "after"))
    shown, mirrored = pictures(repair, one), pictures(repair, other)
    assert [p.title for p in shown] == ["The original image", "Left", "Right"]
    assert shown[1].uri == mirrored[2].uri != shown[2].uri == mirrored[1].uri
    single = pictures(repair, Question(task="trust", item=items[0], shown="after"))
    assert [p.uri for p in single] == [shown[0].uri, shown[2].uri]
    for check in items[4:]:
        real, decoy = pictures(repair, Question(task="prefer", item=check, left="after"))[1:]
        assert real.uri != decoy.uri and check.path not in decoy.uri
    moved = type(items[0])(**{**vars(items[0]), "path": "elsewhere.png"})
    with pytest.raises(RunError, match="no longer there"):
        pictures(repair, Question(task="trust", item=moved, shown="after"))


def test_cases_by_votes_are_written_beside_the_measured_ones(tmp_path: Path) -> None:
    run, repair = build_repaired_run(tmp_path)
    before = repair.images
    items = items_of(repair, images=6, checks=2, seed=0)
    plan = StudyDesign(seed=0, tasks=("prefer", "accurate"), items=items, per_rater=6)
    study = Study(
        id="study", run=run.name, repair=repair.name, title="", created_utc="", design=plan
    )
    with pytest.raises(RunError, match="no map has a majority"):
        write_cases_by_votes(repair, study, [])
    raters = [Rater(study="study", number=number, background=None) for number in range(2)]
    votes = votes_of(raters, _says_after, plan)
    for _ in range(2):  # writing again must not take the votes for what was measured
        write_cases_by_votes(open_repair(repair.path), study, votes)
    written = open_repair(repair.path)
    table = np.zeros((4, 4), int)
    for item in items[:6]:
        table[2 + (not item.right_before), 0 + (not item.right_after)] += 1
    cases = written.info["cases"]
    assert cases["source"] == "votes" and cases["table"] == table.tolist()
    assert cases["images"] == 6 and cases["accurate"]["difference"]["value"] == 1.0
    assert written.info["cases_measured"] == repair.info["cases"]
    assert cases["insertion"] == {"kept": True}
    images = written.images
    for column in ("case_before", "case_after"):
        measured = images[f"{column}_measured"].tolist()
        assert measured == pytest.approx(before[column].tolist())
        known = images.set_index("path")[column].dropna()
        assert set(known.index) == {item.path for item in items[:6]}
    others = [name for name in before.columns if not name.startswith("case_")]
    assert images[others].equals(before[others])
    assert items_of(written, images=6, checks=2, seed=0) == items
    assert sum(int(cell) for row in case_moves(written.info) for cell in [*row.values()][1:]) == 6
    told = " ".join(after_sentences({"cases": {**cases, "insertion": None}}))
    assert "Accurate maps, by votes" in told


def _says_after(_: Rater, question: Question) -> str:
    if question.task == "prefer":
        return side_of(question, "after")
    return "yes" if question.shown == "after" else "no"


def test_intervals_over_raters_hold_the_truth_often_enough() -> None:
    generator, truth, held = np.random.default_rng(0), 0.6, 0
    for seed in range(60):
        leanings = generator.beta(4 * truth, 4 * (1 - truth), 8)
        found = share_over_raters(generator.binomial(20, leanings), [20] * 8, seed=seed)
        held += found.low <= truth <= found.high
    assert held >= stats.binom.ppf(0.01, 60, 0.93)
