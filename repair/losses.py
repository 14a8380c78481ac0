"""What a repair minimizes: cross entropy, and how much and how wrongly the network looks.

The penalty of Halliwell and Lecue (2020, Eq. 4-7) ties the cross entropy of an image to the mean
S of its saliency map: R1 charges for being wrong while looking at little, R2 for looking at much
while being right. Every loss here maps logits, maps and labels to one `LossTerms` per batch, and
`LOSSES` names them all; the command line reads its choices from there.

Only tensor methods are used and torch is not imported, so `repair --help` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Scale = Literal["classes", "bounded"]
SCALES: tuple[str, ...] = get_args(Scale)


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """How the terms of Eq. 7 are weighed and scaled.

    Attributes:
        balance: The lambda of Eq. 7, in [0, 1].
        scale: `classes` divides CE and S by the number of classes (the paper's footnote 2);
            `bounded` uses maps normalized to [0, 1] and 1 - p_true for CE inside R1 and R2.
        r1: Whether R1 takes part (Table 1's ablation).
        r2: Whether R2 takes part (Table 1's ablation).
    """

    balance: float = 0.9
    scale: Scale = "bounded"
    r1: bool = True
    r2: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.balance <= 1.0:
            raise ValueError(f"lambda is {self.balance:g}; expected a number from 0 to 1")
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}; expected one of {', '.join(SCALES)}")


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """One value per image, (B,): the loss and what it was made of.

    `cross_entropy` is always in nats, whatever the scale; `saliency`, `r1` and `r2` are as the
    loss used them, and None where the loss does not look at maps.
    """

    loss: Tensor
    cross_entropy: Tensor
    saliency: Tensor | None = None
    r1: Tensor | None = None
    r2: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss by its function, whether it needs maps, and one sentence for the reader."""

    terms: Callable[[Tensor, Tensor | None, Tensor, Penalty], LossTerms]
    needs_maps: bool
    description: str


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p of the true class in nats, (B, K) and (B,) -> (B,)."""
    log_probabilities = logits.log_softmax(dim=1)
    return -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)


def mean_saliency(maps: Tensor) -> Tensor:
    """Return how much of each map is lit, the S of the penalty.

    S_i = mean over w, h of L_i        Source: Halliwell and Lecue 2020, Eq. 4

    Args:
        maps: Saliency maps of the true class, at least 0, (B, H, W).

    Returns:
        One value per image, (B,); in [0, 1] if the maps are.
    """
    return maps.flatten(1).mean(dim=1)


def wrong_and_dark(error: Tensor, saliency: Tensor) -> Tensor:
    """Return R1 = CE (1 - S): wrong, and little of the image was looked at (Eq. 5)."""
    return error * (1 - saliency)


def right_and_lit(error: Tensor, saliency: Tensor) -> Tensor:
    """Return R2 = S (1 - CE): right, and much of the image was looked at (Eq. 6)."""
    return saliency * (1 - error)


def trust_terms(logits: Tensor, maps: Tensor | None, labels: Tensor, penalty: Penalty) -> LossTerms:
    """Return the paper's loss for each image.

    L = lambda CE + (1 - lambda) S + R1 + R2        Source: Halliwell and Lecue 2020, Eq. 7

    This is (1 + lambda) CE + (2 - lambda) S - 2 S CE: it rewards more S once CE passes
    (2 - lambda) / 2, and more CE once S passes (1 + lambda) / 2. Dividing both by the number
    of classes keeps them below those points for longer, not for ever.

    Differs from source: with scale `bounded`, each map is divided by its maximum first and
    1 - p_true, which cannot pass 1, stands in for CE inside R1 and R2. Then more S is rewarded
    only for p_true < lambda / 2, and errors never while S < (1 + lambda) / 2.

    Args:
        logits: (B, K), floating point.
        maps: Raw Grad-CAM maps of the true class, at least 0, (B, H, W), differentiable.
        labels: (B,), int64.
        penalty: Weights, scale and switches.

    Raises:
        ValueError: Without maps.
    """
    if maps is None:
        raise ValueError("the trust loss needs the maps of the true class")
    nats = cross_entropy(logits, labels)
    if penalty.scale == "bounded":
        from audit.saliency import normalize_maps  # imports torch, which the command line must not

        fit, error = nats, 1 - (-nats).exp()
        saliency = mean_saliency(normalize_maps(maps))
    else:
        classes = logits.shape[1]
        fit = error = nats / classes
        saliency = mean_saliency(maps) / classes
    r1 = wrong_and_dark(error, saliency) * float(penalty.r1)
    r2 = right_and_lit(error, saliency) * float(penalty.r2)
    loss = penalty.balance * fit + (1 - penalty.balance) * saliency + r1 + r2
    return LossTerms(loss=loss, cross_entropy=nats, saliency=saliency, r1=r1, r2=r2)


def ce_terms(logits: Tensor, maps: Tensor | None, labels: Tensor, penalty: Penalty) -> LossTerms:
    """Return plain cross entropy for each image: the control that knows no maps."""
    nats = cross_entropy(logits, labels)
    return LossTerms(loss=nats, cross_entropy=nats)


LOSSES: dict[str, Loss] = {
    "trust": Loss(
        terms=trust_terms,
        needs_maps=True,
        description="cross entropy with the saliency penalty of Eq. 7",
    ),
    "ce": Loss(
        terms=ce_terms,
        needs_maps=False,
        description="plain cross entropy, the penalty's control",
    ),
}
