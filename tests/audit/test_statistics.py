"""Intervals and tests against published figures, scipy, scikit-learn and slow loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from audit.statistics import (
    Interval,
    accuracy_difference,
    auroc,
    bootstrap_mean,
    calibration_error,
    classification_metrics,
    mcnemar,
    wilson,
)


def pair_loop_auroc(scores: np.ndarray, positives: np.ndarray) -> float:
    won = [
        1.0 if positive > negative else 0.5 if positive == negative else 0.0
        for positive in scores[positives]
        for negative in scores[~positives]
    ]
    return float(np.mean(won))


# Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction).
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_published_intervals(
    successes: int, n: int, low: float, high: float
) -> None:
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(n=st.integers(1, 5000), share=st.floats(0, 1), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(n: int, share: float, level: float) -> None:
    successes = round(share * n)
    interval = wilson(successes, n, level)
    expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_wilson_of_nothing_is_nan() -> None:
    assert all(math.isnan(number) for number in wilson(0, 0).as_dict().values())


def test_wilson_refuses_more_successes_than_images() -> None:
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_bootstrap_mean_equals_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=300)
    ours = bootstrap_mean(values, seed=1, resamples=20_000)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean(), rel=1e-15)
    # Two independent sets of resamples: their quantiles agree to a few hundredths of the width.
    width = reference.high - reference.low
    assert ours.low == pytest.approx(reference.low, abs=0.04 * width)
    assert ours.high == pytest.approx(reference.high, abs=0.04 * width)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        interval = bootstrap_mean(generator.normal(size=60), seed=seed, resamples=400)
        hits += interval.low <= 0 <= interval.high
    assert 0.89 <= hits / 300 <= 0.99


def test_bootstrap_is_decided_by_its_seed() -> None:
    values = np.random.default_rng(4).normal(size=50)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_bootstrap_does_not_depend_on_how_resamples_are_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(7)
    scores, positives = generator.normal(size=97), generator.random(97) < 0.4
    whole = bootstrap_mean(scores, seed=8), auroc(scores, positives, seed=8)
    monkeypatch.setattr("audit.statistics._DRAWS_AT_ONCE", 1000)
    assert (bootstrap_mean(scores, seed=8), auroc(scores, positives, seed=8)) == whole


def test_bootstrap_of_nothing_is_nan() -> None:
    assert math.isnan(bootstrap_mean([], seed=0).low)


# Agresti, Categorical Data Analysis, table 10.1: approval of the prime minister in two surveys; 86
# and 150 people changed their minds, z^2 is 17.36 there and its p-value 3.1e-5.
def test_mcnemar_gives_the_textbook_example() -> None:
    before = np.repeat([True, True, False, False], [794, 150, 86, 570])
    after = np.repeat([True, False, True, False], [794, 150, 86, 570])
    test = mcnemar(before, after)
    assert (test.fixed, test.broken) == (86, 150)
    assert pytest.approx(17.36, abs=5e-3) == (150 - 86) ** 2 / (150 + 86)
    assert test.p_value == pytest.approx(stats.binomtest(86, 236).pvalue, rel=1e-9)
    assert 3.1e-5 < test.p_value < 4e-5  # the exact test is a little more careful than z^2


@given(fixed=st.integers(0, 400), broken=st.integers(0, 400), same=st.integers(0, 20))
def test_mcnemar_equals_scipys_exact_binomial_test(fixed: int, broken: int, same: int) -> None:
    before = np.repeat([False, True, True], [fixed, broken, same])
    after = np.repeat([True, False, True], [fixed, broken, same])
    test = mcnemar(before, after)
    expected = stats.binomtest(min(fixed, broken), fixed + broken).pvalue if fixed + broken else 1.0
    assert (test.fixed, test.broken) == (fixed, broken)
    assert test.p_value == pytest.approx(expected, rel=1e-9)


def test_accuracy_difference_is_paired() -> None:
    generator = np.random.default_rng(9)
    before = generator.random(400) < 0.7
    after = before.copy()
    after[np.flatnonzero(~before)[:8]] = True
    interval = accuracy_difference(before, after, seed=0)
    assert interval.value == pytest.approx(8 / 400)
    # Eight of 400 turned right, none wrong: paired, that is clearly above zero, while the two
    # accuracies by themselves differ by less than one standard error.
    assert 0 < interval.low < interval.value < interval.high < 0.05


def test_comparisons_of_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match="paired comparison of 3 images with 2"):
        mcnemar([True, True, False], [True, False])


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_auroc_equals_a_loop_over_all_pairs(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in rows], dtype=np.float64)
    positives = np.array([positive for _, positive in rows])
    area = auroc(scores, positives, seed=0, resamples=50)
    if positives.all() or not positives.any():
        assert math.isnan(area.value) and math.isnan(area.low)
    else:
        assert area.value == pytest.approx(pair_loop_auroc(scores, positives), abs=1e-12)


def test_auroc_interval_is_the_quantiles_of_resampled_pair_loops() -> None:
    generator = np.random.default_rng(10)
    scores = generator.integers(0, 8, size=40).astype(np.float64)
    positives = generator.random(40) < 0.4
    area = auroc(scores, positives, seed=11, resamples=200)
    drawn = np.random.default_rng(11).integers(0, 40, size=(200, 40))
    slow = [pair_loop_auroc(scores[row], positives[row]) for row in drawn]
    assert (area.low, area.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=1e-12)


def test_classification_metrics_equal_scikit_learns_on_every_resample() -> None:
    generator = np.random.default_rng(12)
    labels = generator.choice([0, 1, 3, 4], size=80, p=[0.5, 0.3, 0.15, 0.05])
    predicted = np.where(generator.random(80) < 0.6, labels, generator.integers(0, 6, size=80))
    entropies = generator.gamma(1.0, size=80)
    found = classification_metrics(
        labels, predicted, entropies, [f"class {n}" for n in range(6)], seed=13, resamples=120
    )

    def macro(rows: np.ndarray) -> tuple[float, float]:
        precision, recall, _, _ = metrics.precision_recall_fscore_support(
            labels[rows],
            predicted[rows],
            labels=np.unique(labels[rows]),
            average="macro",
            zero_division=0,
        )
        return float(precision), float(recall)

    drawn = np.random.default_rng(13).integers(0, 80, size=(120, 80))
    slow = np.array([macro(row) for row in drawn])
    for name, value, column in zip(
        ("precision", "recall"), macro(np.arange(80)), slow.T, strict=True
    ):
        low, high = np.quantile(column, [0.025, 0.975])
        assert found[name]["value"] == pytest.approx(value, abs=1e-12)
        assert found[name]["low"] == pytest.approx(min(low, value), abs=1e-12)
        assert found[name]["high"] == pytest.approx(max(high, value), abs=1e-12)
    assert found["n"] == 80
    assert found["accuracy"] == wilson(int((labels == predicted).sum()), 80).as_dict()
    assert found["cross_entropy"]["value"] == pytest.approx(entropies.mean())


def test_per_class_lists_the_classes_that_occur_and_the_worst_is_the_surest_low_one() -> None:
    labels = [0] * 4 + [2] * 10 + [3] * 2
    predicted = [0] * 4 + [0] * 10 + [0] * 2
    found = classification_metrics(
        labels, predicted, [0.1] * 16, ["ape", "bee", "cat", "dog"], seed=0
    )
    assert [(row["name"], row["n"], row["value"]) for row in found["per_class"]] == [
        ("ape", 4, 1.0),
        ("cat", 10, 0.0),
        ("dog", 2, 0.0),
    ]
    assert found["worst_class"] == {"name": "cat", "n": 10, **wilson(0, 10).as_dict()}


def test_metrics_of_no_images_are_nan_without_a_warning() -> None:
    found = classification_metrics([], [], [], ["cat", "dog"], seed=0)
    assert found["n"] == 0
    assert math.isnan(found["precision"]["value"])
    assert found["worst_class"] is None
    assert found["per_class"] == []


def test_one_image_per_class_keeps_the_estimate_inside_its_interval() -> None:
    generator = np.random.default_rng(14)
    labels = np.arange(300)
    predicted = np.where(generator.random(300) < 0.88, labels, generator.integers(0, 300, 300))
    found = classification_metrics(
        labels, predicted, np.ones(300), [str(n) for n in range(300)], seed=0
    )
    for name in ("precision", "recall"):
        interval = Interval(**found[name])
        assert interval.low <= interval.value <= interval.high


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_equals_a_loop_over_bins(bins: int) -> None:
    generator = np.random.default_rng(3)
    confidence = np.concatenate([generator.random(200), [0.0, 0.2, 1.0]])
    right = generator.random(203) < confidence**2
    total = 0.0
    for b in range(bins):
        rows = [
            i
            for i, value in enumerate(confidence)
            if b / bins < value <= (b + 1) / bins or (b == 0 and value == 0)
        ]
        if rows:
            share = sum(bool(right[i]) for i in rows) / len(rows)
            mean = sum(confidence[i] for i in rows) / len(rows)
            total += len(rows) / 203 * abs(share - mean)
    found = calibration_error(confidence, right, bins=bins)
    assert found == pytest.approx(total, rel=1e-12)


def test_calibration_error_needs_as_many_outcomes_as_confidences() -> None:
    with pytest.raises(ValueError, match="2 confidences and 1 outcomes"):
        calibration_error([0.5, 0.6], [True])
