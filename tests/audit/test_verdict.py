"""Verdicts on constructed trials: who is named, how surely, and in which sentences."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest

from audit.blame import shares_of_blame
from audit.evidence import LayerEvidence
from audit.moves import ChannelMove, Move
from audit.networks.layers import Layer
from audit.statistics import Interval
from audit.trials import TrialRepair, error_share_removed
from audit.verdict import (
    BLAME_LEVEL,
    CHANGED_THRESHOLD,
    FLAG_THRESHOLD,
    ONSET_THRESHOLD,
    SIGNS_THRESHOLD,
    Verdict,
    judge,
)

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
        gains=(1 - float(after.sum() / BEFORE.sum()),),
        steps=4,
        broken=broken,
        step_size=0.01,
        cross_entropies_before=BEFORE,
        cross_entropies_after=after,
    )


def removing(name: str, share: float, *, broken: float = 0.0) -> TrialRepair:
    """The same share from every image: the interval has no width."""
    return trial(name, BEFORE * (1 - share), broken=broken)


def moving(name: str, share: float, move: Move = Move("sign", 0, 0)) -> ChannelMove:  # noqa: B008
    """The same share from every image, by this move."""
    one = removing(name, share)
    return ChannelMove(layer=one.layer, move=move, gain=one.gain)


def evidence(
    name: str, onset: float = float("nan"), *, first_in_line: bool = False
) -> LayerEvidence:
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
        drift=onset if math.isnan(onset) else 0.5,
        drift_onset=onset,
        first_in_line=first_in_line,
    )


TRIALS = [removing("a", 0.05), removing("b", 0.43, broken=0.025), removing("c", 0.40)]
QUIET = [evidence("a", 0.2), evidence("b", 0.1), evidence("c", 0.3)]
SET_IN = [evidence("a", 2.5), evidence("b", 0.1), evidence("c", 0.0)]


def verdict_on(
    scores: Sequence[LayerEvidence] = QUIET,
    trials: Sequence[TrialRepair] = TRIALS,
    channel_trials: Sequence[TrialRepair] = (),
    wrong: int = 40,
    artefacts: int = 0,
    plain: int | None = None,
) -> Verdict:
    return judge(
        *(trials, scores, channel_trials), wrong=wrong, images=N, artefacts=artefacts, plain=plain
    )


def test_where_drift_sets_in_is_named_before_whatever_layer_repairs_best() -> None:
    found = verdict_on(SET_IN)
    assert (found.verdict, found.layers) == ("localized", ("a",))
    assert found.flagged == "a"  # however little its own trial does
    assert found.confidence == shares_of_blame(SET_IN, TRIALS, ())["a"]
    text = " ".join(found.reasons)
    assert "`a` have left what its batch norm remembers from training (0.50 nats" in text
    assert "12.2 times as far" in text  # exp(2.5)
    assert "Retraining `a` alone for 4 steps removes 5 % [5, 5]" in text
    assert "does most in `b`, 43 % [43, 43]" in text
    assert found.confidence > 0.99 and "It has more than 99 % of the blame" in text
    assert found.numbers["drift_origin"]["layer"] == "a"
    assert found.numbers["best"] == {"layer": "b", **TRIALS[1].gain.as_dict()}


def test_what_a_repair_breaks_is_said_of_that_repair() -> None:
    trials = [removing("a", 0.05, broken=0.025), removing("b", 0.43), removing("c", 0.40)]
    reasons = verdict_on(SET_IN, trials).reasons
    at = next(i for i, reason in enumerate(reasons) if reason.startswith("Retraining `a` alone"))
    assert reasons[at + 1].startswith("That repair gets 2.5 % of the held-out images wrong")
    assert "does most in `b`" in reasons[at + 2]


def test_layers_that_share_the_blame_are_spread_most_blamed_first() -> None:
    found = verdict_on()
    shares = shares_of_blame(QUIET, TRIALS, ())
    assert found.verdict == "spread"
    order = sorted(shares, key=lambda name: -shares[name])
    assert found.layers == tuple(order[: len(found.layers)])
    named = sum(shares[name] for name in found.layers)
    assert named >= BLAME_LEVEL > named - shares[found.layers[-1]]
    text = " ".join(found.reasons)
    assert f"{len(found.layers)} of 3 layers share 90 % of the blame" in text
    assert found.numbers["blame"] == [{"layer": n, "share": shares[n]} for n in found.layers]


def reaching(name: str, value: float, low: float, high: float) -> TrialRepair:
    return dataclasses.replace(
        removing(name, value), gain=Interval(value=value, low=low, high=high), broken=0.0
    )


@pytest.mark.parametrize(
    ("gain", "flagged"),
    [(0.42, "a"), (0.351, "a"), (0.349, "b"), (0.05, "b")],
)
def test_to_be_repaired_is_the_most_blamed_that_may_do_as_much_as_the_best(
    gain: float, flagged: str
) -> None:
    scores = [evidence("a", 0.9), evidence("b", 0.1), evidence("c", 0.3)]
    trials = [
        reaching("a", gain, gain - 0.2, gain + 0.2),  # not its own interval counts
        reaching("b", 0.43, 0.35, 0.51),
        reaching("c", 0.40, 0.30, 0.50),
    ]
    found = verdict_on(scores, trials)
    assert (found.verdict, found.layers[0], found.flagged) == ("spread", "a", flagged)
    told = [reason for reason in found.reasons if reason.startswith("To be repaired")]
    assert told == [
        "To be repaired is `b`, of these layers the most blamed whose short repair, "
        "43 % [35, 51], does most; that of `a` clearly does less."
    ] * (flagged == "b")


def test_of_several_within_the_interval_the_most_blamed_is_repaired_not_the_best() -> None:
    scores = [evidence("a", 1.24), evidence("b", 1.0), evidence("c", 0.6)]
    trials = [
        reaching("a", 0.10, 0.05, 0.15),
        reaching("b", 0.38, 0.20, 0.50),
        reaching("c", 0.43, 0.35, 0.51),
    ]
    found = verdict_on(scores, trials)
    assert found.layers == ("a", "b", "c") and found.flagged == "b"
    assert (
        "`b`, of these layers the most blamed whose short repair, 38 % [20, 50], reaches into "
        "the interval of the best one's, 43 % [35, 51] of `c`; that of `a`" in found.reasons[-1]
    )


def test_a_layer_that_no_trial_reached_is_not_the_one_to_repair() -> None:
    scores = [evidence("a", 1.24), evidence("b", 0.6), evidence("c", 0.0)]
    found = verdict_on(scores, [reaching("b", 0.43, 0.35, 0.51), reaching("c", 0.2, 0.1, 0.3)])
    assert (found.layers[0], found.flagged) == ("a", "b")
    assert found.reasons[-1].endswith("does most; `a` had none.")


def test_a_layer_outside_the_verdict_is_not_repaired_however_much_its_trial_does() -> None:
    scores = [evidence("a", 1.2), evidence("b", 1.2), *(evidence(n, 0.0) for n in "cdefg")]
    trials = [
        reaching("g", 0.9, 0.8, 1.0),
        reaching("a", 0.2, 0.1, 0.3),
        *(reaching(name, 0.05, 0.0, 0.1) for name in "bcdef"),
    ]
    found = verdict_on(scores, trials)
    assert (found.layers, found.flagged) == (("a", "b"), "a")


def test_a_layer_whose_repair_does_most_is_said_with_the_next_and_what_it_breaks() -> None:
    text = " ".join(verdict_on().reasons)
    assert "Retraining `b` alone for 4 steps removes 43 % [43, 43] of the held-out error" in text
    assert "the next layer, `c`, removes 40 % [40, 40]" in text
    assert "gets 2.5 % of the held-out images wrong that were right" in text


def test_without_memory_the_trials_of_channels_decide() -> None:
    scores = [evidence(name) for name in "abc"]
    channels = [removing("a", 0.30), removing("b", 0.02), removing("c", 0.01)]
    found = verdict_on(scores, channel_trials=channels)
    assert found.layers[0] == "a"
    text = " ".join(found.reasons)
    assert "channels of `a` alone removes 30 % [30, 30] of the held-out error, rank 1 of 3" in text


def test_drift_that_sets_in_at_the_first_layer_may_be_that_of_the_images() -> None:
    first = [evidence("a", 3.0, first_in_line=True), *QUIET[1:]]
    without = [evidence("a", 0.0, first_in_line=True), *QUIET[1:]]
    assert verdict_on(first) == verdict_on(without)


def test_drift_of_the_first_layer_that_no_change_of_photographs_explains_is_its_own() -> None:
    first = dataclasses.replace(evidence("a", 3.0, first_in_line=True), drift_unexplained=0.41)
    found = verdict_on([first, *QUIET[1:]])
    assert (found.verdict, found.layers) == ("localized", ("a",))
    assert (
        "left what its batch norm remembers from training (0.50 nats a channel), and no change of "
        "the images' size, contrast, brightness or color explains 0.41 of them: it was damaged"
    ) in found.reasons[0]
    assert found.numbers["drift_origin"]["onset"] == pytest.approx(math.log(0.44 / 0.03))
    little = dataclasses.replace(first, drift_unexplained=0.02)
    without = [evidence("a", 0.0, first_in_line=True), *QUIET[1:]]
    assert verdict_on([little, *QUIET[1:]]) == verdict_on(without)


@pytest.mark.parametrize(("above", "told"), [(0.01, True), (-0.01, False)])
def test_changed_signs_are_told_of_the_layer_that_is_blamed(above: float, told: bool) -> None:
    turned = dataclasses.replace(
        QUIET[0], drift=0.1, drift_by_signs=0.08, signs_onset=SIGNS_THRESHOLD + above
    )
    found = verdict_on([turned, *QUIET[1:]], [removing("a", 0.2)])
    assert found.layers[0] == "a"
    sentence = (
        "To change signs of channels of `a` would take back 0.08 of the 0.10 nats a channel by "
        "which its outputs have left what batch norm remembers: weights have the wrong sign."
    )
    assert (sentence in found.reasons) is told
    behind = dataclasses.replace(turned, signs_seen_in="b")
    found = verdict_on([behind, *QUIET[1:]], [removing("a", 0.2)])
    sentence = sentence.replace("0.10", "0.50").replace(
        "its outputs", "the outputs of `b` behind it"
    )
    assert (sentence in found.reasons) is told


@pytest.mark.parametrize(("above", "named"), [(0.01, True), (-0.01, False)])
def test_the_threshold_of_the_onset_is_where_it_says(above: float, named: bool) -> None:
    scores = [evidence("a", ONSET_THRESHOLD + above), evidence("b", 0.0), evidence("c", 0.0)]
    found = verdict_on(scores, [removing("a", 0.43), removing("b", 0.2), removing("c", 0.1)])
    assert ("drift_origin" in found.numbers) is named
    assert any("have left what" in reason for reason in found.reasons) is named


def test_drift_alone_flags_no_layer_but_is_said() -> None:
    found = verdict_on(SET_IN, [removing("a", 0.02), removing("b", 0.01)])
    assert (found.verdict, found.layers) == ("none", ())
    assert "`a` have left" in found.reasons[-1]


@pytest.mark.parametrize(("above", "flagged"), [(0.01, True), (-0.01, False)])
def test_the_flag_threshold_is_where_it_says(above: float, flagged: bool) -> None:
    found = verdict_on(trials=[removing("a", FLAG_THRESHOLD + above), removing("b", 0.0)])
    assert (found.verdict != "none") is flagged


@pytest.mark.parametrize(
    ("sign", "above", "flagged"),
    [
        ("drift", 0.005, True),
        ("drift", -0.005, False),
        ("silence", 0.005, True),
        ("silence", -0.005, False),
        ("signs", 0.005, True),
        ("artefact", 0.005, False),
        (None, 0.005, False),
    ],
)
def test_less_is_enough_where_the_network_itself_says_that_it_was_changed(
    sign: str | None, above: float, flagged: bool
) -> None:
    scores = SET_IN if sign == "drift" else QUIET
    changed = {
        "silent_channels": 0.2 if sign == "silence" else 0.0,
        "signs_onset": 0.6 if sign == "signs" else 0.0,
    }
    scores = [dataclasses.replace(scores[0], **changed), *scores[1:]]
    trials = [removing("a", CHANGED_THRESHOLD + above), removing("b", 0.0)]
    found = verdict_on(scores, trials, artefacts=int(sign == "artefact"))
    assert CHANGED_THRESHOLD + 0.005 < FLAG_THRESHOLD
    assert (found.verdict != "none") is flagged
    told = sign in ("drift", "silence", "signs")
    assert found.numbers["flag_threshold"] == (CHANGED_THRESHOLD if told else FLAG_THRESHOLD)
    if not flagged:
        assert f"more than {'9' if told else '10'} %" in found.reasons[0]


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
    found = verdict_on(trials=[unsettled])
    assert found.verdict == "none"
    percents = [round(100 * value) for value in (gain.value, gain.low, gain.high)]
    assert "the best, `a`, removes {} % [{}, {}]".format(*percents) in found.reasons[0]


def test_no_gain_anywhere_is_none_and_names_the_best_try() -> None:
    found = verdict_on(trials=[removing("a", -0.2), removing("b", 0.04)])
    assert (found.verdict, found.layers, found.confidence) == ("none", (), None)
    assert found.flagged is None
    assert len(found.reasons) == 1
    assert "more than 10 %" in found.reasons[0]
    assert "`b`, removes 4 % [4, 4]" in found.reasons[0]


def test_a_gain_of_next_to_nothing_is_not_called_minus_zero() -> None:
    (reason,) = verdict_on(trials=[removing("a", -0.001)]).reasons
    assert "removes 0 % [0, 0]" in reason


@pytest.mark.parametrize(
    "sign", ["drift", "signs", "silence", "silence as trained", "artefact", None]
)
def test_a_gain_that_is_not_settled_flags_where_something_else_says_so(sign: str | None) -> None:
    after = BEFORE * (1.05 + np.random.default_rng(2).normal(0, 1.8, N))
    unsettled = trial("a", after)
    assert unsettled.gain.value > FLAG_THRESHOLD > unsettled.gain.low
    scores = SET_IN if sign == "drift" else QUIET
    silent = {"silence": 0.2, "silence as trained": 0.125}.get(sign or "", 0.0)
    changed = {"silent_channels": silent, "signs_onset": 0.6 if sign == "signs" else 0.4}
    scores = [dataclasses.replace(scores[0], **changed), *scores[1:]]
    shared = 2 if sign == "artefact" else 0
    found = verdict_on(scores, [unsettled, removing("b", 0.0)], artefacts=shared)
    assert (found.verdict != "none") is (sign in ("drift", "signs", "silence", "artefact"))
    assert found.numbers["artefacts"] == shared
    said = {
        "drift": "the drift of `a`",
        "signs": "the changed signs of `a`",
        "silence": "the silent channels of `a`",
        "artefact": "the artefact that failing images share",
    }
    if found.verdict != "none":
        assert found.reasons[-1] == (
            "These images alone do not settle that a repair of `a` removes more than "
            f"{10 if sign == 'artefact' else 9} % "
            f"({_percents(unsettled.gain)}); that there is a fault is also said by {said[sign]}."
        )


def test_a_gain_that_is_settled_needs_no_other_sign() -> None:
    assert verdict_on(artefacts=1).reasons == verdict_on().reasons


def plainly(scores: Sequence[LayerEvidence]) -> list[LayerEvidence]:
    return [dataclasses.replace(one, without_artefact=True) for one in scores]


@pytest.mark.parametrize("scores", [QUIET, SET_IN, plainly(QUIET), plainly(SET_IN)])
def test_no_drift_without_the_artefact_leaves_it_open_whether_a_layer_was_taught_wrong(
    scores: Sequence[LayerEvidence],
) -> None:
    told = [r for r in verdict_on(scores, artefacts=1, plain=70).reasons if "merely new" in r]
    assert len(told) == (scores == plainly(QUIET))
    assert all(reason.startswith("On 70 images without the artefact no outputs") for reason in told)


def test_drift_of_a_first_layer_without_the_artefact_is_said_with_its_doubt() -> None:
    scores = plainly([evidence("a", 0.9, first_in_line=True), *QUIET[1:]])
    found = verdict_on(scores, artefacts=1, plain=70)
    assert (found.verdict, found.layers[0]) == ("spread", "a")
    (told,) = (reason for reason in found.reasons if "may also differ" in reason)
    assert told.startswith(
        "On 70 images without the artefact the outputs of `a` have left what its batch norm "
        "remembers (0.50 nats a channel), and those of 2 of 3 layers have not."
    )
    # Drift of images that may carry it says nothing of a first layer.
    scores = [dataclasses.replace(one, without_artefact=False) for one in scores]
    assert not any("may also differ" in reason for reason in verdict_on(scores).reasons)


def _percents(gain: Interval) -> str:
    value, low, high = (round(100 * x) for x in (gain.value, gain.low, gain.high))
    return f"{value} % [{low}, {high}]"


def test_too_few_errors_blame_no_layer_however_large_the_gain() -> None:
    found = verdict_on(SET_IN, wrong=4)
    assert (found.verdict, found.layers, found.confidence) == ("none", (), None)
    assert "gets 4 of 100 held-out images wrong; at least 5 errors" in found.reasons[0]
    assert verdict_on(SET_IN, wrong=5).verdict == "localized"


def test_no_trial_at_all_is_none() -> None:
    assert verdict_on(trials=[]).verdict == "none"


def test_the_same_trials_in_another_order_give_the_same_verdict() -> None:
    assert verdict_on(trials=TRIALS) == verdict_on(trials=TRIALS[::-1])


def test_the_record_is_plain_data() -> None:
    record = verdict_on().as_dict()
    assert set(record) == {*("verdict", "layers", "flagged", "confidence", "reasons", "numbers")}
    assert all(re.fullmatch(r"[A-Z0-9].*\.", reason) for reason in record["reasons"])


# -------------------------------------------------------------------- moves of channels


@pytest.mark.parametrize(
    ("move", "told"),
    [
        (Move("exchange", 3, 7), "exchange channels 3 and 7"),
        (Move("sign", 9, 9), "change the sign of channel 9"),
    ],
    ids=["exchange", "sign"],
)
def test_a_layer_whose_move_stands_out_is_blamed_and_it_is_told(move: Move, told: str) -> None:
    moves = [moving("a", 0.31, move), moving("b", 0.02), moving("c", -0.10)]
    found = judge(TRIALS, QUIET, (), moves, wrong=30, images=N)
    assert found.layers[0] == "a"
    assert (
        f"To {told} of `a`, and no more, removes 31 % [31, 31] of the held-out error; the best "
        "such move in another layer removes 2 % [2, 2]."
    ) in found.reasons
    assert found.numbers["move"] == {
        "layer": "a",
        **{"kind": move.kind, "channel": move.channel, "other": move.other},
        **moves[0].gain.as_dict(),
    }
    alone = judge(TRIALS, QUIET, (), moves[:1], wrong=30, images=N)
    assert any(reason.endswith("31 % [31, 31] of the held-out error.") for reason in alone.reasons)


def test_moves_of_another_layer_than_the_one_blamed_are_not_told() -> None:
    found = judge(TRIALS, QUIET, (), [moving("a", 0.05), moving("b", 0.049)], wrong=30, images=N)
    assert found.layers[0] == "b"
    assert not any("channel" in reason for reason in found.reasons)
    assert "move" not in found.numbers
