"""A proxy where nobody marked the object: does the region that a map keeps carry the true class?

Insertion and deletion of Petsiuk et al. 2018 ("RISE", section 4.1), for the true class and at a few
sizes of the region instead of every pixel: the pixels where the map is highest are shown alone,
everything else replaced by a baseline (insertion), or are replaced themselves (deletion).

This judges whether the map shows what the *network* uses, not whether that is the object: a map on
a watermark that the network obeys is faithful, and a mask would call it inaccurate. So it stands in
for masks and votes under the name "proxy" only. `benchmarks/proxy.py` chose insertion over a
blurred image, and found even that to agree poorly with masks: the probability that the network
gives the true class on the whole image, without any map, tells accurate maps apart better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.saliency import resize_maps

__all__ = [
    "BASELINE",
    "FAITHFULNESS_THRESHOLD",
    "FRACTIONS",
    "Baseline",
    "RegionEvidence",
    "faithfulness",
    "kept_regions",
    "region_evidence",
]

Baseline = Literal["blur", "mean"]

FRACTIONS = (0.1, 0.3)
BASELINE: Baseline = "blur"
FAITHFULNESS_THRESHOLD = 0.99
"""Where agreement with masks was best on the tuning seed of `benchmarks/proxy.py`."""

_BLUR = 0.05  # standard deviation of the blur, as a share of the image's short side


@dataclass(frozen=True, kw_only=True)
class RegionEvidence:
    """log p of the true class with only the kept region shown, and with it taken away, (F, B)."""

    kept: Tensor
    removed: Tensor


def faithfulness(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    *,
    fractions: Sequence[float] = FRACTIONS,
    baseline: Baseline = BASELINE,
) -> Tensor:
    """Return how surely the kept region alone is taken for the true class, (B,) in [0, 1].

    mean over fractions of p(true | the region, everything else replaced)

    Differs from source: the mean over a few sizes of the region, not the area under the curve over
    all. A map that is zero everywhere keeps nothing and is judged by the baseline alone.

    Args:
        predict: Normalized images (B, 3, H, W) -> logits (B, K); called once per fraction.
        images: Normalized, (B, 3, H, W).
        targets: The true class of each, int64 (B,).
        maps: Saliency >= 0, (B, h, w), any size.
        fractions: Shares of the image that the region may take.
        baseline: What replaces pixels: the image blurred, or its mean color.
    """
    canvas = _canvas(images, baseline)
    kept = [
        _log_p(predict, torch.where(region, images, canvas), targets).exp()
        for region in _regions(maps, images, fractions)
    ]
    return torch.stack(kept).mean(dim=0)


def region_evidence(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    *,
    fractions: Sequence[float],
    baseline: Baseline,
) -> RegionEvidence:
    """Return insertion and deletion at each fraction; arguments as in `faithfulness`."""
    canvas = _canvas(images, baseline)
    kept, removed = [], []
    for region in _regions(maps, images, fractions):
        kept.append(_log_p(predict, torch.where(region, images, canvas), targets))
        removed.append(_log_p(predict, torch.where(region, canvas, images), targets))
    return RegionEvidence(kept=torch.stack(kept), removed=torch.stack(removed))


def kept_regions(maps: Tensor, size: tuple[int, int], fraction: float) -> Tensor:
    """Return the highest `fraction` of each map's pixels, enlarged to `size`, (B, H, W) bool.

    Pixels where the map is zero are never kept, so that the region may be smaller.
    """
    enlarged = resize_maps(maps, size)
    flat = enlarged.flatten(1)
    pixels = flat.shape[1]
    kept = min(max(round(fraction * pixels), 1), pixels)
    floor = flat.kthvalue(pixels - kept + 1, dim=1).values
    return (enlarged >= floor[:, None, None]) & (enlarged > 0)


def _regions(maps: Tensor, images: Tensor, fractions: Sequence[float]) -> list[Tensor]:
    size = (images.shape[2], images.shape[3])
    return [kept_regions(maps, size, fraction).unsqueeze(1) for fraction in fractions]


def _canvas(images: Tensor, baseline: Baseline) -> Tensor:
    if baseline == "mean":
        return images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    deviation = _BLUR * min(images.shape[2:])
    radius = math.ceil(3 * deviation)
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-((places / deviation) ** 2) / 2)
    weights = weights / weights.sum()
    channels = images.shape[1]
    for shape, padding in (
        ((1, 1, -1, 1), (0, 0, radius, radius)),
        ((1, 1, 1, -1), (radius, radius, 0, 0)),
    ):
        kernel = weights.view(shape).expand(channels, -1, -1, -1)
        images = F.conv2d(F.pad(images, padding, mode="replicate"), kernel, groups=channels)
    return images


def _log_p(predict: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        logits = predict(images)
    return logits.double().log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
