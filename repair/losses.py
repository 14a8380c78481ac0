"""What a repair minimizes: cross entropy, and how much and how wrongly the network looks.

The penalty of Halliwell and Lecue (2020, Eq. 4-7) ties the cross entropy of an image to the mean
S of its saliency map: R1 charges for being wrong while looking at little, R2 for looking at much
while being right. With a mask of the object, the distance of map and mask takes the place of S
(Eq. 8-10). `energy` and `rrr` add to the cross entropy what lies outside the mask: of the map, or
of the squared gradients. Every loss here maps logits, maps, labels and masks to one `LossTerms` per
batch, and `LOSSES` names them all; the command line reads its choices from there.

A mask says where a map may lie, 1 for pixels of the object and 0 for all else; an image without one
has NaN in its place.

Only tensor methods are used and torch is not imported, so `repair --help` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from torch import Tensor

Scale = Literal["classes", "bounded"]
SCALES: tuple[str, ...] = get_args(Scale)

Evidence = Literal["maps", "gradients"]

DARKEST = 1e-6
"""Maps are kept this far from 0 and 1 where their logarithm is taken."""


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """How the terms of a loss are weighed and scaled.

    Attributes:
        balance: The lambda of Eq. 7, in [0, 1].
        scale: `classes` divides CE and S by the number of classes (the paper's footnote 2);
            `bounded` uses maps normalized to [0, 1] and 1 - p_true for CE inside R1 and R2.
            For `rrr`, `classes` sums squared gradients as they are, `bounded` takes their share.
        weight: Of what `energy` and `rrr` add to the cross entropy, at least 0.
        r1: Whether R1 takes part (Table 1's ablation).
        r2: Whether R2 takes part (Table 1's ablation).
    """

    balance: float = 0.9
    scale: Scale = "bounded"
    weight: float = 1.0
    r1: bool = True
    r2: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.balance <= 1.0:
            raise ValueError(f"lambda is {self.balance:g}; expected a number from 0 to 1")
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}; expected one of {', '.join(SCALES)}")
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(f"the weight is {self.weight:g}; expected a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """One value per image, (B,): the loss and what it was made of.

    `cross_entropy` is always in nats, whatever the scale; `saliency`, `r1` and `r2` are as the
    loss used them, and None where it does not know them. `saliency` is what the loss charges for:
    S, the distance of map and mask, or what lies outside the mask.
    """

    loss: Tensor
    cross_entropy: Tensor
    saliency: Tensor | None = None
    r1: Tensor | None = None
    r2: Tensor | None = None


class Terms(Protocol):
    """What a loss is, as a function.

    Args:
        logits: (B, K), floating point.
        maps: What the loss looks at, at least 0, (B, H, W), differentiable: raw saliency maps of
            the true class, or squared gradients. None for losses that look at nothing.
        labels: True classes, int64 (B,), or a probability for each class, (B, K).
        penalty: Weights, scale and switches.
        masks: Where the maps may lie, (B, H, W) in [0, 1]; NaN throughout for images without one.
    """

    def __call__(
        self,
        logits: Tensor,
        maps: Tensor | None,
        labels: Tensor,
        penalty: Penalty,
        masks: Tensor | None = None,
    ) -> LossTerms: ...


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss by its function, what it needs, and one sentence for the reader.

    Attributes:
        terms: The loss of each image.
        description: For help and reports.
        looks_at: Saliency maps, squared gradients at the layer, or nothing.
        needs_masks: Whether it must be told where a map may lie.
        adds_up: Whether maps are charged for beside the cross entropy and not multiplied with it:
            with one mask for all images it does not matter, then, whose map is whose.
    """

    terms: Terms
    description: str
    looks_at: Evidence | None = None
    needs_masks: bool = False
    adds_up: bool = False

    @property
    def needs_maps(self) -> bool:
        """Whether the layer must have a spatial output."""
        return self.looks_at is not None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p of the true class in nats, (B,).

    Args:
        logits: (B, K), floating point.
        labels: True classes, int64 (B,), or a probability for each class, (B, K): then it is the
            mean of -log p over them.
    """
    log_probabilities = logits.log_softmax(dim=1)
    if labels.dim() == 2:
        return -(labels * log_probabilities).sum(dim=1)
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


def pixelwise_cross_entropy(maps: Tensor, masks: Tensor) -> Tensor:
    """Return how far maps are from masks, (B,), in nats, at least 0.

    PWCE_i = -mean over w, h of (M_i log L_i + (1 - M_i) log(1 - L_i))      Source: Eq. 8

    Args:
        maps: In [0, 1], (B, H, W); kept `DARKEST` away from both ends.
        masks: In [0, 1], (B, H, W).
    """
    kept = maps.clamp(DARKEST, 1 - DARKEST)
    return -(masks * kept.log() + (1 - masks) * (1 - kept).log()).flatten(1).mean(dim=1)


def pixel_error(maps: Tensor, masks: Tensor) -> Tensor:
    """Return mean over w, h of M (1 - L) + (1 - M) L, in [0, 1]; arguments as for PWCE.

    It is to PWCE what 1 - p_true is to the cross entropy: the mean of what each pixel lacks.
    """
    return (masks * (1 - maps) + (1 - masks) * maps).flatten(1).mean(dim=1)


def share_outside(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map that lies outside its mask, (B,) in [0, 1].

    One minus the energy-based pointing game (Wang et al. 2020, Eq. 10), as Rao et al. 2023
    ("Studying how to efficiently and effectively guide models with explanations") train on it.
    A map that is zero everywhere lies nowhere: 0.

    Args:
        maps: At least 0, (B, H, W).
        masks: In [0, 1], (B, H, W).
    """
    total = maps.flatten(1).sum(dim=1)
    outside = (maps * (1 - masks)).flatten(1).sum(dim=1)
    return outside / total.where(total > 0, total.new_ones(()))


def trust_terms(
    logits: Tensor,
    maps: Tensor | None,
    labels: Tensor,
    penalty: Penalty,
    masks: Tensor | None = None,
) -> LossTerms:
    """Return the paper's loss for each image; arguments as for `Terms`.

    L = lambda CE + (1 - lambda) S + R1 + R2        Source: Halliwell and Lecue 2020, Eq. 7

    This is (1 + lambda) CE + (2 - lambda) S - 2 S CE: it rewards more S once CE passes
    (2 - lambda) / 2, and more CE once S passes (1 + lambda) / 2. Dividing both by the number
    of classes keeps them below those points for longer, not for ever.

    Differs from source: with scale `bounded`, each map is divided by its maximum first and
    1 - p_true, which cannot pass 1, stands in for CE inside R1 and R2. Then more S is rewarded
    only for p_true < lambda / 2, and errors never while S < (1 + lambda) / 2.

    Raises:
        ValueError: Without maps.
    """
    maps = _given(maps, "trust", "the maps of the true class")
    saliency = mean_saliency(_normalized(maps) if penalty.scale == "bounded" else maps)
    return _penalized(logits, labels, penalty, saliency)


def trust_masks_terms(
    logits: Tensor,
    maps: Tensor | None,
    labels: Tensor,
    penalty: Penalty,
    masks: Tensor | None = None,
) -> LossTerms:
    """Return the paper's loss for images whose object is known; arguments as for `Terms`.

    L = lambda CE + (1 - lambda) PWCE + CE (1 - PWCE) + PWCE (1 - CE)       Source: Eq. 8-10

    An image without a mask has S in place of PWCE, as in `trust`.

    Differs from source: each map is divided by its maximum first, so that it can be held against a
    mask. With scale `bounded`, `pixel_error` stands in for PWCE and, inside R1 and R2, 1 - p_true
    for CE; the unbounded PWCE of a dark map would make R1 reward errors.

    Raises:
        ValueError: Without maps or masks.
    """
    maps = _normalized(_given(maps, "trust-masks", "the maps of the true class"))
    masks, known = _known(_given(masks, "trust-masks", "masks"))
    distance = pixel_error if penalty.scale == "bounded" else pixelwise_cross_entropy
    saliency = distance(maps, masks).where(known, mean_saliency(maps))
    return _penalized(logits, labels, penalty, saliency)


def energy_terms(
    logits: Tensor,
    maps: Tensor | None,
    labels: Tensor,
    penalty: Penalty,
    masks: Tensor | None = None,
) -> LossTerms:
    """Return CE + weight times the map's share outside the mask; arguments as for `Terms`.

    An image without a mask has its cross entropy alone. Source: Rao et al. 2023, Eq. 5.

    Raises:
        ValueError: Without maps or masks.
    """
    maps = _given(maps, "energy", "the maps of the true class")
    masks, known = _known(_given(masks, "energy", "masks"))
    return _charged(logits, labels, penalty, share_outside(maps, masks), known)


def rrr_terms(
    logits: Tensor,
    maps: Tensor | None,
    labels: Tensor,
    penalty: Penalty,
    masks: Tensor | None = None,
) -> LossTerms:
    """Return CE + weight times the squared gradients outside the mask; arguments as for `Terms`.

    L = CE + weight sum over w, h of (1 - M) (d/dA sum over k of log p_k)^2
                                        Source: Ross et al. 2017, "Right for the right reasons"

    An image without a mask has its cross entropy alone.

    Differs from source: A is the layer's output and not the image, so that the frozen part of the
    network is passed once and not in every step. With scale `bounded` it is the share of the
    squared gradients that lies outside, so that one weight suits all layers.

    Raises:
        ValueError: Without gradients or masks.
    """
    maps = _given(maps, "rrr", "the squared gradients of the log probabilities")
    masks, known = _known(_given(masks, "rrr", "masks"))
    if penalty.scale == "bounded":
        outside = share_outside(maps, masks)
    else:
        outside = (maps * (1 - masks)).flatten(1).sum(dim=1)
    return _charged(logits, labels, penalty, outside, known)


def ce_terms(
    logits: Tensor,
    maps: Tensor | None,
    labels: Tensor,
    penalty: Penalty,
    masks: Tensor | None = None,
) -> LossTerms:
    """Return plain cross entropy for each image: the control that looks at nothing."""
    nats = cross_entropy(logits, labels)
    return LossTerms(loss=nats, cross_entropy=nats)


def _penalized(logits: Tensor, labels: Tensor, penalty: Penalty, saliency: Tensor) -> LossTerms:
    """Return Eq. 7 or Eq. 10 for what stands for S there, (B,)."""
    nats = cross_entropy(logits, labels)
    if penalty.scale == "bounded":
        fit, error = nats, 1 - (-nats).exp()
    else:
        classes = logits.shape[1]
        fit = error = nats / classes
        saliency = saliency / classes
    r1 = wrong_and_dark(error, saliency) * float(penalty.r1)
    r2 = right_and_lit(error, saliency) * float(penalty.r2)
    loss = penalty.balance * fit + (1 - penalty.balance) * saliency + r1 + r2
    return LossTerms(loss=loss, cross_entropy=nats, saliency=saliency, r1=r1, r2=r2)


def _charged(
    logits: Tensor, labels: Tensor, penalty: Penalty, outside: Tensor, known: Tensor
) -> LossTerms:
    nats = cross_entropy(logits, labels)
    charged = outside.where(known, outside.new_zeros(()))
    return LossTerms(loss=nats + penalty.weight * charged, cross_entropy=nats, saliency=charged)


def _normalized(maps: Tensor) -> Tensor:
    from audit.saliency import normalize_maps  # imports torch, which the command line must not

    return normalize_maps(maps)


def _known(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the masks with zeros for those that are missing, and which are there, (B,)."""
    missing = masks.isnan()
    return masks.where(~missing, masks.new_zeros(())), ~missing.flatten(1).any(dim=1)


def _given(value: Tensor | None, loss: str, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"the {loss} loss needs {what}")
    return value


LOSSES: dict[str, Loss] = {
    "trust": Loss(
        terms=trust_terms,
        looks_at="maps",
        description="cross entropy with the saliency penalty of Eq. 7",
    ),
    "trust-masks": Loss(
        terms=trust_masks_terms,
        looks_at="maps",
        needs_masks=True,
        description="the same with the distance of map and mask for S (Eq. 8-10)",
    ),
    "energy": Loss(
        terms=energy_terms,
        looks_at="maps",
        needs_masks=True,
        adds_up=True,
        description="cross entropy, and the share of the map outside the mask",
    ),
    "rrr": Loss(
        terms=rrr_terms,
        looks_at="gradients",
        needs_masks=True,
        adds_up=True,
        description="cross entropy, and the squared gradients outside the mask",
    ),
    "ce": Loss(terms=ce_terms, description="plain cross entropy, the penalty's control"),
}
