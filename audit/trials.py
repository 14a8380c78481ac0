"""Trial repairs: a few cheap steps on one layer alone, undone afterwards, judged on other images.

Cheap scores do not find the layer at fault; trying to repair each one does. Every layer gets the
same trial: one Adam step at several step sizes relative to the size of its weights, then a few more
at the best of them, on the same images and with everything else frozen. What counts is how much of
the cross entropy of *held-out* images a trial removes, images that were right and turn wrong
included. The step size is chosen on one half of the held-out images and judged on the other, and
the other way round, so that the best of several tries is not taken for a gain. The frozen prefix
of every layer comes from one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.networks.layers import Layer
from audit.networks.program import Program, Split
from audit.statistics import Interval

__all__ = ["TrialConfig", "TrialRepair", "error_share_removed", "trial_repairs"]


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """How a trial repair is made.

    Attributes:
        steps: Adam steps on the whole set of trial images.
        step_sizes: Learning rates, in units of the root mean square of the layer's weights. They
            are small on purpose: small changes tell layers apart, large ones let any layer undo
            the fault (ARCHITECTURE.md).
        batch_size: Images a forward pass; the steps themselves use all images.
    """

    steps: int = 4
    step_sizes: tuple[float, ...] = (0.003, 0.01)
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.step_sizes or min(self.step_sizes) <= 0:
            raise ValueError("a trial needs at least one step and positive step sizes")


@dataclass(frozen=True, kw_only=True)
class TrialRepair:
    """What the trial of one layer did to the held-out images.

    Attributes:
        gain: Share of their cross entropy that it removed, with the interval of a bootstrap over
            images; negative where it did harm.
        gain_one_step: The same after the first step.
        broken: Share of the images that were right and are wrong after the trial.
        step_size: The step size that was chosen; the smaller one where the halves differ.
        cross_entropies_before: Per held-out image, (N,).
        cross_entropies_after: The same after the trial, (N,).
    """

    layer: Layer
    gain: Interval
    gain_one_step: Interval
    broken: float
    step_size: float
    cross_entropies_before: np.ndarray
    cross_entropies_after: np.ndarray


@dataclass(frozen=True)
class _Judged:
    """Cross entropies (N,) and correctness (N,) of the held-out images after some steps."""

    cross_entropies: np.ndarray
    right: np.ndarray


def trial_repairs(
    program: Program,
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    layers: Sequence[Layer],
    config: TrialConfig,
    *,
    seed: int,
    on_layer: Callable[[Layer], None] | None = None,
) -> list[TrialRepair]:
    """Return one trial repair per layer, in the order of the layers.

    Args:
        images: Normalized images that the trials learn from, (M, 3, H, W), on the program's
            device, with labels (M,).
        held_out_images: Normalized images that judge them, (N, 3, H, W), with labels (N,).
        seed: Of the bootstrap and of the halves.
        on_layer: Called after each layer.
    """
    learning = len(images)
    every_image = torch.cat([images, held_out_images])
    halves = np.random.default_rng(seed).permutation(len(held_out_images)) % 2
    with torch.no_grad():
        parts = _parts(len(held_out_images), config.batch_size)
        logits = torch.cat([program.logits(held_out_images[part]) for part in parts])
    before = _judge_logits(logits, held_out_labels)
    found: dict[str, TrialRepair] = {}
    for name, crossing in program.prefixes(every_image, [layer.name for layer in layers]):
        split = program.split(name)
        trial_part = tuple(tensor[:learning] for tensor in crossing)
        judge_part = tuple(tensor[learning:] for tensor in crossing)
        trial = _Trial(split, trial_part, labels, judge_part, held_out_labels, config)
        found[name] = _assess(trial, before, halves, seed)
        if on_layer is not None:
            on_layer(split.layer)
    return [found[layer.name] for layer in layers]


def error_share_removed(
    before: np.ndarray, after: np.ndarray, *, seed: int, resamples: int = 2000
) -> Interval:
    """Return 1 - sum(after) / sum(before) over images, with a 95 % bootstrap interval.

    Args:
        before: Cross entropy per image, (N,).
        after: The same images after a change, (N,).
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(before), size=(resamples, len(before)))
    shares = 1 - after[drawn].sum(axis=1) / np.maximum(before[drawn].sum(axis=1), 1e-12)
    low, high = np.percentile(shares, [2.5, 97.5])
    value = 1 - after.sum() / max(float(before.sum()), 1e-12)
    return Interval(value=float(value), low=float(low), high=float(high))


class _Trial:
    """One layer's trial: the first step at every size from one gradient, more steps on demand."""

    def __init__(
        self,
        split: Split,
        crossing: Sequence[Tensor],
        labels: Tensor,
        held_out: Sequence[Tensor],
        held_out_labels: Tensor,
        config: TrialConfig,
    ) -> None:
        self.layer = split.layer
        self.config = config
        self._split, self._crossing, self._labels = split, crossing, labels
        self._held_out, self._held_out_labels = held_out, held_out_labels
        self._start = split.parameters
        weights = next(iter(self._start.values()))
        self._scale = float(weights.square().mean().sqrt()) or 1.0
        self._first_gradients = self._gradients(self._start)
        self._finished: dict[float, _Judged] = {}

    def first_step(self, size: float) -> _Judged:
        """Return the held-out images after one step of that size."""
        parameters, _ = self._stepped_once(size)
        return self._finish(size, parameters) if self.config.steps == 1 else self._judge(parameters)

    def last_step(self, size: float) -> _Judged:
        """Return the held-out images after all steps of that size."""
        if size not in self._finished:
            parameters, optimizer = self._stepped_once(size)
            for _ in range(self.config.steps - 1):
                self._step(optimizer, parameters, self._gradients(parameters))
            self._finish(size, parameters)
        return self._finished[size]

    def _finish(self, size: float, parameters: dict[str, Tensor]) -> _Judged:
        self._finished[size] = self._judge(parameters)
        return self._finished[size]

    def _stepped_once(self, size: float) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
        parameters = {name: value.clone() for name, value in self._start.items()}
        optimizer = torch.optim.Adam(parameters.values(), lr=size * self._scale)
        self._step(optimizer, parameters, self._first_gradients)
        return parameters, optimizer

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, Tensor],
        gradients: Sequence[Tensor],
    ) -> None:
        for value, gradient in zip(parameters.values(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()

    def _gradients(self, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Return the gradient of the mean cross entropy of all trial images."""
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        sums = [torch.zeros_like(value) for value in leaves.values()]
        for part in _parts(len(self._labels), self.config.batch_size):
            logits = self._split.suffix([tensor[part] for tensor in self._crossing], leaves)
            loss = F.cross_entropy(logits, self._labels[part], reduction="sum")
            for total, gradient in zip(
                sums,
                torch.autograd.grad(loss / len(self._labels), list(leaves.values())),
                strict=True,
            ):
                total += gradient
        return sums

    def _judge(self, parameters: dict[str, Tensor]) -> _Judged:
        with torch.no_grad():
            logits = torch.cat(
                [
                    self._split.suffix([tensor[part] for tensor in self._held_out], parameters)
                    for part in _parts(len(self._held_out_labels), self.config.batch_size)
                ]
            )
        return _judge_logits(logits, self._held_out_labels)


def _parts(images: int, batch_size: int) -> list[slice]:
    return [slice(at, at + batch_size) for at in range(0, images, batch_size)]


def _judge_logits(logits: Tensor, labels: Tensor) -> _Judged:
    cross_entropies = F.cross_entropy(logits.double(), labels, reduction="none")
    # A trial that overflows is as wrong as can be, not unknown; argmax would call NaN a class.
    right = (logits.argmax(dim=1) == labels) & cross_entropies.isfinite()
    cross_entropies = cross_entropies.nan_to_num(nan=1e3, posinf=1e3).clamp(max=1e3)
    return _Judged(cross_entropies.cpu().numpy(), right.cpu().numpy())


def _assess(trial: _Trial, before: _Judged, halves: np.ndarray, seed: int) -> TrialRepair:
    """Judge each half of the held-out images by the step size that the other half chose."""
    first = {size: trial.first_step(size) for size in trial.config.step_sizes}
    after_first, after_last, right = (np.empty(len(halves)) for _ in range(3))
    chosen: list[float] = []
    for half in (0, 1):
        choosers, judges = halves != half, halves == half
        if not choosers.any():  # a single held-out image chooses for itself
            choosers = judges
        best = min(first, key=lambda size: float(first[size].cross_entropies[choosers].sum()))
        last = trial.last_step(best)
        chosen.append(best)
        after_first[judges] = first[best].cross_entropies[judges]
        after_last[judges] = last.cross_entropies[judges]
        right[judges] = last.right[judges]
    broken = float((before.right & (right == 0)).sum() / max(int(before.right.sum()), 1))
    return TrialRepair(
        layer=trial.layer,
        gain=error_share_removed(before.cross_entropies, after_last, seed=seed),
        gain_one_step=error_share_removed(before.cross_entropies, after_first, seed=seed),
        broken=broken,
        step_size=min(chosen),
        cross_entropies_before=before.cross_entropies,
        cross_entropies_after=after_last,
    )
