"""Shares of blame: a softmax worked out by hand, and who counts as having memory."""

from __future__ import annotations

import dataclasses
import math

import pytest

from audit.blame import (
    CLEARED_ONSET,
    WITH_MEMORY,
    WITHOUT_MEMORY,
    has_memory,
    promising,
    shares_of_blame,
    suspects,
)
from audit.statistics import Interval
from tests.audit.test_verdict import evidence, moving, removing

NAN = float("nan")


def test_with_memory_onset_and_rank_of_the_trial_decide() -> None:
    scores = [evidence("a", 0.5), evidence("b", 2.0), evidence("c", -0.4), evidence("d", NAN)]
    trials = [removing("a", 0.1), removing("c", 0.3), removing("d", 0.2)]  # b was not reached
    onset, trial = WITH_MEMORY["onset"], WITH_MEMORY["trial"]
    odds = {
        "a": math.exp(0.5 * onset + trial / 3),
        "b": math.exp(2.0 * onset + trial / 4),
        "c": math.exp(trial),  # the best trial; drift that fades is none
        "d": math.exp(trial / 2),  # no batch norm follows
    }
    total = sum(odds.values())
    expected = {name: value / total for name, value in odds.items()}
    assert shares_of_blame(scores, trials, ()) == pytest.approx(expected)


def test_an_onset_counts_up_to_a_limit_and_not_at_all_in_the_first_layers() -> None:
    far = shares_of_blame([evidence("a", 30.0), evidence("b", 0.0)], (), ())
    limit = shares_of_blame([evidence("a", 3.0), evidence("b", 0.0)], (), ())
    assert far == limit
    first = [evidence("a", 3.0, first_in_line=True), evidence("b", 0.0)]
    assert shares_of_blame(first, (), ()) == pytest.approx({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    ("onset", "counted"), [(NAN, 0.0), (-0.5, 0.0), (0.0, 0.0), (0.6, 0.6), (2.5, 1.0)]
)
def test_the_onset_of_changed_signs_counts_up_to_a_limit(onset: float, counted: float) -> None:
    turned = dataclasses.replace(evidence("a", 0.0), signs_onset=onset)
    share = shares_of_blame([turned, evidence("b", 0.0)], (), ())["a"]
    odds = math.exp(WITH_MEMORY["signs"] * counted)
    assert share == pytest.approx(odds / (1 + odds))


@pytest.mark.parametrize(("unexplained", "counted"), [(NAN, 0), (0.03, 0), (0.04, 0.847), (9, 3)])
def test_of_first_layers_what_no_change_of_photographs_explains_counts_where_it_is_much(
    unexplained: float, counted: float
) -> None:
    """In nats; the onset is its logarithm, over a floor of .03."""
    first = dataclasses.replace(
        evidence("a", 3.0, first_in_line=True), drift_unexplained=unexplained
    )
    odds = math.exp(WITH_MEMORY["onset"] * counted)
    share = shares_of_blame([first, evidence("b", 0.0)], (), ())["a"]
    assert share == pytest.approx(odds / (1 + odds), rel=1e-3)


@pytest.mark.parametrize("first", [0.1, 0.9])
def test_images_without_the_artefact_clear_layers_and_say_nothing_of_the_first_ones(
    first: float,
) -> None:
    scores = [
        dataclasses.replace(evidence(name, onset, first_in_line=name == "a"), without_artefact=True)
        for name, onset in (("a", first), ("b", CLEARED_ONSET), ("c", 0.3), ("d", NAN))
    ]
    onset, cleared = WITH_MEMORY["onset"], WITH_MEMORY["cleared"]
    no_trial = WITH_MEMORY["trial"] / 4
    odds = {
        "a": math.exp(no_trial),
        "b": math.exp(CLEARED_ONSET * onset + no_trial),
        "c": math.exp(0.3 * onset + cleared + no_trial),
        "d": math.exp(no_trial),  # nothing is known of it
    }
    total = sum(odds.values())
    expected = {name: value / total for name, value in odds.items()}
    assert shares_of_blame(scores, (), ()) == pytest.approx(expected)


def test_without_memory_silent_channels_and_ranks_over_the_rounds_decide() -> None:
    scores = [
        dataclasses.replace(evidence("a"), silent_channels=0.25),  # more than a tenth is many
        dataclasses.replace(evidence("b"), silent_channels=0.05),
        evidence("c"),
    ]
    gains = {"a": (0.1, 0.2), "b": (0.3, 0.1), "c": (0.2, 0.2)}
    channels = [
        dataclasses.replace(removing(name, own[-1]), gains=own) for name, own in gains.items()
    ]
    # Ranks of the first round 3, 1, 2; of the second 2, 3, 2: ties share the worse one.
    places = {"a": (1 / 3 + 1 / 2) / 2, "b": (1 + 1 / 3) / 2, "c": (1 / 2 + 1 / 2) / 2}
    trials = [removing("a", -20.0), removing("c", 0.9)]  # say nothing here
    silent, weight = WITHOUT_MEMORY["silent"], WITHOUT_MEMORY["channels"]
    odds = {
        "a": math.exp(silent + weight * places["a"]),
        "b": math.exp(0.5 * silent + weight * places["b"]),
        "c": math.exp(weight * places["c"]),
    }
    expected = {name: value / sum(odds.values()) for name, value in odds.items()}
    assert shares_of_blame(scores, trials, channels) == pytest.approx(expected)


def test_memory_is_batch_norm_behind_at_least_half_of_the_convolutions() -> None:
    assert has_memory([evidence("a", 0.1), evidence("b")])
    assert not has_memory([evidence("a", 0.1), evidence("b"), evidence("c")])
    assert not has_memory([])


def test_silent_channels_count_with_memory_too() -> None:
    scores = [dataclasses.replace(evidence("a", 0.0), silent_channels=0.5), evidence("b", 0.0)]
    odds = math.exp(WITH_MEMORY["silent"])
    assert shares_of_blame(scores, (), ())["a"] == pytest.approx(odds / (odds + 1))


def test_the_layer_whose_moves_do_most_has_its_lead() -> None:
    scores = [evidence("a", 0.0), evidence("b", 0.0), evidence("c", 0.0)]
    weight = WITH_MEMORY["moves"]
    for best, other, lead in (
        (0.30, 0.24, 0.2),  # a fifth of what it removes no other's moves do
        (0.98, 0.931, 0.05),  # where a network is wrecked any move helps
        (0.30, -0.10, 1.0),  # nothing helps elsewhere
    ):
        moves = [moving("a", other), moving("b", best), moving("c", -0.5)]
        odds = math.exp(weight * lead)
        shares = shares_of_blame(scores, (), (), moves)
        assert shares["b"] == pytest.approx(odds / (odds + 2))
        assert shares["a"] == shares["c"]
    # Moves whose interval includes nothing say nothing.
    doubtful = dataclasses.replace(moving("b", 0.3), gain=Interval(value=0.3, low=-0.1, high=0.5))
    assert shares_of_blame(scores, (), (), [doubtful])["b"] == pytest.approx(1 / 3)
    assert promising(scores, [moving("c", 0.2), moving("a", 0.1)])[0] == "c"


def test_without_memory_a_norm_counts_beyond_what_is_usual() -> None:
    def share(outlier: float) -> float:
        scores = [dataclasses.replace(evidence("a"), norm_outlier=outlier), evidence("b")]
        return shares_of_blame(scores, (), ())["a"]

    assert share(NAN) == share(0.0) == 0.5
    odds = math.exp(WITHOUT_MEMORY["norm"] / 2)
    assert share(1.0) == pytest.approx(odds / (odds + 1))
    assert share(2.0) == share(20.0) > share(1.0)


def test_layers_are_promising_by_evidence_and_then_by_their_gradients() -> None:
    scores = [
        dataclasses.replace(evidence("a", 0.0), gradient_snr=1.0, gradient_conflict=0.1),
        dataclasses.replace(evidence("b", 0.0), gradient_snr=3.0, gradient_conflict=0.0),
        dataclasses.replace(evidence("c", 0.0), gradient_snr=2.0, relative_gradient_norm=1.0),
        evidence("d", 1.0),
    ]
    # One over each rank: a 1/3 + 1, b 1 + 1/2, c 1/2 + 1; b and c are equal and stay in order.
    assert promising(scores) == ["d", "b", "c", "a"]


def test_suspects_are_the_fewest_that_have_the_blame_together() -> None:
    shares = {"a": 0.1, "b": 0.6, "c": 0.3}
    assert suspects(shares, 0.5) == ("b",)
    assert suspects(shares, 0.85) == ("b", "c")
    assert suspects(shares, 0.95) == ("b", "c", "a")
