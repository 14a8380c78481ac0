"""Does a map lie on the object? Scores of saliency maps against masks of the object.

Energy inside is the energy-based pointing game of Wang et al. 2020 ("Score-CAM", section 4.3): the
share of a map that falls on the object. A map without any preference has the object's share of the
image inside, so that share (`mask_areas`) stands beside every energy as what chance gives. The
pointing game of Zhang et al. 2016 ("Top-down neural attention by excitation backprop", section 4.2)
asks only whether a map's peak lies on the object. A map is called accurate when at least half of
its energy is inside, or another share that the caller names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.saliency import resize_maps

__all__ = ["ENERGY_THRESHOLD", "energy_inside", "mask_areas", "pointing_hits"]

ENERGY_THRESHOLD = 0.5


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map that lies on the object, (B,) in [0, 1].

    E_i = sum over w, h of L_i M_i / sum over w, h of L_i        Source: Wang et al. 2020, Eq. 10

    Differs from source: masks instead of boxes where there are any. A map that is zero everywhere
    lies nowhere: 0.

    Args:
        maps: Saliency >= 0, (B, h, w); enlarged bilinearly to the size of the masks.
        masks: How much of each pixel the object covers, (B, H, W) in [0, 1].
    """
    maps, masks = _aligned(maps, masks)
    total = maps.sum(dim=(1, 2))
    inside = (maps * masks).sum(dim=(1, 2))
    return torch.where(total > 0, inside / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def pointing_hits(maps: Tensor, masks: Tensor, *, tolerance: int = 0) -> Tensor:
    """Return whether each map's peak lies on the object, (B,) bool.

    Source: Zhang et al. 2016, who count peaks up to 15 pixels away from the object as hits.
    Differs from source: no tolerance unless one is given. A map without a peak misses.

    Args:
        maps: As in `energy_inside`.
        masks: As in `energy_inside`; a pixel belongs to the object if at least half of it does.
        tolerance: Pixels by which the object is enlarged before the peak is looked up.
    """
    maps, masks = _aligned(maps, masks)
    objects = (masks >= 0.5).to(maps.dtype)
    if tolerance:
        objects = _enlarged(objects, tolerance)
    peaks = maps.flatten(1).argmax(dim=1, keepdim=True)
    hits = objects.flatten(1).gather(1, peaks).squeeze(1) > 0
    return hits & (maps.amax(dim=(1, 2)) > 0)


def mask_areas(masks: Tensor) -> Tensor:
    """Return the object's share of each image: the energy that a map has inside by chance, (B,)."""
    return masks.double().mean(dim=(1, 2))


def _aligned(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    height, width = masks.shape[1:]
    resized = resize_maps(maps.double(), (height, width))
    return resized, masks.to(device=maps.device, dtype=torch.float64)


def _enlarged(objects: Tensor, tolerance: int) -> Tensor:
    """Return objects grown by a disk of the tolerance's radius."""
    reach = torch.arange(-tolerance, tolerance + 1, device=objects.device)
    disk = (reach[:, None] ** 2 + reach[None, :] ** 2 <= tolerance**2).to(objects.dtype)
    grown = F.conv2d(objects.unsqueeze(1), disk[None, None], padding=tolerance)
    return (grown.squeeze(1) > 0.5).to(objects.dtype)
