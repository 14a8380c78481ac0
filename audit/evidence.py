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
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audit.drift import (
    ChannelSums,
    drift,
    drift_by_signs,
    onset,
    onsets,
    signs_onsets,
    silent_channels,
)
from audit.image_gradients import Use, add_gradients, error_margins
from audit.map_accuracy import energy_inside, pointing_hits
from audit.map_scores import Objects
from audit.networks.layers import Layer
from audit.networks.program import BatchNorm, Call, Program
from audit.parallel import Team
from audit.saliency import layer_map, normalize_maps, target_scores
from audit.statistics import Interval, auroc
from audit.weight_norms import norm_outliers

__all__ = ["Gathering", "LayerEvidence", "channel_sums", "drift_over", "gather_evidence"]


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
        drift_unexplained: Of a first layer that drifts, the drift that no change of the photographs
            explains, in nats (`audit.photo_changes`); NaN of others, and where it is not known.
        drift_by_signs: How much of the drift goes when signs of its channels are changed, in nats;
            NaN without batch norm.
        signs_onset: How many times more that is than of anything that feeds it, as a logarithm; 0
            where it is less than half of the drift and of first layers, NaN without batch norm.
        signs_seen_in: The depthwise convolution behind it of whose drift the two before are
            (`audit.signs_behind`); empty where they are of its own.
        without_artefact: True where the drift is that of images without the artefact that failing
            images share.
        silent_channels: Share of its output channels that say the same whatever the image, and
            did not in training as far as a batch norm remembers; NaN without images.
        norm_outlier: How surely its weights' norm is above that of the other convolutions, as
            -log10 of a p-value (`audit.weight_norms`), >= 0; NaN of linear layers and where there
            are too few to compare.
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
    drift_unexplained: float = math.nan
    drift_by_signs: float = math.nan
    signs_onset: float = math.nan
    signs_seen_in: str = ""
    without_artefact: bool = False
    silent_channels: float = math.nan
    norm_outlier: float = math.nan

    @property
    def telling_onset(self) -> float:
        """Onset of the drift that speaks of the layer and not of the images; NaN where none is
        known."""
        return onset(self.drift_unexplained) if self.first_in_line else self.drift_onset


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

    Without any image every score is NaN.

    Args:
        batches: Normalized images (B, 3, H, W) with their labels (B,).
        layers: Which layers to score.
        seed: Of the bootstrap over images.
        objects: Called for each batch, once it was drawn: where its images' objects are.
        on_batch: Called after each batch with its logits (B, K) and, by layer, its normalized maps
            of the true class (B, h, w).
    """
    gathering = Gathering(program, layers)
    for images, labels in batches:
        found = gathering.add(images, labels, objects=objects() if objects else None)
        if on_batch is not None:
            on_batch(*found)
    return gathering.scores(seed=seed)


def drift_over(
    evidence: Sequence[LayerEvidence], program: Program, batches: Iterable[Tensor]
) -> list[LayerEvidence]:
    """Return the evidence with the drift that images without the artefact show in place of its own.

    Args:
        batches: These images, normalized, (B, 3, H, W).
    """
    norms = _norms(program)
    drifts, _ = _drifts(program, norms, channel_sums(program, batches, list(norms)))
    return [
        replace(one, **drifts.get(one.layer.name, {}), without_artefact=True) for one in evidence
    ]


def channel_sums(
    program: Program, batches: Iterable[Tensor], layers: Sequence[str]
) -> dict[str, ChannelSums]:
    """Return by layer the means and variances of its outputs over all images.

    Args:
        batches: Normalized, (B, 3, H, W).
    """
    outputs: dict[str, ChannelSums] = {}
    for images in batches:
        with torch.no_grad():
            watched, _ = program.watch(images, layers)
        for name, values in watched.items():
            channels = _channels_second(values)
            if name not in outputs:
                outputs[name] = ChannelSums.empty(channels.shape[1], channels.device)
            outputs[name].add(channels)
    return outputs


def _norms(program: Program) -> dict[str, BatchNorm]:
    """Return the batch norm behind each layer that has one."""
    found = {layer.name: program.batch_norm_after(layer.name) for layer in program.layers}
    return {name: norm for name, norm in found.items() if norm is not None}


def _drifts(
    program: Program, norms: Mapping[str, BatchNorm], outputs: Mapping[str, ChannelSums]
) -> tuple[dict[str, dict[str, Any]], dict[str, frozenset[str]]]:
    """Return by layer with batch norm what is said of its drift, and which others feed it."""
    seen = {name: (outputs[name], norm) for name, norm in norms.items() if name in outputs}
    feeding = {name: program.feeding(name) & seen.keys() for name in seen}
    drifts = {name: drift(*of) for name, of in seen.items()}
    by_signs = {name: drift_by_signs(*of) for name, of in seen.items()}
    columns = {
        "drift": drifts,
        "drift_onset": onsets(drifts, feeding),
        "drift_by_signs": by_signs,
        "signs_onset": signs_onsets(by_signs, drifts, feeding),
    }
    return {name: {key: of[name] for key, of in columns.items()} for name in seen}, feeding


class Gathering:
    """Evidence under way: sums over the images seen so far, and a few numbers of each.

    Memory does not grow with the number of images but for one number per image and layer. A
    gathering can be interrupted (`state`, `restore`) and shared by several processes (`share`).

    Args:
        layers: Which layers to score.
    """

    def __init__(self, program: Program, layers: Sequence[Layer]) -> None:
        self._program = program
        self._layers = list(layers)
        # Of every layer, whichever are scored: the onset compares with all that come before.
        self._norms = _norms(program)
        scored = [layer.name for layer in layers]
        self._scored = frozenset(scored)
        self._watched = list(dict.fromkeys([*scored, *self._norms]))
        self._with_maps = [layer.name for layer in layers if layer.has_maps]
        self._gradients: dict[str, _Gradients] = {}
        self._outputs: dict[str, ChannelSums] = {}
        self._energies = dict.fromkeys(self._with_maps, 0.0)
        self._hits = dict.fromkeys(self._with_maps, 0)
        self._with_object = 0
        # Of each image: right, p of the true class, S by layer. And where it stands among all.
        self._rows: list[Tensor] = []
        self._keys: list[Tensor] = []

    def add(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        objects: Objects | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a batch; return its logits (B, K) and its maps of the true class by layer (B, h, w).

        Args:
            images: Normalized, (B, 3, H, W), with labels (B,).
            objects: Where their objects are.
            keys: Where they stand among the images of all processes, int64 (B,); in the order in
                which they come when None.
        """
        with torch.enable_grad():
            calls, logits = self._program.calls(images, self._watched)
            margins = error_margins(logits, labels)
            score = target_scores(logits, labels)
        right = logits.detach().argmax(dim=1) == labels
        self._prepare(calls)
        own = [call for call in calls if call.layer in self._scored]
        asked = _gradients_by(margins.sum(), own, retain_graph=True)
        for name, uses in groupby(zip(own, asked, strict=True), key=lambda use: use[0].layer):
            self._gradients[name].add(list(uses), margins.detach(), right)
        del asked  # as large as all outputs together, and so are the next ones
        last = {call.layer: call for call in calls}
        for name in self._watched:
            self._outputs[name].add(_channels_second(last[name].outputs.detach()))
        by_activation = _gradients_by(score, [last[name] for name in self._with_maps])
        maps: dict[str, Tensor] = {}
        for name, gradient in zip(self._with_maps, by_activation, strict=True):
            raw = layer_map(self._program.layer(name), last[name].outputs.detach(), gradient)
            maps[name] = normalize_maps(raw)
        logits = logits.detach()
        true = logits.softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
        means = [maps[name].mean(dim=(1, 2)) for name in self._with_maps]
        self._rows.append(torch.stack([right.to(true), true, *means], dim=1).cpu())
        if keys is None:
            keys = torch.arange(len(images)) + sum(map(len, self._keys))
        self._keys.append(keys)
        if objects is not None:
            self._add_objects(maps, objects)
        return logits, maps

    def scores(self, *, seed: int) -> list[LayerEvidence]:
        """Return the scores of every layer over the images so far.

        Args:
            seed: Of the bootstrap over images.
        """
        inside = {}
        if self._with_object:
            inside = {name: of / self._with_object for name, of in self._energies.items()}
        drops = _drops(inside, self._layers)
        drifts, feeding = _drifts(self._program, self._norms, self._outputs)
        silent = {
            name: silent_channels(outputs, self._norms.get(name))
            for name, outputs in self._outputs.items()
        }
        norms = norm_outliers(self._program)
        rows = self._ordered_rows()
        return [
            replace(
                self._summarize(layer, rows, seed),
                energy_inside=inside.get(layer.name, math.nan),
                pointing_game=_ratio(self._hits.get(layer.name, math.nan), self._with_object),
                energy_drop=drops.get(layer.name, math.nan),
                **drifts.get(layer.name, {}),
                first_in_line=not feeding.get(layer.name),
                silent_channels=silent.get(layer.name, math.nan),
                norm_outlier=norms.get(layer.name, math.nan),
            )
            for layer in self._layers
        ]

    # ---------------------------------------------------------------- interrupted, and shared

    @property
    def size_bytes(self) -> int:
        """About how much `state` holds."""
        sums = sum(of.sums.numel() * of.sums.element_size() for of in self._gradients.values())
        return sums + sum(rows.numel() * rows.element_size() for rows in self._rows)

    def state(self) -> dict[str, Any]:
        """Return all that was gathered so far, for `restore`: tensors and plain values."""
        self._rows, self._keys = _joined(self._rows), _joined(self._keys)
        return {
            "gradients": {name: vars(of) for name, of in self._gradients.items()},
            "outputs": {name: vars(of) for name, of in self._outputs.items()},
            "energies": self._energies,
            "hits": self._hits,
            "with_object": self._with_object,
            "rows": self._rows,
            "keys": self._keys,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        device = self._program.device
        self._gradients = {
            name: _Gradients(**{**of, "sums": of["sums"].to(device)})
            for name, of in state["gradients"].items()
        }
        self._outputs = {
            name: ChannelSums(of["mean"].to(device), of["squares"].to(device), of["count"])
            for name, of in state["outputs"].items()
        }
        self._energies, self._hits = dict(state["energies"]), dict(state["hits"])
        self._with_object = state["with_object"]
        self._rows, self._keys = list(state["rows"]), list(state["keys"])

    def share(self, team: Team) -> None:
        """Add up what the processes of a team have gathered; the first one has all of it then."""
        if team.alone:
            return
        if not self._outputs:  # this process had no image at all: nothing of everything
            blank = torch.zeros(1, 3, *self._program.input_size, dtype=self._program.dtype)
            calls, _ = self._program.calls(blank.to(self._program.device), self._watched)
            self._prepare(calls)
        for of in self._gradients.values():
            (of.sums,) = team.sums([of.sums])
            counts = torch.tensor([of.squares, float(of.directed)], dtype=torch.float64)
            of.squares, directed = team.sums([counts])[0].tolist()
            of.directed = round(directed)
        for outputs in self._outputs.values():
            _share_channels(outputs, team)
        held = [
            *self._energies.values(),
            *map(float, self._hits.values()),
            float(self._with_object),
        ]
        (found,) = team.sums([torch.tensor(held, dtype=torch.float64)])
        *values, with_object = found.tolist()
        names = self._with_maps
        self._energies = dict(zip(names, values[: len(names)], strict=True))
        self._hits = dict(zip(names, map(round, values[len(names) :]), strict=True))
        self._with_object = round(with_object)
        parts = team.gathered((_joined(self._rows), _joined(self._keys)))
        self._rows = [rows for part, _ in parts for rows in part]
        self._keys = [keys for _, part in parts for keys in part]

    # ---------------------------------------------------------------- parts of a batch

    def _prepare(self, calls: Sequence[Call]) -> None:
        """Start the sums of layers that have none yet."""
        for call in calls:
            if call.layer in self._scored and call.layer not in self._gradients:
                self._gradients[call.layer] = _Gradients.empty(call)
            if call.layer not in self._outputs:
                channels = _channels_second(call.outputs).shape[1]
                self._outputs[call.layer] = ChannelSums.empty(channels, call.outputs.device)

    def _add_objects(self, maps: Mapping[str, Tensor], objects: Objects) -> None:
        masks = objects.masks.double()  # once, not for every layer
        self._with_object += len(objects.rows)
        for name, found in maps.items():
            chosen = found[objects.rows]
            self._energies[name] += float(energy_inside(chosen, masks).sum())
            self._hits[name] += int(pointing_hits(chosen, masks).sum())

    def _ordered_rows(self) -> np.ndarray | None:
        """Return the numbers of each image in the order of their keys, None without images."""
        if not self._rows:
            return None
        order = torch.cat(self._keys).argsort()
        return torch.cat(self._rows)[order].numpy()

    def _summarize(self, layer: Layer, rows: np.ndarray | None, seed: int) -> LayerEvidence:
        if rows is None:
            return _no_evidence(layer)
        right = rows[:, 0] > 0
        gradients = self._gradients[layer.name]
        signal = gradients.signal(len(right))
        nan = float("nan")
        map_mean_right = map_mean_wrong = penalty = nan
        separation = Interval(value=nan, low=nan, high=nan)
        if layer.name in self._with_maps:
            lit = rows[:, 2 + self._with_maps.index(layer.name)].astype(np.float64)
            error = 1 - rows[:, 1].astype(np.float64)
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


def _channels_second(outputs: Tensor) -> Tensor:
    """Return a layer's outputs as (B, C, ...), those of a linear layer's tokens too."""
    return outputs.transpose(1, 2) if outputs.dim() == 3 else outputs  # from (B, tokens, C)


def _joined(parts: list[Tensor]) -> list[Tensor]:
    return [torch.cat(parts)] if parts else []


def _share_channels(outputs: ChannelSums, team: Team) -> None:
    """Merge the processes' means and variances, as `ChannelSums` merges batches."""
    count, weighed = team.sums(
        [outputs.mean.new_tensor(float(outputs.count)), outputs.mean * outputs.count]
    )
    mean = weighed / count.clamp(min=1)
    own = outputs.squares + outputs.count * (outputs.mean - mean) ** 2
    (outputs.squares,) = team.sums([own])
    outputs.mean, outputs.count = mean, round(float(count))


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
