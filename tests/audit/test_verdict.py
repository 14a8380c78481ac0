"""Verdicts on constructed trials: who is named, how surely, and in which sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from audit.evidence import LayerEvidence
from audit.networks.layers import Layer
from audit.statistics import Interval
from audit.trials import TrialRepair, error_share_removed
from audit.verdict import FLAG_THRESHOLD, ONSET_THRESHOLD, TIE_MARGIN, Verdict, judge, ranking

N = 100
BEFORE = np.random.default_rng(5).gamma(2.0, 1.0, N)


def trial(name: str, after: np.ndarray, *, broken: float = 0.0) -> TrialRepair:
    """A trial whose intervals follow from its cross entropies, as in a scan."""
    return TrialRepair(
        layer=Layer(
            name=name,
            kind="conv2d",
            shape=(4, 3, 3, 3),
            parameters=108,
            parameter_names=(f"{name}.weight",),
            output_shape=(4, 8, 8),
            index=0,
        ),
        gain=error_share_removed(BEFORE, after, seed=0),
        gain_one_step=Interval(value=0, low=0, high=0),
        broken=broken,
        step_size=0.01,
        cross_entropies_before=BEFORE,
        cross_entropies_after=after,
    )


def removing(name: str, share: float, *, broken: float = 0.0) -> TrialRepair:
    """The same share from every image: the interval has no width."""
    return trial(name, BEFORE * (1 - share), broken=broken)


def verdict_on(trials: Sequence[TrialRepair], wrong: int = 40) -> Verdict:
    return judge(trials, steps=4, wrong=wrong, images=N, seed=0)


def test_a_clear_winner_is_localized_and_the_sentences_say_its_numbers() -> None:
    found = verdict_on(
        [removing("a", 0.05), removing("b", 0.43, broken=0.025), removing("c", 0.22)]
    )
    assert found.verdict == "localized"
    assert found.layers == ("b",)
    assert found.confidence == 1
    text = " ".join(found.reasons)
    assert "Retraining `b` alone for 4 steps removes 43 % [43, 43]" in text
    assert "the next layer, `c`, removes 22 % [22, 22]" in text
    assert "at least 21%" in text  # its lead over the next
    assert "turns 2.5% of the held-out images that were right wrong" in text
    assert "In 100% of redrawn sets of images the same layer comes first." in text
    assert found.numbers["best"] == {"layer": "b", **removing("b", 0.43).gain.as_dict()}
    leads = {lead["layer"]: lead["value"] for lead in found.numbers["leads"]}
    assert leads == pytest.approx({"c": 0.21, "a": 0.38})
    assert [tied["layer"] for tied in found.numbers["tied"]] == ["b"]


def test_layers_that_do_equally_well_are_spread_best_first() -> None:
    trials = [removing("a", 0.40), removing("b", 0.05), removing("c", 0.43), removing("d", 0.41)]
    found = verdict_on(trials)
    assert found.verdict == "spread"
    assert found.layers == ("c", "d", "a")
    assert "3 of 4 layers do about as well" in " ".join(found.reasons)
    assert [tied["layer"] for tied in found.numbers["tied"]] == ["c", "d", "a"]
    assert [one.layer.name for one in ranking(trials)] == ["c", "d", "a", "b"]


@pytest.mark.parametrize(
    ("other", "verdict"),
    [(0.4 - TIE_MARGIN + 0.01, "spread"), (0.4 - TIE_MARGIN - 0.01, "localized")],
)
def test_the_tie_margin_is_where_it_says(other: float, verdict: str) -> None:
    assert verdict_on([removing("a", 0.4), removing("b", other)]).verdict == verdict


@pytest.mark.parametrize(
    ("share", "verdict"), [(FLAG_THRESHOLD - 0.01, "none"), (FLAG_THRESHOLD + 0.01, "localized")]
)
def test_the_flag_threshold_is_where_it_says(share: float, verdict: str) -> None:
    assert verdict_on([removing("a", share), removing("b", 0.0)]).verdict == verdict


def test_a_gain_that_the_images_do_not_settle_flags_nothing() -> None:
    """The mean gain is far above the threshold, but it all comes from two images of a hundred."""
    after = BEFORE.copy()
    heavy = np.argsort(BEFORE)[-2:]
    before = BEFORE.copy()
    before[heavy] = 40.0
    after[heavy] = 0.0
    gain = error_share_removed(before, after, seed=0)
    assert gain.value > 2 * FLAG_THRESHOLD and gain.low < FLAG_THRESHOLD
    unsettled = trial("a", after)
    unsettled = TrialRepair(**{**vars(unsettled), "gain": gain, "cross_entropies_before": before})
    found = verdict_on([unsettled])
    assert found.verdict == "none"
    percents = [round(100 * value) for value in (gain.value, gain.low, gain.high)]
    assert "the best, `a`, removes {} % [{}, {}]".format(*percents) in found.reasons[0]


def test_no_gain_anywhere_is_none_and_names_the_best_try() -> None:
    found = verdict_on([removing("a", -0.2), removing("b", 0.04)])
    assert (found.verdict, found.layers, found.confidence) == ("none", (), None)
    assert len(found.reasons) == 1
    assert f"more than {FLAG_THRESHOLD:.0%}" in found.reasons[0]
    assert "`b`, removes 4 % [4, 4]" in found.reasons[0]


def test_a_gain_of_next_to_nothing_is_not_called_minus_zero() -> None:
    (reason,) = verdict_on([removing("a", -0.001)]).reasons
    assert "removes 0 % [0, 0]" in reason


def test_too_few_errors_blame_no_layer_however_large_the_gain() -> None:
    found = verdict_on([removing("a", 0.9), removing("b", 0.0)], wrong=4)
    assert (found.verdict, found.layers, found.confidence) == ("none", (), None)
    assert "gets 4 of 100 held-out images wrong; at least 5 errors" in found.reasons[0]
    assert verdict_on([removing("a", 0.9), removing("b", 0.0)], wrong=5).verdict == "localized"


def test_no_trial_at_all_is_none() -> None:
    assert verdict_on([]).verdict == "none"


def test_ties_are_told_by_paired_images_and_not_by_overlapping_intervals() -> None:
    """A lead of the same size is settled where it is steady and open where it is not."""
    generator = np.random.default_rng(1)
    share = np.clip(generator.normal(0.6, 0.5, N), -1, 1)
    best = trial("best", BEFORE * (1 - share))
    steady = trial("steady", best.cross_entropies_after + 0.08 * BEFORE)
    # The same sum, moved between images at random.
    noise = generator.normal(0, 4, N)
    noise -= noise.mean()
    erratic = trial("erratic", steady.cross_entropies_after + noise)
    assert best.gain.low < steady.gain.high  # the intervals of the two overlap widely
    assert steady.gain.value == pytest.approx(erratic.gain.value)
    assert verdict_on([best, steady]).verdict == "localized"
    assert verdict_on([best, erratic]).verdict == "spread"


def test_only_tied_layers_are_recorded_as_tied() -> None:
    """The third is tied because it is erratic, the second, before it, is steadily behind."""
    generator = np.random.default_rng(1)
    noise = generator.normal(0, 4, N)
    noise -= noise.mean()
    best = removing("best", 0.5)
    steady = removing("steady", 0.42)
    erratic = trial("erratic", BEFORE * (1 - 0.41) + noise)
    found = verdict_on([erratic, steady, best])
    assert found.layers == ("best", "erratic")
    assert [tied["layer"] for tied in found.numbers["tied"]] == ["best", "erratic"]
    assert "2 of 3 layers" in " ".join(found.reasons)


def test_confidence_is_the_share_of_redrawn_images_with_the_same_first_layer() -> None:
    generator = np.random.default_rng(3)
    after = [BEFORE * 0.5 + generator.normal(0, 1, N) for _ in range(3)]
    found = verdict_on([trial(f"layer{i}", values) for i, values in enumerate(after)])
    assert found.confidence is not None and 0 < found.confidence < 1
    sums = np.stack(after).sum(axis=1)
    first, drawn = int(sums.argmin()), np.random.default_rng(99)
    wins = 0
    for _ in range(2000):
        rows = drawn.integers(0, N, N)
        wins += int(np.argmin([values[rows].sum() for values in after])) == first
    assert found.confidence == pytest.approx(wins / 2000, abs=0.05)
    assert f"In {found.confidence:.0%} of redrawn sets" in found.reasons[-1]


def test_a_layer_that_was_tried_alone_can_be_flagged() -> None:
    found = verdict_on([removing("only", 0.5)])
    assert found.layers == ("only",)
    assert "No other layer was tried." in found.reasons


def test_the_same_trials_in_another_order_give_the_same_verdict() -> None:
    generator = np.random.default_rng(4)
    trials = [trial(f"layer{i}", BEFORE * generator.uniform(0.4, 1.2, N)) for i in range(6)]
    assert verdict_on(trials) == verdict_on(trials[::-1])


def test_the_record_is_plain_data() -> None:
    record = verdict_on([removing("a", 0.4), removing("b", 0.39)]).as_dict()
    assert set(record) == {"verdict", "layers", "confidence", "reasons", "numbers"}
    assert record["layers"] == ["a", "b"]
    assert all(re.fullmatch(r"[A-Z0-9].*\.", reason) for reason in record["reasons"])


def evidence(name: str, onset: float, *, first_in_line: bool = False) -> LayerEvidence:
    nan = float("nan")
    return LayerEvidence(
        layer=removing(name, 0).layer,
        gradient_norm=nan,
        relative_gradient_norm=nan,
        gradient_snr=nan,
        map_mean_right=nan,
        map_mean_wrong=nan,
        map_auroc=Interval(value=nan, low=nan, high=nan),
        penalty=nan,
        drift=0.5,
        drift_onset=onset,
        first_in_line=first_in_line,
    )


TRIALS = [removing("a", 0.05), removing("b", 0.43), removing("c", 0.40)]


def judged(scores: Sequence[LayerEvidence], trials: Sequence[TrialRepair] = TRIALS) -> Verdict:
    return judge(trials, scores, steps=4, wrong=40, images=N, seed=0)


def test_where_drift_sets_in_is_named_before_whatever_layer_repairs_best() -> None:
    found = judged([evidence("a", 2.0), evidence("b", 0.1), evidence("c", float("nan"))])
    assert (found.verdict, found.layers, found.confidence) == ("localized", ("a",), None)
    text = " ".join(found.reasons)
    assert "`a` have left what its batch norm remembers from training (0.50 nats" in text
    assert "7.4 times as far" in text  # exp(2)
    assert "Retraining `a` alone for 4 steps removes 5 % [5, 5]" in text
    assert "does most in `b`, 43 % [43, 43]" in text
    assert found.numbers["drift_origin"]["layer"] == "a"


def test_drift_that_sets_in_at_the_first_layer_may_be_that_of_the_images() -> None:
    plain = judged([])
    assert judged([evidence("a", 3.0, first_in_line=True), evidence("b", 0.2)]) == plain
    assert plain.verdict == "spread"


def test_drift_below_the_threshold_changes_nothing() -> None:
    assert judged([evidence("a", ONSET_THRESHOLD - 0.01)]) == judged([])


def test_drift_alone_flags_no_layer_but_is_said() -> None:
    found = judged([evidence("a", 2.0)], [removing("a", 0.02), removing("b", 0.01)])
    assert (found.verdict, found.layers) == ("none", ())
    assert "`a` have left" in found.reasons[-1]
