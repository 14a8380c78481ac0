"""Drift of first layers that no change of the photographs explains.

What a first convolution gives depends on the photographs as much as on its weights: on those unlike
the training's it leaves what its batch norm remembers, though nothing is wrong with it. But it is
linear, so that what another contrast, brightness or color cast would make of its outputs follows
from their means and variances, and another size or sharpness can be tried. Damaged weights give
something that none of these explains: some channels too much, others too little.

    unexplained = min over sizes s, contrasts a and casts b of the drift of conv(a resize(x, s) + b)

Of photographs of other sizes, sharpness, contrast and color, of cats and dogs seen by a network
that knows ImageNet, little is left; of damage nearly all (ARCHITECTURE.md). Changed signs leave
means and variances as they were, and are not seen. This is the project's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.drift import ChannelSums, drift
from audit.networks.program import BatchNorm, Call, Program

__all__ = ["unexplained_drift"]

SIZES = (0.5, 0.5**0.5, 1.0, 2**0.5, 2.0)
CONTRASTS = tuple(float(a) for a in np.geomspace(0.4, 2.5, 41))  # 1 among them
_COLORS = 3
_SMALLEST = 8  # pixels along a side


def unexplained_drift(
    program: Program, batches: Iterable[Tensor], layers: Sequence[str]
) -> dict[str, float]:
    """Return by layer the least drift, in nats, that changed photographs would show.

    Layers that are not convolutions of the image's colors, or that no batch norm follows, are left
    out.

    Args:
        batches: Photographs, normalized, (B, 3, H, W).
    """
    norms = {name: program.batch_norm_after(name) for name in layers}
    known = {name: norm for name, norm in norms.items() if norm is not None}
    sums: dict[str, dict[float, ChannelSums]] = {name: {} for name in known}
    calls: dict[str, Call] = {}
    for images in batches:
        with torch.no_grad():
            made, _ = program.calls(images, list(known))
        for call in made:
            if _takes_colors(call):
                calls[call.layer] = call
                _add(sums[call.layer], call)
    return {
        name: min(_least(of, call, known[name]) for of in sums[name].values())
        for name, call in calls.items()
    }


def _takes_colors(call: Call) -> bool:
    """Whether a layer is a convolution of three channels, each output one of all of them."""
    return call.inputs.dim() == 4 and call.inputs.shape[1] == call.weight.shape[1] == _COLORS


def _add(sums: dict[float, ChannelSums], call: Call) -> None:
    """Add what the layer gives of its inputs at every size."""
    for size in SIZES:
        resized = call.inputs
        if min(resized.shape[-2:]) * size < _SMALLEST:
            continue
        if size != 1:
            resized = F.interpolate(resized, scale_factor=size, mode="bilinear", antialias=True)
        outputs = call.operation(resized, call.weight, call.bias, *call.settings)
        if size not in sums:
            sums[size] = ChannelSums.empty(outputs.shape[1], outputs.device)
        sums[size].add(outputs)


def _least(seen: ChannelSums, call: Call, remembered: BatchNorm) -> float:
    """Return the least drift over contrasts, each with the cast that brings the means closest."""
    bias = torch.zeros_like(seen.mean) if call.bias is None else call.bias.double()
    expected = remembered.mean.double()
    deviations = (remembered.variance.double() + remembered.eps).sqrt()
    casts = call.weight.double().sum(dim=(2, 3))  # what a cast of one gives, by color: (C, 3)
    solve = torch.linalg.pinv(casts / deviations.unsqueeze(1))
    drifts = []
    for contrast in CONTRASTS:
        mean = contrast * (seen.mean - bias) + bias
        mean = mean + casts @ (solve @ ((expected - mean) / deviations))
        changed = ChannelSums(mean, contrast**2 * seen.squares, seen.count)
        drifts.append(drift(changed, remembered))
    return min(drifts)
