"""Drift: where activations leave the statistics that the network was trained with.

A batch norm remembers the mean and the variance of what its layer gave it in training. A layer that
was damaged, or retrained alone while its batch norm stood still, gives it something else, and so
does every layer behind it. The layer at fault is therefore where drift sets in: it drifts, and
nothing that feeds it does. Images that differ from those of training drift as well, from the first
layer on; they do not set in at one layer deep inside.

Weights of the wrong sign turn a channel's mean and leave its variance: drift that goes when the
sign is changed back. It may be little beside that of the images, yet little else brings it about.

Source of the drift: the Kullback-Leibler divergence between two normal distributions, per channel;
of batch-norm statistics as a sign of shift, Li et al. 2016, "Revisiting Batch Normalization". The
onset is this project's own (ARCHITECTURE.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from audit.networks.program import BatchNorm

__all__ = [
    "ChannelSums",
    "divergences",
    "drift",
    "drift_by_signs",
    "onset",
    "onsets",
    "signs_onsets",
    "silent_channels",
]

ONSET_FLOOR = 0.03
"""Drift, in nats, that a few hundred images of the training distribution show by chance."""

SILENCE = 1e-3
"""A channel is silent that varies less than this share of the most varied one of its layer."""

BY_SIGNS = 0.5
"""Share of a layer's drift that changed signs must explain: where some were changed .58 and more,
in layers as they were trained .4 at most, whatever the images (ARCHITECTURE.md)."""

_MOST = 50.0  # nats: one channel of no variance must not outweigh all others


@dataclass
class ChannelSums:
    """Running mean and variance of a layer's output over images and places, per channel (C,).

    Batches are merged by Chan et al. 1983, in float64: sums of squares would cancel.
    """

    mean: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> ChannelSums:
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

    def add(self, activations: Tensor) -> None:
        """Add a batch of outputs, (B, C, ...)."""
        others = [axis for axis in range(activations.dim()) if axis != 1]
        variance, mean = torch.var_mean(activations, dim=others, correction=0)
        count = activations.numel() // activations.shape[1]
        total = self.count + count
        change = mean.double() - self.mean
        self.mean += change * (count / total)
        self.squares += variance.double() * count + change**2 * (self.count * count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        return self.squares / max(self.count, 1)


def drift(seen: ChannelSums, remembered: BatchNorm) -> float:
    """Return the mean over channels of KL(seen || remembered), in nats, >= 0.

    KL = (v / s + (m - mu)^2 / s - 1 - log(v / s)) / 2, v and s with the batch norm's own eps.
    """
    return float(divergences(seen, remembered).mean())


def drift_by_signs(seen: ChannelSums, remembered: BatchNorm) -> float:
    """Return how much of the drift goes when the signs of channels are changed, in nats, >= 0.

    The mean over channels of KL((m, v) || remembered) - KL((-m, v) || remembered), where that is
    positive: a channel's sign is changed where it helps.
    """
    turned = replace(seen, mean=-seen.mean)
    gone = divergences(seen, remembered) - divergences(turned, remembered)
    return float(gone.clamp(min=0).mean())


def divergences(seen: ChannelSums, remembered: BatchNorm) -> Tensor:
    """Return KL(seen || remembered) of each channel, in nats, (C,)."""
    variance = seen.variance + remembered.eps
    expected = remembered.variance.double() + remembered.eps
    shift = (seen.mean - remembered.mean.double()) ** 2 / expected
    ratio = variance / expected
    return (0.5 * (ratio + shift - 1 - ratio.log())).clamp(max=_MOST)


def silent_channels(seen: ChannelSums, remembered: BatchNorm | None = None) -> float:
    """Return the share of channels whose output is the same for all images and places, in [0, 1].

    The weights of such a channel are dead or lead nowhere. Channels that died in training are no
    damage; where a batch norm remembers them as silent they do not count.
    """
    silent = _silent(seen.variance)
    if remembered is not None:
        silent &= ~_silent(remembered.variance.double())
    return float(silent.double().mean())


def _silent(variance: Tensor) -> Tensor:
    deviations = variance.clamp(min=0).sqrt()
    return deviations <= SILENCE * deviations.max()


def onsets(drifts: Mapping[str, float], feeding: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Return per layer how many times more it drifts than anything that feeds it, as a logarithm.

    onset = log((d + floor) / (max over the layers that feed it of d + floor)), floor `ONSET_FLOOR`.
    Zero says that the drift came from before; 1 that it grew almost threefold in this layer.

    Args:
        drifts: By layer, NaN where no batch norm follows.
        feeding: By layer, the layers whose output reaches it.
    """
    found = {}
    for name, value in drifts.items():
        before = [drifts[other] for other in feeding[name] if not math.isnan(drifts[other])]
        found[name] = onset(value, max(before, default=0.0))
    return found


def signs_onsets(
    by_signs: Mapping[str, float],
    drifts: Mapping[str, float],
    feeding: Mapping[str, Iterable[str]],
) -> dict[str, float]:
    """Return the onsets of the drift that goes when signs are changed.

    Zero where it is less than `BY_SIGNS` of the drift, and of layers that nothing feeds: the mean
    of what a first layer gives turns with the brightness of the photographs, too.

    Args:
        by_signs: By layer, as `drift_by_signs` gives it.
        drifts: By layer, as `drift` gives it, NaN where no batch norm follows.
        feeding: By layer, the layers whose output reaches it.
    """
    return {
        name: value if feeding[name] and by_signs[name] >= BY_SIGNS * drifts[name] else 0.0
        for name, value in onsets(by_signs, feeding).items()
    }


def onset(drift: float, before: float = 0.0) -> float:
    """Return how many times more something drifts than what came before it, as a logarithm."""
    return math.log((drift + ONSET_FLOOR) / (before + ONSET_FLOOR))
