"""Trial repairs: a few cheap steps on one layer alone, undone afterwards, judged on other images.

Cheap scores do not find the layer at fault; trying to repair each one does. There are two kinds. A
trial of the *weights* may change all of them: it says how much a repair of the layer would do. A
trial of the *channels* may only scale and shift each output channel of the layer: most layers can
undo a fault with all their weights, few with so little, and those that can are where it lies.

Trials go in rounds, by successive halving: every layer takes the first few Adam steps at each step
size; the better half of the layers takes more, and the best of those the rest. All on the same
images and with everything else frozen. What counts is how much of the cross entropy of
*held-out* images a trial removes, images that were right and turn wrong included. The step size is
chosen on one half of the held-out images and judged on the other, and the other way round, so that
the best of several tries is not taken for a gain. In each round the frozen prefix of all layers
comes from one pass, and a trial goes on where its last round ended.

Source of the rounds: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.networks.layers import Layer
from audit.networks.program import Program, Split
from audit.statistics import Interval

if TYPE_CHECKING:
    from audit.checkpoints import Checkpoint

__all__ = [
    "CHANNEL_TRIAL",
    "TrialConfig",
    "TrialRepair",
    "bounded",
    "error_share_removed",
    "planned_steps",
    "ranking",
    "trial_repairs",
]

TrialKind = Literal["weights", "channels"]


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """How trial repairs are made.

    Attributes:
        kind: What may change: the layer's weights, or a factor and a shift for each channel.
        rounds: Adam steps, on the whole set of trial images, after which each round ends.
        keep: Share of a round's layers that go on to the next one.
        step_sizes: Learning rates, in units of the root mean square of the layer's weights; of
            channels, the step of the factor, and of the shift in units of the bias. They are small
            on purpose: small changes tell layers apart, large ones let any layer undo the fault
            (ARCHITECTURE.md).
        batch_size: Images a forward pass; the steps themselves use all images.
        budget_s: Seconds for all trials together. The first round takes layers, most promising
            first, until half of them are spent; a later round as many of those, best first, as the
            rest has time for.
    """

    kind: TrialKind = "weights"
    rounds: tuple[int, ...] = (4, 16)
    keep: float = 0.5
    step_sizes: tuple[float, ...] = (0.003, 0.01)
    batch_size: int = 64
    budget_s: float | None = None

    def __post_init__(self) -> None:
        rising = all(one < two for one, two in zip((0, *self.rounds), self.rounds, strict=False))
        if not self.rounds or not rising:
            raise ValueError("a trial has rounds of at least one step that grow")
        if not self.step_sizes or min(self.step_sizes) <= 0 or not 0 < self.keep <= 1:
            raise ValueError("a trial needs positive step sizes and a share to keep")
        if self.budget_s is not None and self.budget_s <= 0:
            raise ValueError("a budget is a positive number of seconds")


CHANNEL_TRIAL = TrialConfig(kind="channels", rounds=(8, 16, 24), keep=1.0, step_sizes=(0.1,))
"""The trial of the channels that a scan makes where no batch norm remembers the training. All its
layers stay in: how they rank after each round is what tells them apart."""


@dataclass(frozen=True, kw_only=True)
class TrialRepair:
    """What the trial of one layer did to the held-out images.

    Attributes:
        steps: Steps that it took: those of the last round that it reached.
        gain: Share of their cross entropy that it removed, with the interval of a bootstrap over
            images; negative where it did harm.
        gains: By round that it took part in, the gain at its end.
        broken: Share of the images that were right and are wrong after the trial.
        step_size: The step size that was chosen; the smaller one where the halves differ.
        cross_entropies_before: Per held-out image, (N,).
        cross_entropies_after: The same after the trial, (N,).
    """

    layer: Layer
    steps: int
    gain: Interval
    gains: tuple[float, ...]
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
    promising: Sequence[str] = (),
    favored: Collection[str] = (),
    on_steps: Callable[[int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[TrialRepair]:
    """Return one trial repair per layer, in the order of the layers.

    Layers that the budget has no time for have none.

    Args:
        images: Normalized images that the trials learn from, (M, 3, H, W), on the program's
            device, with labels (M,).
        held_out_images: Normalized images that judge them, (N, 3, H, W), with labels (N,).
        seed: Of the bootstrap and of the halves.
        promising: Names of the layers, those first that a budget should reach; as given without.
        favored: Names of layers that stay in to the last round whatever they gain.
        on_steps: Called with the number of steps whenever a layer's part of a round is over.
        checkpoint: Where interrupted trials are kept, and go on from.
    """
    earlier = checkpoint.earlier if checkpoint else None
    started_s = time.perf_counter() - (earlier["spent_s"] if earlier else 0.0)
    learning = len(images)
    # Channels last is 1.4 to 1.7 times as fast on a CPU.
    every_image = torch.cat([images, held_out_images]).contiguous(memory_format=torch.channels_last)
    halves = np.random.default_rng(seed).permutation(len(held_out_images)) % 2
    with torch.no_grad():
        parts = _parts(len(held_out_images), config.batch_size)
        began_s = time.perf_counter()
        logits = torch.cat([program.logits(every_image[learning:][part]) for part in parts])
        forward_s = (time.perf_counter() - began_s) / len(held_out_images)
    before = _judge_logits(logits, held_out_labels)
    names = list(promising or [layer.name for layer in layers])
    trials: dict[str, _Trial] = {}
    entrants: list[str] = []
    done = 0
    if earlier:
        done, entrants = earlier["done"], earlier["entrants"]
        for name, state in earlier["trials"].items():
            trials[name] = _Trial(program.split(name), config, halves)
            trials[name].restore(state)

    def left_s(share: float = 1.0) -> float:
        """Return the seconds that are left of a share of the budget."""
        if config.budget_s is None:
            return math.inf
        return share * config.budget_s - (time.perf_counter() - started_s)

    def keep() -> None:
        if checkpoint is not None:
            states = {name: trial.state(name in entrants) for name, trial in trials.items()}
            spent_s = time.perf_counter() - started_s
            checkpoint.save(
                {"spent_s": spent_s, "done": done, "entrants": entrants, "trials": states}
            )

    def advance(steps: int) -> None:
        """Let the entrants that have not yet take so many steps."""
        waiting = [name for name in entrants if trials[name].steps < steps]
        firsts: dict[str, list[Tensor]] = {}
        if unbegun := [trials[name] for name in waiting if not trials[name].steps]:
            firsts = _first_gradients(program, unbegun, every_image[:learning], labels, config)
        for name, crossing in program.prefixes(every_image, waiting):
            if not trials[name].steps and left_s() < 0:
                break
            if name in firsts:
                trials[name].begin(firsts.pop(name))
            trials[name].advance(
                steps,
                [tensor[:learning] for tensor in crossing],
                labels,
                [tensor[learning:] for tensor in crossing],
                held_out_labels,
            )
            if on_steps is not None:
                on_steps(steps - done)
            if checkpoint is not None and checkpoint.due(
                sum(t.size_bytes for t in trials.values())
            ):
                keep()

    layer_s = _first_round_s(config, forward_s, learning, len(held_out_images))
    for steps in [steps for steps in config.rounds if steps > done]:
        advance(steps)
        # How long a layer takes is known better after some, so that they enter in waves.
        while not done and (
            wave := _affordable(
                names[len(entrants) :], left_s(0.5), layer_s, least=0 if entrants else 2
            )
        ):
            entrants = [*entrants, *wave]
            trials |= {name: _Trial(program.split(name), config, halves) for name in wave}
            began_s = time.perf_counter()
            advance(steps)
            layer_s = (time.perf_counter() - began_s) / len(wave)
        prefixes_s = forward_s * len(every_image)
        entrants = _next_entrants(trials, entrants, steps, config, favored, left_s() - prefixes_s)
        done = steps
        keep()
    tried = [trials[layer.name] for layer in layers if layer.name in trials]
    return [trial.repair(before, seed) for trial in tried if trial.steps]


def ranking(trials: Sequence[TrialRepair]) -> list[TrialRepair]:
    """Return the trials by the round that they reached, then by what they gained, best first."""
    return sorted(trials, key=lambda trial: (trial.steps, trial.gain.value), reverse=True)


def planned_steps(layers: int, config: TrialConfig) -> int:
    """Return how many steps the trials of so many layers take together, budget aside."""
    total, entrants, done = 0, layers, 0
    for steps in config.rounds:
        total += entrants * (steps - done)
        entrants, done = _kept(entrants, config), steps
    return total


def _kept(entrants: int, config: TrialConfig) -> int:
    return max(min(entrants, 2), math.ceil(entrants * config.keep))


def _first_round_s(config: TrialConfig, forward_s: float, learning: int, judging: int) -> float:
    """Return about how long one layer's first round takes, before any is known.

    A step costs three forwards of its images, of the layer itself and what follows: half of the
    network, on average over its layers.
    """
    steps = config.rounds[0] * 3 * learning
    return len(config.step_sizes) * (steps + judging) * forward_s / 2


def _affordable(names: Sequence[str], left_s: float, layer_s: float, *, least: int) -> list[str]:
    """Return as many names as there is time for, so many at least."""
    if math.isinf(left_s):
        return list(names)
    return list(names[: max(least, int(left_s / max(layer_s, 1e-9)))])


def _next_entrants(
    trials: dict[str, _Trial],
    entrants: Sequence[str],
    done: int,
    config: TrialConfig,
    favored: Collection[str],
    left_s: float,
) -> list[str]:
    """Choose who goes on: favored ones, then the best, as many as the budget has time for."""
    following = [steps for steps in config.rounds if steps > done]
    tried = [name for name in entrants if trials[name].steps]
    if not following or not tried:
        return []
    tried.sort(key=lambda name: (name not in favored, trials[name].error))
    chosen = []
    for name in tried[: _kept(len(entrants), config)]:
        left_s -= trials[name].seconds_for(following[0] - done)
        if left_s < 0:
            break
        chosen.append(name)
    return chosen


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


class _Run:
    """A layer under way at one step size."""

    def __init__(self, split: Split, config: TrialConfig, size: float) -> None:
        self.steps = 0
        self._start = split.parameters
        first = next(iter(self._start))
        self._weight = first  # of a weight norm its magnitude, which scales all of it
        shape = self._start[first].shape
        axis = 1 if split.layer.kind.startswith("conv_transpose") else 0
        self._by_channel = [length if at == axis else 1 for at, length in enumerate(shape)]
        self._bias = next(
            (n for n, v in self._start.items() if n != first and v.shape == shape[axis : axis + 1]),
            None,
        )
        if config.kind == "channels":
            zeros = self._start[first].new_zeros(shape[axis])
            self.leaves = {"factor": zeros} | ({"shift": zeros.clone()} if self._bias else {})
            unit = 1.0
        else:
            self.leaves = {name: value.clone() for name, value in self._start.items()}
            unit = _root_mean_square(self._start[first])
        self._channels = config.kind == "channels"
        self._optimizer = torch.optim.Adam(self.leaves.values(), lr=size * unit)

    def parameters(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the layer's parameters, differentiable in what the trial may change."""
        if not self._channels:
            return dict(leaves)
        factor = 1 + leaves["factor"]
        found = dict(self._start)
        found[self._weight] = found[self._weight] * factor.view(self._by_channel)
        if self._bias:
            unit = _root_mean_square(self._start[self._bias], self._start[self._weight])
            found[self._bias] = found[self._bias] * factor + unit * leaves["shift"]
        return found

    def state(self) -> dict[str, Any]:
        """Return how far it is, for `restore`."""
        leaves = {name: value.detach() for name, value in self.leaves.items()}
        return {"steps": self.steps, "leaves": leaves, "adam": self._optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        with torch.no_grad():
            for name, value in self.leaves.items():
                value.copy_(state["leaves"][name])
        self._optimizer.load_state_dict(state["adam"])

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one Adam step."""
        for value, gradient in zip(self.leaves.values(), gradients, strict=True):
            value.grad = gradient
        self._optimizer.step()
        self.steps += 1


def _root_mean_square(*tensors: Tensor) -> float:
    """Of the first tensor that is not zero; 1 where all are."""
    sizes = (float(values.square().mean().sqrt()) for values in tensors)
    return next((size for size in sizes if size), 1.0)


class _Trial:
    """One layer's trial, which goes on where its last round ended.

    Attributes:
        split: The network cut at the layer.
        steps: Steps taken so far.
        error: Summed cross entropy of the held-out images after them; infinite before any.
    """

    def __init__(self, split: Split, config: TrialConfig, halves: np.ndarray) -> None:
        self.steps = 0
        self.error = math.inf
        self._step_s = self._judging_s = 0.0  # of one run
        self.split, self._config, self._halves = split, config, halves
        self._runs: dict[float, _Run] = {}
        self._chosen: tuple[float, float] = (math.nan, math.nan)  # by half
        self._judged: dict[float, _Judged] = {}
        self._errors: list[float] = []

    def begin(self, gradients: Sequence[Tensor]) -> None:
        """Take the first step at every size."""
        for size in self._config.step_sizes:
            self._runs[size] = _Run(self.split, self._config, size)
            self._runs[size].step(gradients)

    def advance(
        self,
        steps: int,
        crossing: Sequence[Tensor],
        labels: Tensor,
        held_out: Sequence[Tensor],
        held_out_labels: Tensor,
    ) -> None:
        """Go on until so many steps have been taken, and judge."""
        before, taken = self.steps, 0
        started_s = time.perf_counter()
        for run in self._runs.values():
            while run.steps < steps:
                (gradients,) = _gradients(
                    self.split, [run], crossing, labels, self._config.batch_size
                )
                run.step(gradients)
                taken += 1
        stepped_s = time.perf_counter()
        self._judged = {
            size: self._judge(run, held_out, held_out_labels, self._judges(size))
            for size, run in self._runs.items()
        }
        if taken:
            self._step_s = (stepped_s - started_s) / taken
        if before == 0:
            self._judging_s = (time.perf_counter() - stepped_s) / len(self._runs)
            self._choose()
        self.steps = steps
        self.error = float(self._after().cross_entropies.sum())
        self._errors.append(self.error)

    def seconds_for(self, steps: int) -> float:
        """Return about how long so many further steps take, judging included.

        From the second round on every held-out image is judged once, whichever the sizes are.
        """
        return len(self._runs) * steps * self._step_s + self._judging_s

    @property
    def size_bytes(self) -> int:
        """About how much `state` holds: the leaves and two moments of each."""
        leaves = (value for run in self._runs.values() for value in run.leaves.values())
        return 3 * sum(value.numel() * value.element_size() for value in leaves)

    def state(self, goes_on: bool) -> dict[str, Any]:
        """Return how far it is, for `restore`; without its weights where it does not go on."""
        return {
            "steps": self.steps,
            "error": self.error,
            "seconds": (self._step_s, self._judging_s),
            "chosen": self._chosen,
            "errors": self._errors,
            "judged": {
                size: (torch.from_numpy(of.cross_entropies), torch.from_numpy(of.right))
                for size, of in self._judged.items()
            },
            "runs": {size: run.state() for size, run in self._runs.items()} if goes_on else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.steps, self.error = state["steps"], state["error"]
        self._step_s, self._judging_s = state["seconds"]
        self._chosen, self._errors = state["chosen"], list(state["errors"])
        self._judged = {
            size: _Judged(entropies.numpy(), right.numpy())
            for size, (entropies, right) in state["judged"].items()
        }
        self._runs = {size: _Run(self.split, self._config, size) for size in state["runs"]}
        for size, run in self._runs.items():
            run.restore(state["runs"][size])

    def repair(self, before: _Judged, seed: int) -> TrialRepair:
        """Return what the trial has come to."""
        after = self._after()
        total = float(before.cross_entropies.sum())
        broken = float((before.right & ~after.right).sum() / max(int(before.right.sum()), 1))
        return TrialRepair(
            layer=self.split.layer,
            steps=self.steps,
            gain=error_share_removed(before.cross_entropies, after.cross_entropies, seed=seed),
            gains=tuple(1 - error / max(total, 1e-12) for error in self._errors),
            broken=broken,
            step_size=min(self._chosen),
            cross_entropies_before=before.cross_entropies,
            cross_entropies_after=after.cross_entropies,
        )

    def _choose(self) -> None:
        """Let each half of the held-out images be judged at the size that the other half chose."""
        best = []
        for half in (0, 1):
            choosers = self._halves != half
            if not choosers.any():  # a single held-out image chooses for itself
                choosers = ~choosers
            errors = {s: float(j.cross_entropies[choosers].sum()) for s, j in self._judged.items()}
            best.append(min(errors, key=lambda size: errors[size]))
        self._chosen = (best[0], best[1])
        self._runs = {size: run for size, run in self._runs.items() if size in best}

    def _after(self) -> _Judged:
        first, second = (self._judged[size] for size in self._chosen)
        in_first = self._halves == 0
        return _Judged(
            np.where(in_first, first.cross_entropies, second.cross_entropies),
            np.where(in_first, first.right, second.right),
        )

    def _judges(self, size: float) -> np.ndarray:
        """Return the held-out images that judge a size: all, until they have made their choice;
        from then on those for which it was chosen."""
        if math.isnan(self._chosen[0]):
            return np.arange(len(self._halves))
        return np.flatnonzero(np.array(self._chosen)[self._halves] == size)

    def _judge(
        self, run: _Run, held_out: Sequence[Tensor], labels: Tensor, judges: np.ndarray
    ) -> _Judged:
        """Return what the held-out images in these rows come to; the others have NaN."""
        rows = torch.from_numpy(judges).to(labels.device)
        if len(rows) < len(labels):
            held_out = [tensor[rows] for tensor in held_out]
        with torch.no_grad():
            parameters = run.parameters(run.leaves)
            logits = torch.cat(
                [
                    self.split.folded_suffix([tensor[part] for tensor in held_out], parameters)
                    for part in _parts(len(rows), self._config.batch_size)
                ]
            )
        judged = _judge_logits(logits, labels[rows])
        cross_entropies, right = np.full(len(labels), np.nan), np.zeros(len(labels), dtype=bool)
        cross_entropies[judges], right[judges] = judged.cross_entropies, judged.right
        return _Judged(cross_entropies, right)


def _first_gradients(
    program: Program, trials: Sequence[_Trial], images: Tensor, labels: Tensor, config: TrialConfig
) -> dict[str, list[Tensor]]:
    """Return by layer the gradients that the first step of its trial takes.

    No layer has changed before it, so that one pass over the network gives those of all layers.
    """
    splits = [trial.split for trial in trials]
    runs = [_Run(split, config, config.step_sizes[0]) for split in splits]
    found = _gradients(program.uncut(), runs, [images], labels, config.batch_size)
    return {split.layer.name: own for split, own in zip(splits, found, strict=True)}


def _gradients(
    split: Split, runs: Sequence[_Run], crossing: Sequence[Tensor], labels: Tensor, batch_size: int
) -> list[list[Tensor]]:
    """Return the gradients of the mean cross entropy of all images by what each run may change."""
    leaves = [
        {name: value.detach().requires_grad_() for name, value in run.leaves.items()}
        for run in runs
    ]
    asked = [value for own in leaves for value in own.values()]
    sums = [torch.zeros_like(value) for value in asked]
    for part in _parts(len(labels), batch_size):
        changed: dict[str, Tensor] = {}
        for run, own in zip(runs, leaves, strict=True):
            changed |= run.parameters(own)
        logits = split.folded_suffix([tensor[part] for tensor in crossing], changed)
        loss = F.cross_entropy(logits, labels[part], reduction="sum") / len(labels)
        for total, gradient in zip(sums, torch.autograd.grad(loss, asked), strict=True):
            total += gradient
    remaining = iter(sums)
    return [[next(remaining) for _ in own] for own in leaves]


def _parts(images: int, batch_size: int) -> list[slice]:
    return [slice(at, at + batch_size) for at in range(0, images, batch_size)]


def _judge_logits(logits: Tensor, labels: Tensor) -> _Judged:
    cross_entropies = F.cross_entropy(logits.double(), labels, reduction="none")
    # A trial that overflows is as wrong as can be, not unknown; argmax would call NaN a class.
    right = (logits.argmax(dim=1) == labels) & cross_entropies.isfinite()
    return _Judged(bounded(cross_entropies).cpu().numpy(), right.cpu().numpy())


def bounded(cross_entropies: Tensor) -> Tensor:
    """Return them with 1e3 nats at most, and where a network overflows."""
    return cross_entropies.nan_to_num(nan=1e3, posinf=1e3).clamp(max=1e3)
