"""The temperature that takes overconfidence out of what a layer learns from.

A network that was trained to the end is surer than it is right. Cross entropy then says little
about what it gets wrong and much about how sure it is: a few confident errors make up most of the
gradient, a layer can lower the loss by making all answers less sure, and the validation images
choose the rate and the epoch that do. Logits that are divided by the temperature at which the cross
entropy of the validation images is lowest before any step leave that nothing to gain; what is left
to learn is the errors. What the network predicts does not depend on it.

Source: Guo et al. 2017, "On calibration of modern neural networks", section 4.2. Differs from
source: fitted before training, for the loss, not after it for the probabilities; at least 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from audit.batches import BatchLimit
from audit.parallel import ALONE, Team
from repair.training import EVALUATION_BATCH

if TYPE_CHECKING:
    from audit.networks import Split
    from repair.cache import CrossingTensors

__all__ = ["LARGEST", "fit_temperature"]

LARGEST = 20.0
_TOLERANCE = 1e-4  # of its logarithm


def fit_temperature(split: Split, validation: CrossingTensors, *, team: Team = ALONE) -> float:
    """Return the temperature at which the mean cross entropy of images is lowest.

    At least 1, for a network that is less sure than it is right is left as it is, and at most
    `LARGEST`; 1 also where there are no images, or where logits are not finite.

    Args:
        split: The network, cut anywhere.
        validation: This process's part of the images.
        team: Processes that share them; all get the same.
    """

    def say(rows: slice) -> tuple[torch.Tensor, ...]:
        batch = validation.batch(torch.arange(rows.start, rows.stop))
        return split.suffix(batch.crossing), batch.labels

    with torch.no_grad():
        said = list(BatchLimit(EVALUATION_BATCH).parts(say, len(validation)))
    device = next(iter(split.parameters.values())).device

    def together(own: float) -> float:
        (total,) = team.sums([torch.tensor([own], dtype=torch.float64, device=device)])
        return float(total)

    def entropy(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return together(sum(_entropy(logits.double() * scale, labels) for logits, labels in said))

    if not together(len(validation)) or not math.isfinite(entropy(0.0)):
        return 1.0
    # Convex in 1 / T, so with one minimum in log T.
    found = minimize_scalar(
        entropy,
        bounds=(0.0, math.log(LARGEST)),
        method="bounded",
        options={"xatol": _TOLERANCE},
    )
    return math.exp(float(found.x))


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(F.cross_entropy(logits, labels, reduction="sum"))
