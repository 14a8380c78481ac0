"""Blame: how likely each layer is the one at fault, from evidence and trials together.

No single score finds every fault. Where batch norms remember what the network was trained with, the
onset of drift says most, and the trial of the weights decides among layers that no batch norm
follows. Without that memory, the trial of the channels says most, beside channels that have fallen
silent and weights that stand out. Channels that were mixed up show in either by what moving them
back does. A conditional logit (McFadden 1974) joins them: each layer's score is a weighted sum, and
the shares of blame are their softmax over the layers.

The weights were fitted on planted faults, but for those of layers that images without an artefact
clear (one in twenty layers at fault) and of signs and moves beside batch norm, which were set; all
are judged on others (ARCHITECTURE.md, `benchmarks/localize.py`). A share is therefore a probability
for faults like those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from audit.evidence import LayerEvidence
from audit.moves import ChannelMove, standing_out
from audit.trials import TrialRepair, ranking

__all__ = [
    "CLEARED_ONSET",
    "FIRST_ONSET",
    "has_memory",
    "layer_features",
    "promising",
    "shares_of_blame",
    "suspects",
]

WITH_MEMORY = {
    "onset": 4.4,
    "trial": 3.2,
    "silent": 3.5,
    "cleared": -3.0,
    "signs": 8.0,
    "moves": 8.0,
}
WITHOUT_MEMORY = {"silent": 3.5, "channels": 3.1, "moves": 3.2, "norm": 4.0}

CLEARED_ONSET = 0.4
"""Onset of drift below which a layer is cleared, on images without the artefact: there a layer that
was taught the artefact drifts, and it was seen to by more (ARCHITECTURE.md)."""

FIRST_ONSET = 0.75
"""Unexplained onset below which a first layer's drift says nothing: photographs that differ from
those of the training were seen to leave up to .5 unexplained, damage that costs five points .9 and
more, but for changed signs and noise half as large as the weights (ARCHITECTURE.md)."""

_MOST_ONSET = 3.0
_MANY_SILENT = 0.1  # of the channels
_SURE_OUTLIER = 2.0  # -log10 p: one in a hundred says all that a norm can say


def has_memory(evidence: Sequence[LayerEvidence]) -> bool:
    """Return whether batch norms follow at least half of the convolutions."""
    convolutions = [one for one in evidence if one.layer.has_maps]
    return sum(not math.isnan(one.drift) for one in convolutions) * 2 >= max(len(convolutions), 1)


def layer_features(
    evidence: Sequence[LayerEvidence],
    trials: Sequence[TrialRepair],
    channel_trials: Sequence[TrialRepair],
    moves: Sequence[ChannelMove] = (),
) -> dict[str, list[float]]:
    """Return what the blame weighs: by feature, one value a layer.

    ``onset`` of drift, in [0, 3]; ``cleared`` 1 where images without the artefact show that the
    layer was not taught it, else 0; ``signs`` the onset of the drift that changed signs explain, in
    [0, 1]; ``silent`` in [0, 1], full from a tenth of the channels on; ``trial`` one over the rank
    of the weight trial; ``channels`` one over the rank of the channel trial, mean over its rounds;
    ``moves`` of the layer whose channel move does most its lead, in [0, 1], 0 of all others;
    ``norm`` in [0, 1], how surely the weights' norm is above the others', full where p is 0.01.
    """
    names = [one.layer.name for one in evidence]
    return {
        "onset": [_onset(one) for one in evidence],
        "cleared": [_cleared(one) for one in evidence],
        "signs": [_signs(one) for one in evidence],
        "silent": [_silent(one) for one in evidence],
        "trial": _by_trial(names, trials),
        "channels": _by_channels(names, channel_trials),
        "moves": _by_moves(names, moves),
        "norm": [_by_norm(one) for one in evidence],
    }


def shares_of_blame(
    evidence: Sequence[LayerEvidence],
    trials: Sequence[TrialRepair],
    channel_trials: Sequence[TrialRepair],
    moves: Sequence[ChannelMove] = (),
) -> dict[str, float]:
    """Return each layer's share of the blame, by name; together they are 1.

    Args:
        evidence: Of every layer.
        trials: Of their weights; a layer that was not tried ranks behind those that were.
        channel_trials: Of their channels; takes part only where there is no memory.
        moves: Of their channels.
    """
    names = [one.layer.name for one in evidence]
    features = layer_features(evidence, trials, channel_trials, moves)
    weights = WITH_MEMORY if has_memory(evidence) else WITHOUT_MEMORY
    scores = sum(weight * np.array(features[key]) for key, weight in weights.items())
    odds = np.exp(scores - np.max(scores))
    return dict(zip(names, (odds / odds.sum()).tolist(), strict=True))


def promising(evidence: Sequence[LayerEvidence], moves: Sequence[ChannelMove] = ()) -> list[str]:
    """Return the names of all layers, those first that trials should reach.

    By the blame that evidence and moves alone give; where that is equal, by how the gradients rank
    them.
    """
    blame = shares_of_blame(evidence, (), (), moves)
    by_gradients = dict.fromkeys(blame, 0.0)
    scores: tuple[Callable[[LayerEvidence], float], ...] = (
        lambda one: one.relative_gradient_norm,
        lambda one: one.gradient_snr,
        lambda one: one.gradient_agreement,
        lambda one: one.gradient_conflict,
    )
    for score in scores:
        known = [one for one in evidence if not math.isnan(score(one))]
        for place, one in enumerate(sorted(known, key=score, reverse=True), start=1):
            by_gradients[one.layer.name] += 1 / place
    return sorted(blame, key=lambda name: (-blame[name], -by_gradients[name]))


def suspects(shares: Mapping[str, float], level: float) -> tuple[str, ...]:
    """Return the fewest layers that have this much of the blame together, most blamed first."""
    chosen: list[str] = []
    total = 0.0
    for name in sorted(shares, key=lambda name: -shares[name]):
        chosen.append(name)
        total += shares[name]
        if total >= level:
            break
    return tuple(chosen)


def _silent(one: LayerEvidence) -> float:
    if math.isnan(one.silent_channels):
        return 0.0
    return min(one.silent_channels / _MANY_SILENT, 1.0)


def _onset(one: LayerEvidence) -> float:
    """Of first layers what no change of the photographs explains, where that is much: these need
    not be like those of the training even where they show no artefact."""
    least = FIRST_ONSET if one.first_in_line else 0.0
    value = one.telling_onset
    return min(value, _MOST_ONSET) if value >= least else 0.0  # NaN is not


def _cleared(one: LayerEvidence) -> float:
    """First layers are left out here too: what they drift by when taught an artefact is little."""
    told = one.without_artefact and not one.first_in_line
    return float(told and one.drift_onset < CLEARED_ONSET)  # NaN is not


def _signs(one: LayerEvidence) -> float:
    return min(one.signs_onset, 1.0) if one.signs_onset > 0 else 0.0  # NaN is not


def _by_norm(one: LayerEvidence) -> float:
    if math.isnan(one.norm_outlier):
        return 0.0
    return min(one.norm_outlier / _SURE_OUTLIER, 1.0)


def _by_moves(names: Sequence[str], moves: Sequence[ChannelMove]) -> list[float]:
    """The lead is how much more a layer's move removes than the next best layer's, as a share of
    what it removes."""
    order = standing_out(moves)
    if not order:
        return [0.0 for _ in names]
    next_best = max((one.gain.value for one in order[1:]), default=0.0)
    lead = 1 - max(next_best, 0.0) / order[0].gain.value
    return [lead if name == order[0].layer.name else 0.0 for name in names]


def _by_trial(names: Sequence[str], trials: Sequence[TrialRepair]) -> list[float]:
    order = [trial.layer.name for trial in ranking(trials)]
    return [1 / (order.index(name) + 1) if name in order else 1 / len(names) for name in names]


def _by_channels(names: Sequence[str], trials: Sequence[TrialRepair]) -> list[float]:
    """Mean over the rounds of one over the layer's rank; ties share the worse rank."""
    rounds = max((len(trial.gains) for trial in trials), default=0)
    tried = {trial.layer.name: trial.gains for trial in trials}
    found = []
    for name in names:
        own = tried.get(name, ())
        ranks = [
            sum(len(other) > at and other[at] >= own[at] for other in tried.values())
            if at < len(own)
            else len(names)
            for at in range(rounds)
        ]
        found.append(float(np.mean([1 / rank for rank in ranks])) if ranks else 0.0)
    return found
