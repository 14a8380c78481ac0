"""What a repair came to beside its controls, as repair.json holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import permutation_test

from audit.statistics import bootstrap_mean
from repair.config import RepairConfig
from repair.controls import PlannedControl
from repair.decision import Difference, Predictions, compare, judge_control, judge_penalty
from repair.training import Trained

if TYPE_CHECKING:
    from audit.networks import Network

_RESAMPLES = 9999
SIGNIFICANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the networks say about the test split, row by row, and where its images stand."""

    before: Predictions
    after: Predictions
    positions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Control:
    """A control that was trained, and what it says about the test split."""

    plan: PlannedControl
    trained: Trained
    predictions: Predictions


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """The repair (`name` is `repair`) or a control again, by another seed."""

    seed: int
    name: str
    predictions: Predictions


def plain_control(controls: Sequence[Control]) -> Control | None:
    """Return the control by plain cross entropy on the same layer, None where it was not run."""
    return next((control for control in controls if control.plan.name == "ce"), None)


def changed_record(
    changed: Judged, difference: Difference, classes: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Return what the networks say about test images that are made counterfactual.

    Held-out images that share a shortcut hold it against a repair that it is gone.
    """
    return {
        "images": len(changed.positions),
        "before": changed.before.metrics(classes, seed=seed),
        "after": changed.after.metrics(classes, seed=seed),
        "difference": difference.as_dict(),
    }


def training_record(trained: Trained) -> dict[str, Any]:
    return {
        "best_epoch": trained.best_epoch,
        "steps": trained.steps,
        "stopped": trained.stopped,
        "seconds": trained.seconds,
    }


def control_record(
    judged: Judged, control: Control, network: Network, *, seed: int
) -> dict[str, Any]:
    """Return a control's numbers, beside the network before and beside the repair."""
    classes, said, plan = network.card.classes, control.predictions, control.plan
    return {
        "name": plan.name,
        "description": plan.description,
        "layer": plan.layer,
        "alias": "" if plan.whole else network.layer(plan.layer).alias,
        "loss": plan.loss,
        "after": said.metrics(classes, seed=seed),
        "difference": compare(judged.before, said, seed=seed).as_dict(),
        "versus_repair": compare(said, judged.after, seed=seed).as_dict(),
        **training_record(control.trained),
    }


def penalty_record(
    judged: Judged,
    controls: Sequence[Control],
    config: RepairConfig,
    *,
    left_out: Sequence[str],
    seeds: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return whether the penalty earned its place, in sentences, the plain control's first.

    Args:
        left_out: A sentence for each control that could not be had.
        seeds: From `seeds_record`; with it, all seeds together decide.
    """
    earned, sentence = _penalty_judgement(judged, plain_control(controls), config)
    further = [
        judge_control(
            judged.after,
            control.predictions,
            compare(control.predictions, judged.after, seed=config.seed),
            ours=control.plan.ours,
            theirs=control.plan.theirs,
        )
        for control in controls
        if control.plan.theirs
    ]
    sentences = [sentence, *further, *left_out]
    if seeds is not None:
        pooled = [row["sentence"] for row in seeds["pooled"]]
        plain = next((row for row in seeds["pooled"] if row["name"] == "ce"), None)
        if plain is not None and earned is not None:
            earned, sentence = plain["beaten"], plain["sentence"]
        sentences = [*pooled, *sentences]
    return {"earned": earned, "sentence": sentence, "sentences": sentences}


def seeds_record(
    judged: Judged, controls: Sequence[Control], repeats: Sequence[Repeat], config: RepairConfig
) -> dict[str, Any] | None:
    """Return every seed's numbers, and the repair beside each repeated control over all of them.

    Per image, the share of seeds that get it right is compared: the interval is a bootstrap over
    images, p that of the paired permutation test on the mean difference. None without repeats.
    """
    if not repeats:
        return None
    said: dict[str, dict[int, Predictions]] = {"repair": {config.seed: judged.after}}
    for control in controls:
        if any(repeat.name == control.plan.name for repeat in repeats):
            said[control.plan.name] = {config.seed: control.predictions}
    for repeat in repeats:
        said[repeat.name][repeat.seed] = repeat.predictions
    rows = [
        {
            "seed": seed,
            "name": name,
            "accuracy": float(predictions.right.mean()),
            "cross_entropy": float(predictions.cross_entropies.mean()),
        }
        for name, by_seed in said.items()
        for seed, predictions in by_seed.items()
    ]
    shares = {
        name: np.mean([one.right for one in by_seed.values()], axis=0)
        for name, by_seed in said.items()
    }
    plans = {control.plan.name: control.plan for control in controls}
    return {
        "seeds": list(said["repair"]),
        "rows": rows,
        "pooled": [
            _pooled(plans[name], shares["repair"], share, len(said["repair"]), config.seed)
            for name, share in shares.items()
            if name != "repair"
        ],
    }


def _pooled(
    plan: PlannedControl, ours: np.ndarray, theirs: np.ndarray, seeds: int, seed: int
) -> dict[str, Any]:
    difference = bootstrap_mean(ours - theirs, seed=seed)
    p_value = paired_p(ours, theirs, seed)
    beaten = p_value < SIGNIFICANCE and difference.value > 0
    lost = p_value < SIGNIFICANCE and difference.value < 0
    outcome = "beat" if beaten else "did worse than" if lost else "did no better than"
    name = "plain cross entropy on the same layer" if plan.name == "ce" else plan.theirs
    subject = "The penalty" if plan.name == "ce" else f"{plan.ours[:1].upper()}{plan.ours[1:]}"
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return {
        "name": plan.name,
        "difference": difference.as_dict(),
        "p_value": p_value,
        "beaten": beaten,
        "sentence": f"Over {seeds} seeds: {subject[:1].lower()}{subject[1:]} {outcome} {name}, "
        f"{100 * ours.mean():.1f} % against {100 * theirs.mean():.1f} %; difference {value:+.1f} "
        f"points [{low:+.1f}, {high:+.1f}] (paired permutation test, p = {p_value:.3f}).",
    }


def paired_p(ours: np.ndarray, theirs: np.ndarray, seed: int) -> float:
    """Return the two-sided p-value of a paired permutation test of two means, (N,) each.

    Exact where a few images differ, else by 9,999 draws.
    """
    differing = ours != theirs  # the others have no part in the test
    if differing.sum() < 2:  # of one pair, both signs are as likely
        return 1.0
    found = permutation_test(
        (ours[differing], theirs[differing]),
        lambda one, other, axis: np.mean(one - other, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=seed,
    )
    return float(found.pvalue)


def _penalty_judgement(
    judged: Judged, plain: Control | None, config: RepairConfig
) -> tuple[bool | None, str]:
    if config.loss_function.looks_at is None:
        return None, "No penalty was used."
    if plain is None:
        return None, "The penalty was not judged: plain cross entropy was not run beside it."
    versus = compare(plain.predictions, judged.after, seed=config.seed)
    judgement = judge_penalty(judged.after, plain.predictions, versus)
    return judgement.earned, judgement.sentence
