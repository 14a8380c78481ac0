"""Was the repair worth it? Paired tests on held-out images, and a decision in plain sentences.

The same test images are classified before, after, and by the control. A repair is accepted when it
fixes significantly more images than it breaks (exact McNemar test), or lowers the cross entropy
materially and with an interval that excludes zero, at no real cost in accuracy; and if no class
collapses. The penalty is judged by the same tests against plain cross entropy on the same layer,
and the choice of maps and layer against the further controls of `repair.controls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from audit.statistics import (
    Interval,
    McNemar,
    accuracy_difference,
    bootstrap_mean,
    classification_metrics,
    mcnemar,
    wilson,
)

SIGNIFICANCE = 0.05
TOLERATED_ACCURACY_LOSS = 0.01  # how low the interval may reach where cross entropy is the gain
# Less cross entropy than both is certain in a paired test, yet worth nothing.
MATERIAL_SHARE = 0.01
MATERIAL_NATS = 0.005
COLLAPSE_DROP = 0.10  # of one class's accuracy; smaller drops are noise or a fair price
COLLAPSE_SHARE = 0.5  # a class that keeps less than this share of its accuracy has collapsed
COLLAPSE_IMAGES = 3  # ... if at least so many of its images were lost

Verdict = Literal["accepted", "rejected"]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a network said about labelled images: each field one value per image, (N,).

    Attributes:
        labels: True class, int64.
        predicted: Class of the largest logit, int64.
        p_true: Probability of the true class, [0, 1].
        cross_entropies: -log p of the true class, nats.
        p_predicted: Probability of the predicted class, [0, 1]; None where it was not kept.
    """

    labels: np.ndarray
    predicted: np.ndarray
    p_true: np.ndarray
    cross_entropies: np.ndarray
    p_predicted: np.ndarray | None = None

    @property
    def right(self) -> np.ndarray:
        return np.asarray(self.predicted == self.labels)

    def metrics(self, classes: Sequence[str], *, seed: int) -> dict[str, Any]:
        return classification_metrics(
            self.labels, self.predicted, self.cross_entropies, classes, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the second of two networks differs from the first on the same images.

    Attributes:
        accuracy: Second minus first, paired bootstrap interval.
        cross_entropy: Second minus first in nats, paired bootstrap interval; negative is better.
        mcnemar: Images fixed and broken, and the exact two-sided p value.
        material_nats: How much cross entropy counts as a difference at all.
    """

    accuracy: Interval
    cross_entropy: Interval
    mcnemar: McNemar
    material_nats: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy.as_dict(),
            "cross_entropy": self.cross_entropy.as_dict(),
            "mcnemar": self.mcnemar.as_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Accepted or rejected, and the sentences that say why."""

    verdict: Verdict
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PenaltyJudgement:
    """Whether the penalty beat its control, in one sentence."""

    earned: bool
    sentence: str


def compare(first: Predictions, second: Predictions, *, seed: int) -> Difference:
    """Return how `second` differs from `first`; both saw the same images in the same order."""
    if not np.array_equal(first.labels, second.labels):
        raise ValueError("paired tests need the same images in the same order")
    return Difference(
        accuracy=accuracy_difference(first.right, second.right, seed=seed),
        cross_entropy=bootstrap_mean(second.cross_entropies - first.cross_entropies, seed=seed),
        mcnemar=mcnemar(first.right, second.right),
        material_nats=max(MATERIAL_NATS, MATERIAL_SHARE * float(first.cross_entropies.mean())),
    )


def decide(
    before: Predictions,
    after: Predictions,
    difference: Difference,
    classes: Sequence[str],
) -> Decision:
    """Return whether the held-out images speak for the repair."""
    gain = _improvement(difference)
    reasons = [_accuracy_sentence(before, after, difference), _entropy_sentence(difference)]
    collapsed = _collapsed_classes(before, after, classes)
    if gain is None:
        reasons.insert(0, _no_gain_sentence(difference))
    else:
        reasons.insert(0, gain)
        if _worse_fit(difference):
            reasons.append(
                "The cross entropy rose all the same: the network is right more often, "
                "and surer of its errors."
            )
    reasons += collapsed
    verdict: Verdict = "accepted" if gain is not None and not collapsed else "rejected"
    return Decision(verdict=verdict, reasons=tuple(reasons))


def judge_penalty(
    repair: Predictions, control: Predictions, difference: Difference
) -> PenaltyJudgement:
    """Return whether the penalty beat plain cross entropy; `difference` is repair minus control."""
    ours, theirs = _accuracy_text(repair), _accuracy_text(control)
    p = _p_text(difference.mcnemar.p_value)
    if _improvement(difference) is not None:
        numbers = f"{ours} against {theirs} for plain cross entropy on the same layer"
        return PenaltyJudgement(
            earned=True,
            sentence=f"The penalty earned its place: it reached {numbers} (McNemar {p}; cross "
            f"entropy {_signed(difference.cross_entropy)}).",
        )
    numbers = f"plain cross entropy on the same layer reached {theirs} against {ours}"
    if _improvement(_reversed(difference)) is not None:
        return PenaltyJudgement(
            earned=False,
            sentence=f"The penalty did harm: {numbers} with it (McNemar {p}; cross entropy "
            f"{_signed(difference.cross_entropy)} with the penalty).",
        )
    return PenaltyJudgement(
        earned=False,
        sentence=f"The penalty did not earn its place: {numbers} with it (McNemar {p}).",
    )


def judge_control(
    repair: Predictions, control: Predictions, difference: Difference, *, ours: str, theirs: str
) -> str:
    """Return in one sentence whether the repair beat a control; `difference` is repair minus it.

    Args:
        ours: What the repair did, as the subject of the sentence: "true maps".
        theirs: What the control did: "shuffled maps".
    """
    if _improvement(difference) is not None:
        outcome = "beat"
    elif _improvement(_reversed(difference)) is not None:
        outcome = "did worse than"
    else:
        outcome = "did no better than"
    return (
        f"{ours[:1].upper()}{ours[1:]} {outcome} {theirs}: {_accuracy_text(repair)} against "
        f"{_accuracy_text(control)} (McNemar {_p_text(difference.mcnemar.p_value)}; cross entropy "
        f"{_signed(difference.cross_entropy)})."
    )


def judge_changed(before: Predictions, after: Predictions, difference: Difference) -> str:
    """Return in one sentence what a repair did to images that are made counterfactual."""
    return (
        f"On {len(before.labels)} of these images, with other images' pixels where the network "
        f"must not look: {_accuracy_text(before)} right before, {_accuracy_text(after)} after "
        f"(McNemar {_p_text(difference.mcnemar.p_value)}). Go by that where the images as they are "
        "share what misleads the network."
    )


def _improvement(difference: Difference) -> str | None:
    """Return the sentence that says what got better, or None."""
    test = difference.mcnemar
    if test.p_value < SIGNIFICANCE and test.fixed > test.broken:
        return (
            f"It fixed {test.fixed} held-out images and broke {test.broken} "
            f"(McNemar {_p_text(test.p_value)})."
        )
    accuracy_kept = difference.accuracy.low > -TOLERATED_ACCURACY_LOSS
    lowered = difference.cross_entropy.high < 0
    material = -difference.cross_entropy.value >= difference.material_nats
    if lowered and material and accuracy_kept:
        return (
            f"It lowered the held-out cross entropy by {-difference.cross_entropy.value:.3f} nats "
            "without a real loss of accuracy."
        )
    return None


def _no_gain_sentence(difference: Difference) -> str:
    test = difference.mcnemar
    counts = f"fixed {test.fixed} held-out images, broke {test.broken}"
    if test.p_value < SIGNIFICANCE and test.broken > test.fixed:
        return f"It did harm: it {counts} (McNemar {_p_text(test.p_value)})."
    if difference.cross_entropy.high < 0:
        if -difference.cross_entropy.value < difference.material_nats:
            return (
                f"It changed next to nothing: it {counts}, and the cross entropy fell by "
                f"{-difference.cross_entropy.value:.4f} nats, where at least "
                f"{difference.material_nats:.4f} count."
            )
        lowest = 100 * difference.accuracy.low
        return (
            f"It lowered the cross entropy, but may have cost accuracy: {counts}, and the accuracy "
            f"interval reaches {lowest:+.1f} points."
        )
    return f"No improvement was shown: it {counts} (McNemar {_p_text(test.p_value)})."


def _accuracy_sentence(before: Predictions, after: Predictions, difference: Difference) -> str:
    change = difference.accuracy
    return (
        f"Accuracy on {len(before.labels)} held-out images: {_accuracy_text(before)} before, "
        f"{_accuracy_text(after)} after; difference {100 * change.value:+.1f} points "
        f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]."
    )


def _entropy_sentence(difference: Difference) -> str:
    return f"Cross entropy changed by {_signed(difference.cross_entropy)} nats."


def _worse_fit(difference: Difference) -> bool:
    return difference.cross_entropy.low > 0


def _collapsed_classes(
    before: Predictions, after: Predictions, classes: Sequence[str]
) -> list[str]:
    """Return one sentence for each class whose accuracy fell too far to accept any average."""
    sentences = []
    for label in np.unique(before.labels):
        chosen = before.labels == label
        was, now = before.right[chosen], after.right[chosen]
        drop = float(was.mean() - now.mean())
        test = mcnemar(was, now)
        significant = test.p_value < SIGNIFICANCE and test.broken > test.fixed
        halved = (
            now.mean() < COLLAPSE_SHARE * was.mean() and test.broken - test.fixed >= COLLAPSE_IMAGES
        )
        if drop >= COLLAPSE_DROP and (significant or halved):
            sentences.append(
                f"Class {classes[int(label)]} collapsed: {_percent(was.mean())} before, "
                f"{_percent(now.mean())} after ({int(chosen.sum())} images)."
            )
    return sentences


def _reversed(difference: Difference) -> Difference:
    def negated(interval: Interval) -> Interval:
        return Interval(value=-interval.value, low=-interval.high, high=-interval.low)

    test = difference.mcnemar
    return Difference(
        accuracy=negated(difference.accuracy),
        cross_entropy=negated(difference.cross_entropy),
        mcnemar=McNemar(fixed=test.broken, broken=test.fixed, p_value=test.p_value),
        material_nats=difference.material_nats,
    )


def _accuracy_text(predictions: Predictions) -> str:
    interval = wilson(int(predictions.right.sum()), len(predictions.labels))
    return f"{_percent(interval.value)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
