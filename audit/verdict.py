"""The verdict: what evidence and trial repairs add up to, with its reasons in sentences.

``none``: no trial removes more than trials do on networks without a fault. ``localized``: one layer
has almost all of the blame (`audit.blame`), or has most of it and is where drift sets in
(`audit.drift`). ``spread``: several layers share it, as often with shortcuts, which any later layer
can undo; those are named that have nine tenths of it together, most blamed first. To be repaired
is the most blamed of them whose trial does not clearly do less than the best trial among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from audit.blame import CLEARED_ONSET, shares_of_blame, suspects
from audit.evidence import LayerEvidence
from audit.moves import ChannelMove, Move, standing_out
from audit.statistics import Interval
from audit.trials import TrialRepair, ranking

__all__ = [
    "CHANGED_THRESHOLD",
    "FLAG_THRESHOLD",
    "ONSET_THRESHOLD",
    "SIGNS_THRESHOLD",
    "Verdict",
    "drift_origin",
    "judge",
]

FLAG_THRESHOLD = 0.10
"""Share of the held-out error that the best trial must remove before anything is flagged: with the
lower end of its interval, or with its value where failing images share an artefact. Trials on
healthy networks stay below it (ARCHITECTURE.md)."""

CHANGED_THRESHOLD = 0.09
"""The same, of its value, where the network itself says that it was changed: by drift, by changed
signs or by silent channels. Of tuning faults too small to count at most a twentieth are flagged so
(ARCHITECTURE.md)."""

SILENT_THRESHOLD = 0.2
"""Share of a layer's channels that must be silent to say that the layer was changed. Training
leaves some, which nothing tells apart where no batch norm remembers them: an eighth of the first
layer of EfficientNet-Lite0 with its ImageNet weights."""

MINIMUM_ERRORS = 5

BLAME_LEVEL = 0.9
"""The layers that a verdict names have this much of the blame together (`audit.blame`)."""

ONSET_THRESHOLD = 1.25
"""Onset of drift, a logarithm, from which a layer is where drift sets in: 3.5-fold. Layers
of healthy networks stay below it, but for the first ones, which drift when the images do
(ARCHITECTURE.md)."""

SIGNS_THRESHOLD = 0.5
"""Onset of the drift that changed signs explain from which they say that a layer was changed: where
signs were changed .78 and more, where none were 0 (ARCHITECTURE.md)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a scan concludes.

    Attributes:
        verdict: The conclusion.
        layers: The layers at fault, best first; empty for ``none``.
        flagged: The one of them to repair; None for ``none``.
        confidence: The share of blame of the first layer; None for ``none``.
        reasons: Plain sentences.
        numbers: What stands behind each reason.
    """

    verdict: Literal["localized", "spread", "none"]
    layers: tuple[str, ...]
    flagged: str | None
    confidence: float | None
    reasons: tuple[str, ...]
    numbers: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "layers": list(self.layers),
            "flagged": self.flagged,
            "confidence": self.confidence,
            "reasons": list(self.reasons),
            "numbers": self.numbers,
        }


def drift_origin(evidence: Sequence[LayerEvidence]) -> LayerEvidence | None:
    """Return the layer where drift sets in most, None where it sets in nowhere.

    Of the first layers with batch norm only drift counts that no change of the photographs
    explains.
    """
    known = [scores for scores in evidence if not math.isnan(scores.telling_onset)]
    most = max(known, key=lambda scores: scores.telling_onset, default=None)
    return most if most is not None and most.telling_onset >= ONSET_THRESHOLD else None


def judge(
    trials: Sequence[TrialRepair],
    evidence: Sequence[LayerEvidence],
    channel_trials: Sequence[TrialRepair] = (),
    moves: Sequence[ChannelMove] = (),
    *,
    wrong: int,
    images: int,
    artefacts: int = 0,
    plain: int | None = None,
) -> Verdict:
    """Return the verdict on the trial repairs of all layers and the evidence beside them.

    Args:
        trials: Of the weights of every layer that was reached.
        evidence: Scores of every layer.
        channel_trials: Trials of their channels, where no batch norm remembers the training.
        moves: Of their channels.
        wrong: Held-out images that the network gets wrong.
        images: Held-out images that judged the trials.
        artefacts: How many error groups have an artefact in common among their images, but for one
            of whatever carries it: images may be hard where something covers them, and no layer is
            at fault.
        plain: Images without any error group's artefact, whose drift the evidence has; None where
            it is that of all images.
    """
    numbers: dict[str, Any] = {
        "held_out_images": images,
        "held_out_wrong": wrong,
        "layers_tried": len(trials),
        "trial_steps": max((trial.steps for trial in trials), default=0),
        "flag_threshold": FLAG_THRESHOLD,
        "artefacts": artefacts,
    }
    if not trials or wrong < MINIMUM_ERRORS:
        reason = (
            f"The network gets {wrong} of {images} held-out images wrong; at least "
            f"{MINIMUM_ERRORS} errors are needed to blame a layer for them."
        )
        return _none((reason,), numbers)
    origin = drift_origin(evidence)
    if origin is not None:
        numbers["drift_origin"] = {
            "layer": origin.layer.name,
            "drift": origin.drift,
            "onset": origin.telling_onset,
            "threshold": ONSET_THRESHOLD,
            "plain_images": plain,
        }
    ranked = ranking(trials)
    best = ranked[0]
    numbers["best"] = {"layer": best.layer.name, **best.gain.as_dict()}
    changed = _signs_of_change(evidence, origin)
    signs = [*changed, *(["the artefact that failing images share"] if artefacts else [])]
    threshold = numbers["flag_threshold"] = CHANGED_THRESHOLD if changed else FLAG_THRESHOLD
    if (best.gain.value if signs else best.gain.low) <= threshold:
        reason = (
            f"No layer's trial repair clearly removes more than {_share(threshold)} of the "
            f"held-out error; the best, `{best.layer.name}`, removes {_percent(best.gain)}."
        )
        remark = (_drift_reason(origin, plain),) if origin is not None else ()
        return _none((reason, *remark), numbers)
    found = _blame(evidence, ranked, channel_trials, moves, origin, plain, numbers)
    said = _without_artefact_reasons(evidence, found.layers[0], plain) if origin is None else []
    if best.gain.low <= threshold:
        said.append(_unsettled_reason(best, threshold, signs))
    return replace(found, reasons=(*found.reasons, *said))


def _without_artefact_reasons(
    evidence: Sequence[LayerEvidence], first: str, plain: int | None
) -> list[str]:
    """Say what images without the artefact say of a network where drift sets in at no layer."""
    known = [one for one in evidence if one.without_artefact and not math.isnan(one.drift_onset)]
    if not known:
        return []
    left = [one for one in known if one.drift_onset >= CLEARED_ONSET]
    images = f"On {plain} images without the artefact"
    if not left:
        return [
            f"{images} no outputs have left what the batch norm behind them remembers: the fault "
            "lies in a layer without one, or in none, and images with the artefact are merely new "
            "to the network."
        ]
    return [
        f"{images} the outputs of `{first}` have left what its batch norm remembers "
        f"({one.drift:.2f} nats a channel), and those of {len(known) - len(left)} of {len(known)} "
        "layers have not. No batch norm stands before it, so that these images may also differ "
        "from those of the training."
        for one in left
        if one.layer.name == first and one.first_in_line
    ]


def _unsettled_reason(best: TrialRepair, threshold: float, signs: Sequence[str]) -> str:
    return (
        f"These images alone do not settle that a repair of `{best.layer.name}` removes more than "
        f"{_share(threshold)} ({_percent(best.gain)}); that there is a fault is also said by "
        f"{' and '.join(signs)}."
    )


def _signs_of_change(evidence: Sequence[LayerEvidence], origin: LayerEvidence | None) -> list[str]:
    """Return what says that the network was changed, the trials aside."""
    signs = [f"the drift of `{origin.layer.name}`"] if origin is not None else []
    silent = [one for one in evidence if one.silent_channels >= SILENT_THRESHOLD]  # NaN is not
    if silent:
        most = max(silent, key=lambda one: one.silent_channels)
        signs.append(f"the silent channels of `{most.layer.name}`")
    turned = [one for one in evidence if one.signs_onset >= SIGNS_THRESHOLD]  # NaN is not
    if turned:
        most = max(turned, key=lambda one: one.signs_onset)
        signs.append(f"the changed signs of `{most.layer.name}`")
    return signs


def _blame(
    evidence: Sequence[LayerEvidence],
    ranked: Sequence[TrialRepair],
    channel_trials: Sequence[TrialRepair],
    moves: Sequence[ChannelMove],
    origin: LayerEvidence | None,
    plain: int | None,
    numbers: dict[str, Any],
) -> Verdict:
    """Return the layers that share most of the blame."""
    shares = shares_of_blame(evidence, ranked, channel_trials, moves)
    layers = suspects(shares, BLAME_LEVEL)
    first = layers[0]
    is_origin = origin is not None and origin.layer.name == first
    localized = len(layers) == 1 or is_origin
    if localized:
        layers = layers[:1]
    numbers["blame_level"] = BLAME_LEVEL
    numbers["blame"] = [{"layer": name, "share": shares[name]} for name in layers]
    reasons = [_drift_reason(origin, plain)] if origin is not None and is_origin else []
    reasons += _signs_reasons(evidence, first)
    reasons += _trial_reasons(ranked, first)
    reasons += _channel_reasons(first, channel_trials)
    reasons += _move_reasons(first, moves, numbers)
    flagged = _to_repair(layers, ranked)
    if localized:
        reasons.append(
            f"It has {_share(shares[first])} of the blame: so often was such a layer at fault "
            "among planted faults."
        )
    else:
        reasons.append(
            f"{len(layers)} of {len(evidence)} layers share {_share(BLAME_LEVEL)} of the blame, "
            f"`{first}` has {_share(shares[first])} of it: these images do not say in which of "
            "them the fault lies."
        )
    if flagged != first:
        reasons.append(_instead_reason(ranked, layers, flagged))
    return Verdict(
        verdict="localized" if localized else "spread",
        layers=layers,
        flagged=flagged,
        confidence=shares[first],
        reasons=tuple(reasons),
        numbers=numbers,
    )


def _none(reasons: tuple[str, ...], numbers: dict[str, Any]) -> Verdict:
    return Verdict(
        verdict="none",
        layers=(),
        flagged=None,
        confidence=None,
        reasons=reasons,
        numbers=numbers,
    )


def _to_repair(layers: Sequence[str], ranked: Sequence[TrialRepair]) -> str:
    """Return the most blamed of some layers whose trial gain reaches into the interval of the best.

    Where the blame is shared it does not say which layer can undo the fault, and a repair begun in
    one whose trial clearly does less was seen to wreck the network (ARCHITECTURE.md).

    Args:
        layers: Most blamed first.
        ranked: Trials, best first.
    """
    gains = {trial.layer.name: trial.gain for trial in ranked if trial.layer.name in layers}
    if not gains:
        return layers[0]
    first, best = next(iter(gains.items()))
    within = (name for name in layers if name in gains and gains[name].value >= best.low)
    return next(within, first)


def _drift_reason(origin: LayerEvidence, plain: int | None) -> str:
    where = f", on {plain} images without an artefact" if plain is not None else ""
    left = (
        f"The outputs of `{origin.layer.name}` have left what its batch norm remembers from "
        f"training ({origin.drift:.2f} nats a channel{where})"
    )
    if origin.first_in_line:
        return (
            f"{left}, and no change of the images' size, contrast, brightness or color explains "
            f"{origin.drift_unexplained:.2f} of them: it was damaged, or retrained alone."
        )
    times = math.exp(origin.drift_onset)
    return (
        f"{left}, {times:.1f} times as far as those of anything that feeds it: it was damaged, or "
        "retrained alone."
    )


def _signs_reasons(evidence: Sequence[LayerEvidence], layer: str) -> list[str]:
    """Say that signs were changed, and in which batch norm's memory that shows."""
    scores = {one.layer.name: one for one in evidence}
    turned = scores[layer]
    if not turned.signs_onset >= SIGNS_THRESHOLD:  # NaN is not
        return []
    seen_in = turned.signs_seen_in or layer
    outputs = f"the outputs of `{seen_in}` behind it" if turned.signs_seen_in else "its outputs"
    return [
        f"To change signs of channels of `{layer}` would take back {turned.drift_by_signs:.2f} of "
        f"the {scores[seen_in].drift:.2f} nats a channel by which {outputs} have left what batch "
        "norm remembers: weights have the wrong sign."
    ]


def _channel_reasons(layer: str, channel_trials: Sequence[TrialRepair]) -> list[str]:
    """Say what scaling and shifting its channels does, and where that ranks."""
    order = sorted(channel_trials, key=lambda trial: trial.gain.value, reverse=True)
    return [
        f"Scaling and shifting the channels of `{layer}` alone removes {_percent(trial.gain)} of "
        f"the held-out error, rank {rank} of {len(order)} layers."
        for rank, trial in enumerate(order, start=1)
        if trial.layer.name == layer
    ]


def _move_reasons(layer: str, moves: Sequence[ChannelMove], numbers: dict[str, Any]) -> list[str]:
    """Say what the best move of the layer's channels does, where it is the best of all layers."""
    order = standing_out(moves)
    if not order or order[0].layer.name != layer:
        return []
    best = order[0]
    assert best.move is not None
    numbers["move"] = {"layer": layer, **asdict(best.move), **best.gain.as_dict()}
    sentence = (
        f"To {_told(best.move)} of `{layer}`, and no more, removes {_percent(best.gain)} of the "
        "held-out error"
    )
    if len(order) > 1:
        sentence += f"; the best such move in another layer removes {_percent(order[1].gain)}"
    return [sentence + "."]


def _told(move: Move) -> str:
    if move.kind == "sign":
        return f"change the sign of channel {move.channel}"
    return f"exchange channels {move.channel} and {move.other}"


def _trial_reasons(ranked: Sequence[TrialRepair], layer: str) -> list[str]:
    """Say what a short repair of the layer does, and of the layer where it does most."""
    best, own = ranked[0], [trial for trial in ranked if trial.layer.name == layer]
    broken = [
        f"That repair gets {100 * trial.broken:.1f} % of the held-out images wrong that were right."
        for trial in own
        if trial.broken > 0
    ]
    if best.layer.name == layer:
        return [_first_reason(ranked), *broken]
    return [
        *(f"{_removes(trial)} of the held-out error." for trial in own),
        *broken,
        f"A short repair does most in `{best.layer.name}`, {_percent(best.gain)}: another "
        "layer can often undo what the one at fault does.",
    ]


def _instead_reason(ranked: Sequence[TrialRepair], layers: Sequence[str], flagged: str) -> str:
    """Say why another layer than the most blamed one is to be repaired."""
    named = [trial for trial in ranked if trial.layer.name in layers]
    (own,) = (trial for trial in named if trial.layer.name == flagged)
    best = named[0]
    reach = (
        "does most"
        if best is own
        else f"reaches into the interval of the best one's, {_percent(best.gain)} of "
        f"`{best.layer.name}`"
    )
    tried = any(trial.layer.name == layers[0] for trial in named)
    passed_by = f"that of `{layers[0]}` clearly does less" if tried else f"`{layers[0]}` had none"
    return (
        f"To be repaired is `{flagged}`, of these layers the most blamed whose short repair, "
        f"{_percent(own.gain)}, {reach}; {passed_by}."
    )


def _first_reason(ranked: Sequence[TrialRepair]) -> str:
    sentence = _removes(ranked[0]) + " of the held-out error"
    if len(ranked) > 1:
        sentence += (
            f"; the next layer, `{ranked[1].layer.name}`, removes {_percent(ranked[1].gain)}"
        )
    return sentence + "."


def _removes(trial: TrialRepair) -> str:
    return (
        f"Retraining `{trial.layer.name}` alone for {trial.steps} steps removes "
        f"{_percent(trial.gain)}"
    )


def _share(value: float) -> str:
    # Planted faults were too few to be surer than that.
    return "more than 99 %" if value > 0.99 else f"{100 * value:.0f} %"


def _percent(interval: Interval) -> str:
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:z.0f} % [{low:z.0f}, {high:z.0f}]"  # z: never minus zero
