"""The verdict: what the trial repairs add up to, with its reasons in sentences.

``none``: no trial removes more than trials do on networks without a fault. ``localized``: the
outputs of one layer leave what its batch norm remembers while nothing that feeds it does (the onset
of drift, `audit.drift`), or its trial removes clearly more held-out error than any other's.
``spread``: several layers do about equally well, as often with shortcuts, which any later layer can
undo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from audit.evidence import LayerEvidence
from audit.statistics import Interval
from audit.trials import TrialRepair

__all__ = [
    "FLAG_THRESHOLD",
    "ONSET_THRESHOLD",
    "TIE_MARGIN",
    "Verdict",
    "drift_origin",
    "judge",
    "ranking",
]

FLAG_THRESHOLD = 0.10
"""Share of the held-out error that the best trial must remove, with the lower end of its interval,
before anything is flagged. Trials on healthy networks stay below it (ARCHITECTURE.md)."""

TIE_MARGIN = 0.05
"""Layers whose trials remove within this share of the held-out error of the best one are tied."""

MINIMUM_ERRORS = 5

ONSET_THRESHOLD = 1.25
"""Onset of drift, a logarithm, from which a layer is where drift sets in: 3.5-fold. Layers
of healthy networks stay below it, but for the first ones, which drift when the images do
(ARCHITECTURE.md)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a scan concludes.

    Attributes:
        verdict: The conclusion.
        layers: The layers at fault, best first; empty for ``none``.
        confidence: Share of bootstrap draws of the images in which the best trial stays the best;
            None for ``none``, and where drift named the layer.
        reasons: Plain sentences.
        numbers: What stands behind each reason.
    """

    verdict: Literal["localized", "spread", "none"]
    layers: tuple[str, ...]
    confidence: float | None
    reasons: tuple[str, ...]
    numbers: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "layers": list(self.layers),
            "confidence": self.confidence,
            "reasons": list(self.reasons),
            "numbers": self.numbers,
        }


def ranking(trials: Sequence[TrialRepair]) -> list[TrialRepair]:
    """Return the trials by the share of held-out error that they remove, most first."""
    return sorted(trials, key=lambda trial: trial.gain.value, reverse=True)


def drift_origin(evidence: Sequence[LayerEvidence]) -> LayerEvidence | None:
    """Return the layer where drift sets in most, None where it sets in nowhere.

    The first layers with batch norm are left out: their drift may be that of the images.
    """
    inner = [scores for scores in evidence if not scores.first_in_line]
    most = max(inner, key=lambda scores: scores.drift_onset, default=None)
    return most if most is not None and most.drift_onset >= ONSET_THRESHOLD else None


def judge(
    trials: Sequence[TrialRepair],
    evidence: Sequence[LayerEvidence] = (),
    *,
    steps: int,
    wrong: int,
    images: int,
    seed: int,
) -> Verdict:
    """Return the verdict on the trial repairs of all layers and where drift sets in.

    Args:
        evidence: Scores of the layers; without any the trials decide alone.
        steps: Steps that each trial took.
        wrong: Held-out images that the network gets wrong.
        images: Held-out images that judged the trials.
        seed: Of the bootstrap over images.
    """
    numbers: dict[str, Any] = {
        "held_out_images": images,
        "held_out_wrong": wrong,
        "layers_tried": len(trials),
        "trial_steps": steps,
        "flag_threshold": FLAG_THRESHOLD,
        "tie_margin": TIE_MARGIN,
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
            "onset": origin.drift_onset,
            "threshold": ONSET_THRESHOLD,
        }
    ranked = ranking(trials)
    best = ranked[0]
    numbers["best"] = {"layer": best.layer.name, **best.gain.as_dict()}
    if best.gain.low <= FLAG_THRESHOLD:
        reason = (
            f"No layer's trial repair clearly removes more than {FLAG_THRESHOLD:.0%} of the "
            f"held-out error; the best, `{best.layer.name}`, removes {_percent(best.gain)}."
        )
        remark = (_drift_reason(origin),) if origin is not None else ()
        return _none((reason, *remark), numbers)
    if origin is not None:
        return Verdict(
            verdict="localized",
            layers=(origin.layer.name,),
            confidence=None,
            reasons=(_drift_reason(origin), *_trial_reasons(ranked, origin, steps)),
            numbers=numbers,
        )
    leads = _leads(ranked, seed)
    tied = [best, *(trial for trial, lead in leads if lead.low <= 0 or lead.value < TIE_MARGIN)]
    tied_names = tuple(trial.layer.name for trial in ranked if trial in tied)
    confidence = _share_first(ranked, seed)
    numbers["tied"] = [
        {"layer": trial.layer.name, "gain": trial.gain.as_dict()}
        for trial in ranked
        if trial.layer.name in tied_names
    ]
    numbers["leads"] = [{"layer": trial.layer.name, **lead.as_dict()} for trial, lead in leads[:5]]
    reasons = [_first_reason(ranked, steps)]
    if len(tied) == 1:
        reasons.append(
            f"Its lead over every other layer is at least {leads[0][1].value:.0%} of the held-out "
            "error, and above zero with 95 % confidence."
            if leads
            else "No other layer was tried."
        )
    else:
        reasons.append(
            f"{len(tied)} of {len(trials)} layers do about as well (within {TIE_MARGIN:.0%} of the "
            "held-out error, or not told apart by these images): the fault can be repaired in any "
            "of them, and these images do not say where it came from."
        )
    if best.broken > 0:
        reasons.append(
            f"The trial turns {best.broken:.1%} of the held-out images that were right wrong."
        )
    reasons.append(f"In {confidence:.0%} of redrawn sets of images the same layer comes first.")
    return Verdict(
        verdict="localized" if len(tied) == 1 else "spread",
        layers=tied_names,
        confidence=confidence,
        reasons=tuple(reasons),
        numbers=numbers,
    )


def _none(reasons: tuple[str, ...], numbers: dict[str, Any]) -> Verdict:
    return Verdict(verdict="none", layers=(), confidence=None, reasons=reasons, numbers=numbers)


def _drift_reason(origin: LayerEvidence) -> str:
    times = math.exp(origin.drift_onset)
    return (
        f"The outputs of `{origin.layer.name}` have left what its batch norm remembers from "
        f"training ({origin.drift:.2f} nats a channel), {times:.1f} times as far as those of "
        "anything that feeds it: it was damaged, or retrained alone."
    )


def _trial_reasons(
    ranked: Sequence[TrialRepair], origin: LayerEvidence, steps: int
) -> tuple[str, ...]:
    """Say what a short repair of the layer does, and of the layer where it does most."""
    best = ranked[0]
    own = [trial for trial in ranked if trial.layer.name == origin.layer.name]
    reasons = [
        f"Retraining `{trial.layer.name}` alone for {steps} steps removes {_percent(trial.gain)} "
        "of the held-out error."
        for trial in own
    ]
    if best not in own:
        reasons.append(
            f"A short repair does most in `{best.layer.name}`, {_percent(best.gain)}: another "
            "layer can often undo what the one at fault does."
        )
    return tuple(reasons)


def _first_reason(ranked: Sequence[TrialRepair], steps: int) -> str:
    best = ranked[0]
    sentence = (
        f"Retraining `{best.layer.name}` alone for {steps} steps removes {_percent(best.gain)} "
        "of the held-out error"
    )
    if len(ranked) > 1:
        sentence += (
            f"; the next layer, `{ranked[1].layer.name}`, removes {_percent(ranked[1].gain)}"
        )
    return sentence + "."


def _percent(interval: Interval) -> str:
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:z.0f} % [{low:z.0f}, {high:z.0f}]"  # z: never minus zero


def _leads(ranked: Sequence[TrialRepair], seed: int) -> list[tuple[TrialRepair, Interval]]:
    """How much more of the error the best trial removes than each other one, paired by image."""
    best = ranked[0]
    total = max(float(best.cross_entropies_before.sum()), 1e-12)
    drawn = _draws(best, seed)
    leads = []
    for trial in ranked[1:]:
        difference = trial.cross_entropies_after - best.cross_entropies_after
        low, high = np.percentile(difference[drawn].sum(axis=1) / total, [2.5, 97.5])
        value = float(difference.sum()) / total
        leads.append((trial, Interval(value=value, low=float(low), high=float(high))))
    return leads


def _share_first(ranked: Sequence[TrialRepair], seed: int) -> float:
    after = np.stack([trial.cross_entropies_after for trial in ranked])  # (layers, images)
    drawn = _draws(ranked[0], seed)
    counts = np.stack([np.bincount(draw, minlength=after.shape[1]) for draw in drawn])
    return float((np.argmin(counts @ after.T, axis=1) == 0).mean())


def _draws(trial: TrialRepair, seed: int, resamples: int = 2000) -> np.ndarray:
    images = len(trial.cross_entropies_before)
    return np.random.default_rng(seed).integers(0, images, size=(resamples, images))
