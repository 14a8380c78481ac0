"""Evidence: what one pass over the images says about every layer.

One forward and two backward passes a batch give, for all layers at once, each image's gradient of
the cross entropy by the weights (the norm of their mean, alone and relative to the weights; their
signal-to-noise ratio; whether wrong images agree with each other, and whether they oppose the right
ones), the map of the true class (how much of it is lit on right and on wrong images, the paper's
own penalty R1 + R2, and, where masks tell, how much of it lies on the object), and the drift of its
output from what the batch norm behind it remembers. Gradients and maps are known to be weak on
their own. The onset of drift is not: where there is batch norm it names the layer, and the trial
repairs of `audit.trials` say whether a repair is worth it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from audit.drift import ChannelSums, drift, onsets, silent_channels
from audit.image_gradients import Use, add_gradients, error_margins
from audit.map_accuracy import energy_inside, pointing_hits
from audit.map_scores import Objects
from audit.networks.layers import Layer
from audit.networks.program import BatchNorm, Call, Program
from audit.saliency import layer_map, normalize_maps, target_scores
from audit.statistics import Interval, auroc

__all__ = ["LayerEvidence", "gather_evidence"]


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """Scores of one layer. Higher points at the layer, but for ``map_mean_right``.

    Gradients are those by weight and bias as the operation takes them: after weight norm, where a
    layer has one.

    Attributes:
        gradient_norm: ||g||, g the mean over images of the gradient of their cross entropy.
        relative_gradient_norm: ||g|| / ||w||, Auto-RGN of Lee et al. 2022.
        gradient_snr: ||g||^2 / (sum over weights of the variance over images), the
            signal-to-noise ratio of Auto-SNR of Lee et al. 2022; NaN for less than two images.
        gradient_agreement: Mean cosine between the gradients of two different wrong images; NaN
            where there are less than two.
        gradient_conflict: Minus the cosine between the mean gradient of wrong and that of right
            images: 1 where one undoes what the other does; NaN where either kind is missing.
        map_mean_right: Mean S of images that the network gets right; NaN without maps.
        map_mean_wrong: The same of images that it gets wrong.
        map_auroc: How well a small S tells wrong images from right ones, 0.5 is chance.
        penalty: Mean R1 + R2 of Eq. 5-6 with the bounded scaling; NaN without maps.
        energy_inside: Mean share of the map's energy that lies on the object; NaN without masks.
        pointing_game: Share of maps whose peak lies on the object; NaN without masks.
        energy_drop: How much of ``energy_inside`` was lost since the layer before it, of those
            scored that have maps; NaN without masks and for the first.
        drift: How far its output is from what the batch norm behind it remembers, in nats; NaN
            without batch norm.
        drift_onset: How many times more it drifts than anything that feeds it, as a logarithm; NaN
            without batch norm.
        first_in_line: True where no layer with batch norm feeds it, so that drift may as well come
            from the images.
        silent_channels: Share of its output channels that say the same whatever the image; NaN
            without images.
    """

    layer: Layer
    gradient_norm: float
    relative_gradient_norm: float
    gradient_snr: float
    gradient_agreement: float = math.nan
    gradient_conflict: float = math.nan
    map_mean_right: float
    map_mean_wrong: float
    map_auroc: Interval
    penalty: float
    energy_inside: float = math.nan
    pointing_game: float = math.nan
    energy_drop: float = math.nan
    drift: float = math.nan
    drift_onset: float = math.nan
    first_in_line: bool = True
    silent_channels: float = math.nan


@dataclass
class _Gradients:
    """Sums over images of a layer's gradients; they need no more memory for more images.

    Attributes:
        weight_norm: ||w|| of weight and bias together.
        sums: Of the cross entropy's gradients of wrong images, of those of right images, and of
            wrong images' at length one: (3, P).
        squares: Sum of the squared norms of all images.
        directed: How many wrong images have a gradient at all.
    """

    weight_norm: float
    sums: Tensor
    squares: float = 0.0
    directed: int = 0

    @classmethod
    def empty(cls, call: Call) -> _Gradients:
        values = [value.flatten() for value in (call.weight, call.bias) if value is not None]
        norms = [float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in values]
        zeros = torch.zeros(3, sum(map(len, values)), dtype=call.weight.dtype)
        return cls(math.hypot(*norms), zeros.to(call.weight.device))

    def add(self, uses: Sequence[Use], margins: Tensor, right: Tensor) -> None:
        """Add a batch: the layer's uses with the margins' gradients, margins and right, (B,)."""
        # The gradient of the cross entropy is the margin's times this; both have one direction.
        factors = -torch.sigmoid(-margins)
        wrong = (~right).to(factors)
        norms = add_gradients(
            self.sums, uses, torch.stack([factors * wrong, factors * right]), -wrong
        )
        self.squares += float((factors.double() * norms).square().sum())
        self.directed += int((norms[~right] > 0).sum())

    def signal(self, images: int) -> float:
        """Return ||g||^2, g the mean gradient of so many images."""
        return _norm(self.sums[0] + self.sums[1]) ** 2 / images**2

    def noise(self, images: int) -> float:
        """Return the variance over images, summed over the layer's weights."""
        if images < 2:
            return math.nan
        return (self.squares - images * self.signal(images)) / (images - 1)

    def agreement(self) -> float:
        # |sum of u|^2 is the sum of all cosines, and each of the n images has 1 with itself.
        cosines = _norm(self.sums[2]) ** 2 - self.directed
        return _ratio(cosines, self.directed * (self.directed - 1))

    def conflict(self) -> float:
        wrong, right, _ = self.sums
        return _ratio(-float(wrong @ right), _norm(wrong) * _norm(right))


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _ratio(of: float, to: float) -> float:
    return of / to if to > 0 else math.nan


@dataclass
class _Sums:
    gradients: dict[str, _Gradients] = field(default_factory=dict)
    map_means: dict[str, list[Tensor]] = field(default_factory=dict)
    true_probabilities: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    outputs: dict[str, ChannelSums] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    with_object: int = 0


def gather_evidence(
    program: Program,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: list[Layer],
    *,
    seed: int,
    objects: Callable[[], Objects | None] | None = None,
    on_batch: Callable[[Tensor, Mapping[str, Tensor]], None] | None = None,
) -> list[LayerEvidence]:
    """Return the scores of every layer over the images of all batches.

    Memory does not grow with the number of images but for one number per image and layer. Without
    any image every score is NaN.

    Args:
        batches: Normalized images (B, 3, H, W) with their labels (B,).
        layers: Which layers to score.
        seed: Of the bootstrap over images.
        objects: Called for each batch, once it was drawn: where its images' objects are.
        on_batch: Called after each batch with its logits (B, K) and, by layer, its normalized maps
            of the true class (B, h, w).
    """
    sums = _Sums()
    # Of every layer, whichever are scored: the onset compares with all that come before.
    norms = {x.name: norm for x in program.layers if (norm := program.batch_norm_after(x.name))}
    for images, labels in batches:
        logits, maps = _add_batch(sums, program, images, labels, layers, norms)
        if objects is not None and (found := objects()) is not None:
            _add_objects(sums, maps, found)
        if on_batch is not None:
            on_batch(logits, maps)
    inside = {name: energy / sums.with_object for name, energy in sums.energies.items()}
    drops = _drops(inside, layers)
    drifts = {
        name: drift(sums.outputs[name], norms[name]) for name in norms if name in sums.outputs
    }
    silent = {name: silent_channels(outputs) for name, outputs in sums.outputs.items()}
    feeding = {name: program.feeding(name) & drifts.keys() for name in drifts}
    started = onsets(drifts, feeding)
    return [
        replace(
            _summarize(sums, layer, seed),
            energy_inside=inside.get(layer.name, math.nan),
            pointing_game=_ratio(sums.hits.get(layer.name, math.nan), sums.with_object),
            energy_drop=drops.get(layer.name, math.nan),
            drift=drifts.get(layer.name, math.nan),
            drift_onset=started.get(layer.name, math.nan),
            first_in_line=not feeding.get(layer.name),
            silent_channels=silent.get(layer.name, math.nan),
        )
        for layer in layers
    ]


def _add_batch(
    sums: _Sums,
    program: Program,
    images: Tensor,
    labels: Tensor,
    layers: list[Layer],
    norms: Mapping[str, BatchNorm],
) -> tuple[Tensor, dict[str, Tensor]]:
    scored = [layer.name for layer in layers]
    with_maps = [layer.name for layer in layers if layer.has_maps]
    with torch.enable_grad():
        calls, logits = program.calls(images, list(dict.fromkeys([*scored, *norms])))
        margins = error_margins(logits, labels)
        score = target_scores(logits, labels)
    right = logits.detach().argmax(dim=1) == labels
    own = [call for call in calls if call.layer in set(scored)]
    asked = _gradients_by(margins.sum(), own, retain_graph=True)
    for name, uses in groupby(zip(own, asked, strict=True), key=lambda use: use[0].layer):
        together = list(uses)
        if name not in sums.gradients:
            sums.gradients[name] = _Gradients.empty(together[0][0])
        sums.gradients[name].add(together, margins.detach(), right)
    del asked  # as large as all outputs together, and so are the next ones
    last = {call.layer: call for call in calls}
    for name in dict.fromkeys([*scored, *norms]):
        output = last[name].outputs.detach()
        if output.dim() == 3:  # a linear layer's tokens, (B, tokens, C)
            output = output.transpose(1, 2)
        if name not in sums.outputs:
            sums.outputs[name] = ChannelSums.empty(output.shape[1], output.device)
        sums.outputs[name].add(output)
    by_activation = _gradients_by(score, [last[name] for name in with_maps])
    maps: dict[str, Tensor] = {}
    for name, gradient in zip(with_maps, by_activation, strict=True):
        raw = layer_map(program.layer(name), last[name].outputs.detach(), gradient)
        maps[name] = normalize_maps(raw)
        sums.map_means.setdefault(name, []).append(maps[name].mean(dim=(1, 2)).cpu())
    logits = logits.detach()
    probabilities = logits.softmax(dim=1)
    sums.true_probabilities.append(probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).cpu())
    sums.right.append(right.cpu())
    return logits, maps


def _add_objects(sums: _Sums, maps: Mapping[str, Tensor], objects: Objects) -> None:
    masks = objects.masks.double()  # once, not for every layer
    sums.with_object += len(objects.rows)
    for name, found in maps.items():
        chosen = found[objects.rows]
        energy = float(energy_inside(chosen, masks).sum())
        sums.energies[name] = sums.energies.get(name, 0.0) + energy
        sums.hits[name] = sums.hits.get(name, 0) + int(pointing_hits(chosen, masks).sum())


def _drops(inside: Mapping[str, float], layers: Iterable[Layer]) -> dict[str, float]:
    """Return how much less each layer has inside than the one computed before it."""
    names = [x.name for x in sorted(layers, key=lambda x: x.index) if x.name in inside]
    return {name: inside[before] - inside[name] for before, name in pairwise(names)}


def _gradients_by(
    score: Tensor, calls: Sequence[Call], *, retain_graph: bool = False
) -> Sequence[Tensor]:
    """Return the score's gradient by the outputs of each call."""
    if not calls:
        return ()
    outputs = [call.outputs for call in calls]
    return torch.autograd.grad(score, outputs, retain_graph=retain_graph)


def _summarize(sums: _Sums, layer: Layer, seed: int) -> LayerEvidence:
    if not sums.right:
        return _no_evidence(layer)
    right = torch.cat(sums.right).numpy()
    gradients = sums.gradients[layer.name]
    signal = gradients.signal(len(right))
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
        relative_gradient_norm=_ratio(signal**0.5, gradients.weight_norm),
        gradient_snr=_ratio(signal, gradients.noise(len(right))),
        gradient_agreement=gradients.agreement(),
        gradient_conflict=gradients.conflict(),
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
