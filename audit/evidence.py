"""Evidence: what one pass over the images says about every layer.

One forward and two backward passes a batch give, for all layers at once, the gradient of the cross
entropy by the weights (its norm, its norm relative to the weights, its signal-to-noise ratio over
batches), the map of the true class (how much of it is lit on right and on wrong images, and the
paper's own penalty R1 + R2), and the drift of its output from what the batch norm behind it
remembers. Gradients and maps are known to be weak on their own. The onset of drift is not: where
there is batch norm it names the layer, and the trial repairs of `audit.trials` say whether a repair
is worth it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.drift import ChannelSums, drift, onsets
from audit.networks.layers import Layer
from audit.networks.program import BatchNorm, Program
from audit.saliency import layer_map, normalize_maps, target_scores
from audit.statistics import Interval, auroc

__all__ = ["LayerEvidence", "gather_evidence"]


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """Scores of one layer. Higher points at the layer, but for ``map_mean_right``.

    Attributes:
        gradient_norm: ||g||, g the mean gradient of the cross entropy by the layer's weights.
        relative_gradient_norm: ||g|| / ||w||, Auto-RGN of Lee et al. 2022.
        gradient_snr: Signal-to-noise ratio of the gradient over images, as in Auto-SNR of Lee et
            al. 2022.
        map_mean_right: Mean S of images that the network gets right; NaN without maps.
        map_mean_wrong: The same of images that it gets wrong.
        map_auroc: How well a small S tells wrong images from right ones, 0.5 is chance.
        penalty: Mean R1 + R2 of Eq. 5-6 with the bounded scaling; NaN without maps.
        drift: How far its output is from what the batch norm behind it remembers, in nats; NaN
            without batch norm.
        drift_onset: How many times more it drifts than anything that feeds it, as a logarithm; NaN
            without batch norm.
        first_in_line: True where no layer with batch norm feeds it, so that drift may as well come
            from the images.
    """

    layer: Layer
    gradient_norm: float
    relative_gradient_norm: float
    gradient_snr: float
    map_mean_right: float
    map_mean_wrong: float
    map_auroc: Interval
    penalty: float
    drift: float = math.nan
    drift_onset: float = math.nan
    first_in_line: bool = True


@dataclass
class _Gradients:
    """Running mean and variance of a layer's batch gradients (Chan et al. 1983), float64 sums."""

    mean: Tensor
    squares: Tensor
    images: int = 0
    batches: int = 0

    def add(self, gradient: Tensor, images: int) -> None:
        """Add the mean gradient of a batch of so many images."""
        self.images += images
        self.batches += 1
        change = gradient - self.mean
        self.mean += change * (images / self.images)
        self.squares += images * change * (gradient - self.mean)

    def noise(self) -> float:
        """Variance of one image's gradient, summed over the layer's weights."""
        if self.batches < 2:
            return float("nan")
        return float(self.squares.double().sum()) / (self.batches - 1)


@dataclass
class _Sums:
    gradients: dict[str, _Gradients] = field(default_factory=dict)
    map_means: dict[str, list[Tensor]] = field(default_factory=dict)
    true_probabilities: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    outputs: dict[str, ChannelSums] = field(default_factory=dict)


def gather_evidence(
    program: Program,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: list[Layer],
    *,
    seed: int,
    on_batch: Callable[[Tensor, Mapping[str, Tensor]], None] | None = None,
) -> list[LayerEvidence]:
    """Return the scores of every layer over the images of all batches.

    Memory does not grow with the number of images but for one number per image and layer. Without
    any image every score is NaN.

    Args:
        batches: Normalized images (B, 3, H, W) with their labels (B,).
        layers: Which layers to score.
        seed: Of the bootstrap over images.
        on_batch: Called after each batch with its logits (B, K) and, by layer, its normalized maps
            of the true class (B, h, w).
    """
    sums = _Sums()
    trained = {name: layer for layer in layers for name in layer.parameter_names}
    # Of every layer, whichever are scored: the onset compares with all that come before.
    norms = {x.name: norm for x in program.layers if (norm := program.batch_norm_after(x.name))}
    for images, labels in batches:
        logits, maps = _add_batch(sums, program, images, labels, layers, list(trained), norms)
        if on_batch is not None:
            on_batch(logits, maps)
    drifts = {name: drift(sums.outputs[name], norms[name]) for name in sums.outputs}
    feeding = {name: program.feeding(name) & drifts.keys() for name in drifts}
    started = onsets(drifts, feeding)
    return [
        replace(
            _summarize(sums, program, layer, seed),
            drift=drifts.get(layer.name, math.nan),
            drift_onset=started.get(layer.name, math.nan),
            first_in_line=not feeding.get(layer.name),
        )
        for layer in layers
    ]


def _add_batch(
    sums: _Sums,
    program: Program,
    images: Tensor,
    labels: Tensor,
    layers: list[Layer],
    trained: list[str],
    norms: Mapping[str, BatchNorm],
) -> tuple[Tensor, dict[str, Tensor]]:
    with_maps = [layer.name for layer in layers if layer.has_maps]
    leaves = {name: program.state[name].detach().requires_grad_() for name in trained}
    with torch.enable_grad():
        watched = list(dict.fromkeys([*with_maps, *norms]))
        activations, logits = program.watch(images, watched, leaves)
        by_weight = torch.autograd.grad(
            F.cross_entropy(logits, labels), list(leaves.values()), retain_graph=True
        )
        by_activation = torch.autograd.grad(
            target_scores(logits, labels), [activations[name] for name in with_maps]
        )
    for name in norms:
        output = activations[name].detach()
        if name not in sums.outputs:
            sums.outputs[name] = ChannelSums.empty(output.shape[1], output.device)
        sums.outputs[name].add(output)
    for name, gradient in zip(leaves, by_weight, strict=True):
        if name not in sums.gradients:
            zeros = torch.zeros_like(gradient)
            sums.gradients[name] = _Gradients(zeros, zeros.clone())
        sums.gradients[name].add(gradient, len(labels))
    maps: dict[str, Tensor] = {}
    for name, gradient in zip(with_maps, by_activation, strict=True):
        raw = layer_map(program.layer(name), activations[name].detach(), gradient)
        maps[name] = normalize_maps(raw)
        sums.map_means.setdefault(name, []).append(maps[name].mean(dim=(1, 2)).cpu())
    logits = logits.detach()
    probabilities = logits.softmax(dim=1)
    sums.true_probabilities.append(probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).cpu())
    sums.right.append((logits.argmax(dim=1) == labels).cpu())
    return logits, maps


def _summarize(sums: _Sums, program: Program, layer: Layer, seed: int) -> LayerEvidence:
    if not sums.right:
        return _no_evidence(layer)
    gradients = [sums.gradients[name] for name in layer.parameter_names]
    signal = sum(float(g.mean.double().square().sum()) for g in gradients)
    noise = sum(g.noise() for g in gradients)
    weights = sum(
        float(program.state[name].double().square().sum()) for name in layer.parameter_names
    )
    right = torch.cat(sums.right).numpy()
    nan = float("nan")
    map_mean_right = map_mean_wrong = penalty = nan
    separation = Interval(value=nan, low=nan, high=nan)
    if layer.name in sums.map_means:
        lit = torch.cat(sums.map_means[layer.name]).double().numpy()
        error = 1 - torch.cat(sums.true_probabilities).double().numpy()
        map_mean_right = float(lit[right].mean()) if right.any() else nan
        map_mean_wrong = float(lit[~right].mean()) if not right.all() else nan
        separation = auroc(-lit, ~right, seed=seed)
        penalty = float(np.mean(error * (1 - lit) + lit * (1 - error)))  # Eq. 5 + Eq. 6
    return LayerEvidence(
        layer=layer,
        gradient_norm=signal**0.5,
        relative_gradient_norm=(signal / weights) ** 0.5 if weights else nan,
        gradient_snr=signal / noise if noise else nan,
        map_mean_right=map_mean_right,
        map_mean_wrong=map_mean_wrong,
        map_auroc=separation,
        penalty=penalty,
    )


def _no_evidence(layer: Layer) -> LayerEvidence:
    """What is known about a layer when there was no image to look at."""
    nan = float("nan")
    return LayerEvidence(
        layer=layer,
        gradient_norm=nan,
        relative_gradient_norm=nan,
        gradient_snr=nan,
        map_mean_right=nan,
        map_mean_wrong=nan,
        map_auroc=Interval(value=nan, low=nan, high=nan),
        penalty=nan,
    )
