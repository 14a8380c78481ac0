"""Decisions on made-up predictions whose right answer is known."""

import numpy as np
import pytest

from repair.decision import Decision, Predictions, compare, decide, judge_control, judge_penalty

CLASSES = ("cat", "dog", "fox")


def predictions(right: np.ndarray, labels: np.ndarray, ce: float | np.ndarray = 0.5) -> Predictions:
    entropies = np.broadcast_to(np.asarray(ce, dtype=np.float64), labels.shape)
    return Predictions(
        labels=labels,
        predicted=np.where(right, labels, (labels + 1) % len(CLASSES)),
        p_true=np.exp(-entropies),
        cross_entropies=entropies,
    )


def decision_of(before: Predictions, after: Predictions) -> Decision:
    return decide(before, after, compare(before, after, seed=0), CLASSES)


@pytest.fixture
def labels() -> np.ndarray:
    return np.arange(300) % 3


def test_a_repair_that_fixes_many_and_breaks_none_is_accepted(labels: np.ndarray) -> None:
    before = predictions(labels != 0, labels)
    after = predictions(np.ones(300, bool), labels)
    decision = decision_of(before, after)
    assert decision.verdict == "accepted"
    assert decision.reasons[0] == "It fixed 100 held-out images and broke 0 (McNemar p < 0.001)."
    assert "66.7 % [61.2, 71.8] before" in decision.reasons[1]


def test_a_handful_of_fixes_is_not_enough(labels: np.ndarray) -> None:
    right = np.ones(300, bool)
    right[:5] = False  # exact two-sided p of 5 against 0 is 0.0625
    decision = decision_of(predictions(right, labels), predictions(np.ones(300, bool), labels))
    assert decision.verdict == "rejected"
    assert decision.reasons[0].startswith("No improvement was shown: it fixed 5")


def test_harm_is_called_harm(labels: np.ndarray) -> None:
    before = predictions(np.ones(300, bool), labels)
    decision = decision_of(before, predictions(np.arange(300) % 10 != 0, labels))
    assert decision.verdict == "rejected"
    assert decision.reasons[0].startswith("It did harm: it fixed 0 held-out images, broke 30")


def test_lower_cross_entropy_alone_is_accepted_when_accuracy_stays(labels: np.ndarray) -> None:
    right = np.ones(300, bool)
    noise = np.random.default_rng(0).normal(0, 0.1, 300)
    decision = decision_of(predictions(right, labels, 0.9), predictions(right, labels, 0.6 + noise))
    assert decision.verdict == "accepted"
    assert "lowered the held-out cross entropy" in decision.reasons[0]


def test_a_certain_but_negligible_gain_is_no_gain(labels: np.ndarray) -> None:
    right = np.ones(300, bool)
    decision = decision_of(predictions(right, labels, 0.9), predictions(right, labels, 0.899))
    assert decision.verdict == "rejected"
    assert decision.reasons[0].startswith("It changed next to nothing")


def test_lower_cross_entropy_does_not_buy_a_loss_of_accuracy(labels: np.ndarray) -> None:
    right = np.ones(300, bool)
    after = right.copy()
    after[:5] = False
    decision = decision_of(predictions(right, labels, 0.9), predictions(after, labels, 0.2))
    assert decision.verdict == "rejected"
    assert "may have cost accuracy" in decision.reasons[0]


def test_one_collapsed_class_outweighs_a_better_average() -> None:
    labels = np.array([0] * 140 + [1] * 140 + [2] * 20)
    before = predictions((labels == 2) | (np.arange(300) % 2 == 0), labels)
    after = predictions(labels != 2, labels)
    decision = decision_of(before, after)
    assert decision.verdict == "rejected"
    assert decision.reasons[-1] == "Class fox collapsed: 100.0 % before, 0.0 % after (20 images)."


def test_a_small_class_that_loses_everything_counts_as_collapsed() -> None:
    labels = np.array([0] * 148 + [1] * 148 + [2] * 4)  # four broken of four: p is only 0.125
    before = predictions((labels == 2) | (np.arange(300) % 2 == 0), labels)
    decision = decision_of(before, predictions(labels != 2, labels))
    assert decision.verdict == "rejected"


def test_more_right_answers_with_worse_cross_entropy_say_so(labels: np.ndarray) -> None:
    before = predictions(labels != 0, labels, 0.5)
    after = predictions(np.ones(300, bool), labels, 0.8)
    decision = decision_of(before, after)
    assert decision.verdict == "accepted"
    assert decision.reasons[-1].startswith("The cross entropy rose all the same")


def test_the_penalty_earns_its_place_only_by_a_paired_test(labels: np.ndarray) -> None:
    everything, most = np.ones(300, bool), np.arange(300) % 10 != 0
    good, poor = predictions(everything, labels), predictions(most, labels)
    won = judge_penalty(good, poor, compare(poor, good, seed=0))
    lost = judge_penalty(poor, good, compare(good, poor, seed=0))
    drew = judge_penalty(good, good, compare(good, good, seed=0))
    assert (won.earned, lost.earned, drew.earned) == (True, False, False)
    assert won.sentence.startswith("The penalty earned its place: it reached 100.0 %")
    assert lost.sentence.startswith("The penalty did harm: plain cross entropy on the same layer")
    assert drew.sentence.startswith("The penalty did not earn its place: plain cross entropy")


def test_a_control_is_beaten_only_by_a_paired_test(labels: np.ndarray) -> None:
    good = predictions(np.ones(300, bool), labels)
    poor = predictions(np.arange(300) % 10 != 0, labels)

    def said(repair: Predictions, control: Predictions) -> str:
        difference = compare(control, repair, seed=0)
        return judge_control(repair, control, difference, ours="true maps", theirs="shuffled maps")

    assert said(good, poor).startswith(
        "True maps beat shuffled maps: 100.0 % [98.7, 100.0] against"
    )
    assert "against 90.0 % [86.1, 92.9] (McNemar p < 0.001; cross entropy +0.000 [" in said(
        good, poor
    )
    assert said(poor, good).startswith("True maps did worse than shuffled maps: 90.0 %")
    assert said(good, good).startswith("True maps did no better than shuffled maps: 100.0 %")
    assert "McNemar p = 1.000; cross entropy +0.000" in said(good, good)


def test_predictions_of_different_images_are_not_compared(labels: np.ndarray) -> None:
    right = np.ones(300, bool)
    with pytest.raises(ValueError, match="same images"):
        compare(predictions(right, labels), predictions(right, labels[::-1].copy()), seed=0)
