"""Where the network looked before and after a repair, and how alike the two are.

Grad-CAM of the true class at the repaired layer, compared by structural similarity (SSIM; Wang et
al. 2004, Eq. 11 of the paper) as scikit-image computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from audit.saliency import normalize_maps, resize_maps, trainable_maps
from repair.cache import CrossingTensors
from repair.decision import Predictions

if TYPE_CHECKING:
    from audit.networks import Split

GALLERY_SIZE = 24
GALLERY_METHOD = "gradcam"  # whatever was trained on, so that repairs can be held side by side
SSIM_WINDOW = 7  # scikit-image's default; smaller maps are enlarged to hold it

_MAP_BATCH = 128


def true_class_maps(
    split: Split, images: CrossingTensors, parameters: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return the Grad-CAM of each image's true class at the cut, (N, h, w) in [0, 1], on the CPU.

    Args:
        parameters: The layer's values; its present ones when None.
    """
    found = []
    for start in range(0, len(images), _MAP_BATCH):
        rows = torch.arange(start, min(start + _MAP_BATCH, len(images)))
        batch = images.batch(rows)
        maps, _ = trainable_maps(split, batch.crossing, parameters, batch.labels)
        found.append(normalize_maps(maps.detach()).float().cpu())
    return torch.cat(found)


def map_similarity(before: Tensor, after: Tensor) -> np.ndarray:
    """Return the SSIM of each pair of maps (N, h, w) in [0, 1], float64 (N,).

    Maps with a side below the SSIM window are enlarged bilinearly by a whole factor first.
    """
    from skimage.metrics import structural_similarity

    height, width = before.shape[1:]
    factor = math.ceil(SSIM_WINDOW / min(height, width))
    if factor > 1:
        size = (factor * height, factor * width)
        before, after = resize_maps(before, size), resize_maps(after, size)
    return np.array(
        [
            structural_similarity(  # type: ignore[no-untyped-call]
                one, other, win_size=SSIM_WINDOW, data_range=1.0
            )
            for one, other in zip(before.double().numpy(), after.double().numpy(), strict=True)
        ]
    )


def choose_gallery(before: Predictions, after: Predictions, size: int = GALLERY_SIZE) -> list[int]:
    """Return the rows worth looking at, ascending.

    Fixed, broken, still wrong and still right images take turns until `size` are found.
    """
    was, now = before.right, after.right
    kinds = [~was & now, was & ~now, ~was & ~now, was & now]
    queues = [list(np.flatnonzero(kind)) for kind in kinds]
    chosen: list[int] = []
    while len(chosen) < size and any(queues):
        for queue in queues:
            if queue and len(chosen) < size:
                chosen.append(int(queue.pop(0)))
    return sorted(chosen)
