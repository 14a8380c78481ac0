"""Train one layer, and nothing else, on what crosses the cut before it.

The layer's weight and bias are the only leaves; every other tensor enters the graph as a constant,
in eval mode. After each epoch the validation cross entropy chooses the best weights so far (the
untouched ones are the first candidate), a diverging run is rolled back to them, and a checkpoint is
written: a run that was killed and resumed ends with the same bits as one that was not.

Steps are taken in mixed precision where asked; what is judged is computed in the network's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import lr_scheduler

from audit.batches import BatchLimit
from audit.checkpoints import load_whole
from audit.errors import RunError
from audit.files import replacing
from audit.parallel import ALONE, Team
from audit.saliency import trainable_gradients, trainable_guided_maps, trainable_maps
from repair.cache import CrossingBatch, CrossingTensors
from repair.config import Optimizer, RepairConfig, Schedule
from repair.controls import map_rotation
from repair.decision import Predictions
from repair.image_masks import ImageMasks
from repair.losses import LOSSES, LossTerms, cross_entropy

if TYPE_CHECKING:
    from audit.networks import Split

EVALUATION_BATCH = 256
MOMENTUM = 0.9
RGN_BATCHES = 8
# A validation cross entropy beyond both is a wreck, not a detour: three times the start, and three
# nats above it (the true classes' probabilities fell twentyfold).
WRECKED_FACTOR = 3.0
WRECKED_NATS = 3.0

Row = dict[str, Any]  # of history.parquet

_OPTIMIZERS: dict[Optimizer, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda leaves, rate: torch.optim.SGD(leaves, lr=rate, momentum=MOMENTUM),
    "adamw": lambda leaves, rate: torch.optim.AdamW(leaves, lr=rate),
}


_SCHEDULES: dict[Schedule, Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]] = {
    "constant": lambda optimizer, epochs: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "cosine": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
    "linear": lambda optimizer, epochs: lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=epochs
    ),
    "step": lambda optimizer, epochs: lr_scheduler.StepLR(
        optimizer, step_size=math.ceil(epochs / 3), gamma=0.1
    ),
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained layer and how it came about.

    Attributes:
        parameters: The best weights by validation cross entropy, or the last ones where the
            settings keep those, by state entry.
        history: One row per epoch, the start as epoch 0.
        best_epoch: The epoch that `parameters` come from; 0 means untouched.
        stopped: Why training ended early, None if it did not.
        steps: Optimizer steps taken.
        seconds: Time spent on training and validation.
    """

    parameters: dict[str, Tensor]
    history: list[Row]
    best_epoch: int
    stopped: str | None
    steps: int
    seconds: float


@dataclass(kw_only=True)
class _State:
    """Everything that the next epoch depends on; what a checkpoint holds."""

    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    best_epoch: int = 0
    best_entropy: float = math.inf
    history: list[Row] = field(default_factory=list)
    leaves: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler


class DamagedCheckpointError(RunError):
    """A checkpoint that cannot be read."""


class _DivergedError(Exception):
    """A loss or gradient that is not finite; says which."""


def train_layer(
    split: Split,
    train: CrossingTensors,
    validation: CrossingTensors,
    config: RepairConfig,
    *,
    loss: str,
    versions: Sequence[CrossingTensors] = (),
    also: Mapping[str, Tensor] | None = None,
    role: str | None = None,
    shuffled: bool = False,
    masks: ImageMasks | None = None,
    targets: Tensor | None = None,
    class_weights: Tensor | None = None,
    surgical: bool = False,
    team: Team = ALONE,
    state_path: Path | None = None,
    on_epoch: Callable[[Row], None] | None = None,
) -> Trained:
    """Return the split's layer trained by a loss; the network itself is not changed.

    Args:
        split: The network, cut at the layer.
        train: Images to learn from.
        validation: Images that choose the epoch.
        config: Settings; `config.loss` is not read, so that a control differs in `loss` alone.
        loss: A name from `LOSSES`.
        versions: Of the images to learn from, as many each and in the same order: epochs take
            `train` and these in turn.
        also: Further state entries after the cut that learn too, with their first values.
        role: What the history calls it; `repair` or the name of the loss when None.
        shuffled: Charge each image for the map of another one of its batch.
        masks: Where the map of each image may lie; brought to the size of the maps by area.
        targets: A probability for each class that takes the label's place in training, by the
            image's position in the folder's records, (N, K); labels alone when None.
        class_weights: Weight of each class's images in the loss, (K,).
        surgical: Scale each entry's steps by its relative gradient norm, found anew in every epoch
            (Auto-RGN; Lee et al. 2022, "Surgical fine-tuning", section 4).
        team: Processes that share the images: `train` and `validation` hold this one's part. Steps
            are those of one process that holds them all, up to the order of summation; only the
            maps of `shuffled` are exchanged within a process's own part of a batch.
        state_path: Checkpoint, written after each epoch; where one lies already, training goes on
            from it.
        on_epoch: Called with the history row of each finished epoch.

    Raises:
        DamagedCheckpointError: What lies at `state_path` cannot be read.
        ValueError: `versions` have not as many images as `train`.
    """
    counts = sorted({len(train), *map(len, versions)})
    if len(counts) > 1:
        raise ValueError(f"versions of the training images count {counts}; pass as many of each")
    first_values = {**split.parameters, **(also or {})}
    lesson = _Lesson(
        split=split,
        versions=(train, *versions),
        config=config,
        loss=loss,
        shuffled=shuffled,
        masks=masks,
        targets=targets,
        class_weights=class_weights,
        surgical=surgical,
        team=team,
    )
    state = _start(first_values, lesson, validation)
    if state_path is not None and state_path.is_file():
        _restore(state, state_path)
    with _deterministic_kernels():
        while state.epoch < config.epochs and state.stopped is None:
            started_s = time.perf_counter()
            row = _one_epoch(state, lesson, validation)
            row["seconds"] = time.perf_counter() - started_s
            state.seconds += row["seconds"]
            state.history.append(row)
            if state_path is not None and team.leads:
                _save(state, state_path)
            if on_epoch is not None:
                on_epoch(row)
    history = [
        {**row, "role": role or row["role"], "best": row["epoch"] == state.best_epoch}
        for row in state.history
    ]
    return Trained(
        parameters=state.best,
        history=history,
        best_epoch=state.best_epoch,
        stopped=state.stopped,
        steps=state.steps,
        seconds=state.seconds,
    )


def predict(
    split: Split,
    images: CrossingTensors,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    divisor: float = 1.0,
    limit: BatchLimit | None = None,
) -> tuple[Predictions, np.ndarray]:
    """Return what the network says about images, and their positions in the folder's records.

    Args:
        parameters: The layer's values; its present ones when None.
        divisor: Of the logits.
        limit: How many images fit in memory; halved where they do not.
    """

    def say(rows: slice) -> tuple[Tensor, ...]:
        batch = images.batch(torch.arange(rows.start, rows.stop))
        logits = split.suffix(batch.crossing, parameters).double() / divisor
        sure, predicted = logits.softmax(dim=1).max(dim=1)
        nats = cross_entropy(logits, batch.labels)
        said = (batch.labels, predicted, nats, sure, batch.positions)
        return tuple(values.cpu() for values in said)

    with torch.no_grad():
        chunks = list((limit or BatchLimit(EVALUATION_BATCH)).parts(say, len(images)))
    if not chunks:
        raise RunError("there is no image to judge the network on; scan more images")
    labels, classes, entropies, confidences, positions = (
        np.asarray(torch.cat(parts)) for parts in zip(*chunks, strict=True)
    )
    predictions = Predictions(
        labels=labels,
        predicted=classes,
        p_true=np.exp(-entropies),
        cross_entropies=entropies,
        p_predicted=confidences,
    )
    return predictions, positions


def loss_terms(
    split: Split,
    batch: CrossingBatch,
    parameters: Mapping[str, Tensor],
    config: RepairConfig,
    loss: str,
    *,
    rotation: int = 0,
    masks: ImageMasks | None = None,
    targets: Tensor | None = None,
) -> LossTerms:
    """Return the loss of each image of a batch, differentiable in the parameters.

    Args:
        rotation: Image i is charged for the map of image i - rotation.
        masks: As for `train_layer`.
        targets: As for `train_layer`; maps are those of the true class all the same.
    """
    chosen = LOSSES[loss]
    crossing, labels = batch.crossing, batch.labels
    wanted = labels if targets is None else targets[batch.positions].to(labels.device)
    if chosen.looks_at is None:
        logits = _exact(split.suffix(crossing, parameters)) / config.divisor
        return chosen.terms(logits, None, wanted, config.penalty)
    by_image = config.saliency in ("guided-gradcam", "gradients")
    if by_image and batch.images is None and batch.gates is None:
        raise ValueError(
            "gradients by the image need it, or the prefix's gates; pass beside to cross_tensors"
        )
    if chosen.looks_at == "gradients":
        images = batch.images if by_image else None
        maps, logits = trainable_gradients(split, crossing, parameters, images)
    elif by_image:
        maps, logits = trainable_guided_maps(
            split, batch.images, crossing, parameters, labels, gates=batch.gates
        )
    else:
        maps, logits = trainable_maps(split, crossing, parameters, labels)
    maps = _exact(maps).roll(rotation, dims=0)
    allowed = None
    if masks is not None and chosen.needs_masks:
        # NaN marks a whole image, so that the mean over an area keeps it.
        own = masks.at(batch.positions).to(maps.device, maps.dtype).unsqueeze(1)
        allowed = F.interpolate(own, size=maps.shape[1:], mode="area").squeeze(1)
    return chosen.terms(_exact(logits) / config.divisor, maps, wanted, config.penalty, allowed)


def _exact(values: Tensor) -> Tensor:
    """Return values in at least single precision: a loss is not summed in 16 bits."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """What the steps of one training learn from."""

    split: Split
    versions: tuple[CrossingTensors, ...]
    config: RepairConfig
    loss: str
    shuffled: bool
    masks: ImageMasks | None
    targets: Tensor | None
    class_weights: Tensor | None
    surgical: bool
    team: Team
    learning: BatchLimit = field(default_factory=BatchLimit)
    judging: BatchLimit = field(default_factory=lambda: BatchLimit(EVALUATION_BATCH))

    @cached_property
    def total(self) -> int:
        """Images of all processes together."""
        (counts,) = self.team.sums([torch.tensor([len(self.versions[0])], device=self.device)])
        return int(counts)

    @property
    def device(self) -> torch.device:
        return next(iter(self.split.parameters.values())).device

    def batches(self, epoch: int) -> Iterator[CrossingBatch]:
        """Yield this process's part of each batch, empty where it has none."""
        images = self.versions[(epoch - 1) % len(self.versions)]
        for rows in _batches(self.total, self.config, epoch):
            yield images.batch(self.team.own(rows))

    def gradients(
        self, batch: CrossingBatch, leaves: Mapping[str, Tensor], step: int
    ) -> tuple[list[Tensor], dict[str, float], int]:
        """Return the gradients of the mean loss of a whole batch, sums of its terms, its size.

        A batch that does not fit in memory is learned from in parts, whose gradients add up.

        Raises:
            _DivergedError: Loss or gradients are not finite.
        """
        names = ("loss", "ce", "saliency_mean", "r1", "r2")
        found = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves.values()]
        sums = torch.zeros(len(names) + 2, dtype=found[0].dtype, device=found[0].device)
        images = len(batch.positions)
        for part, own in self.learning.parts(
            lambda rows: self._part(batch, rows, leaves, step), images
        ):
            # One part, the usual case, keeps its bits: nothing is added to it.
            whole = len(own) and own["size"] == images
            found = part if whole else [a + b for a, b in zip(found, part, strict=True)]
            values = [own.get(name, math.nan) for name in (*names, "loss_sum", "size")]
            sums = sums.new_tensor(values) if whole else sums + sums.new_tensor(values)
        *found, sums = self.team.sums([*found, sums])
        *values, loss_sum, size = sums.tolist()
        if not size:
            return found, {}, 0
        mean = [gradient / size for gradient in found]
        _check_finite(loss_sum, mean, step)
        told = {n: v for n, v in zip(names, values, strict=True) if not math.isnan(v)}
        return mean, told, round(size)

    def _part(
        self, batch: CrossingBatch, rows: slice, leaves: Mapping[str, Tensor], step: int
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Return the gradients of the summed loss of some of a batch's images, and sums of its
        terms."""
        images, part = len(batch.positions), rows.stop - rows.start
        rotation = 0
        if self.shuffled:
            rotation = map_rotation(images, seed=self.config.seed, step=step)
        if part < images:
            chosen = torch.arange(rows.start, rows.stop)
            if rotation:  # the images whose maps these are charged for come along behind them
                chosen = torch.cat([chosen, (chosen - rotation) % images])
                rotation = part
            batch = _rows(batch, chosen)
        terms = _first(self.terms(batch, leaves, rotation), part)
        loss = self.weighed(terms, batch.labels[:part]).sum()
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        told = {**_sums(terms), "loss_sum": float(loss.detach()), "size": float(part)}
        return list(gradients), told

    def terms(
        self, batch: CrossingBatch, leaves: Mapping[str, Tensor], rotation: int = 0
    ) -> LossTerms:
        """Return the loss terms of a batch, in mixed precision where asked."""
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=self.config.amp):
            return loss_terms(
                self.split,
                _channels_last(batch) if self.config.channels_last else batch,
                leaves,
                self.config,
                self.loss,
                rotation=rotation,
                masks=self.masks,
                targets=self.targets,
            )

    def weighed(self, terms: LossTerms, labels: Tensor) -> Tensor:
        """Return the loss of each image, weighed by its class."""
        if self.class_weights is None:
            return terms.loss
        return terms.loss * self.class_weights.to(terms.loss)[labels]


def _rows(batch: CrossingBatch, rows: Tensor) -> CrossingBatch:
    """Return some images of a batch."""
    here = rows.to(batch.labels.device)
    return CrossingBatch(
        crossing=tuple(tensor[here] for tensor in batch.crossing),
        labels=batch.labels[here],
        positions=batch.positions[rows.to(batch.positions.device)],
        images=None if batch.images is None else batch.images[here],
        gates=None if batch.gates is None else batch.gates[here],
    )


def _first(terms: LossTerms, images: int) -> LossTerms:
    """Return the terms of the first so many images."""
    held = {name: value for name, value in vars(terms).items() if value is not None}
    return replace(terms, **{name: value[:images] for name, value in held.items()})


def _channels_last(batch: CrossingBatch) -> CrossingBatch:
    formatted = tuple(
        tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for tensor in batch.crossing
    )
    return replace(batch, crossing=formatted)


def _start(
    first_values: Mapping[str, Tensor], lesson: _Lesson, validation: CrossingTensors
) -> _State:
    config = lesson.config
    leaves = {name: value.clone().requires_grad_() for name, value in first_values.items()}
    optimizer = _OPTIMIZERS[config.optimizer](list(leaves.values()), config.rate)
    state = _State(
        leaves=leaves,
        best=_copies(leaves),
        optimizer=optimizer,
        scheduler=_SCHEDULES[config.schedule](optimizer, config.epochs),
    )
    role = _role(config, lesson.loss)
    row = {"role": role, "epoch": 0, **_validate(state, lesson, validation)}
    state.history.append(row)
    state.best_entropy = row["val_ce"]
    return state


def _one_epoch(state: _State, lesson: _Lesson, validation: CrossingTensors) -> Row:
    """Train through all images once, validate, and keep or roll back; return the history row."""
    state.epoch += 1
    config = lesson.config
    row: Row = {"role": _role(config, lesson.loss), "epoch": state.epoch}
    row["learning_rate"] = float(state.optimizer.param_groups[0]["lr"])
    try:
        row |= _learn(state, lesson)
        row |= _validate(state, lesson, validation)
        _check_validation(row["val_ce"], state.history[0]["val_ce"])
    except _DivergedError as diverged:
        state.stopped = (
            f"diverged in epoch {state.epoch}: {diverged}; "
            f"rolled back to the weights of epoch {state.best_epoch}"
        )
        return row
    state.scheduler.step()
    if row["val_ce"] < state.best_entropy or config.keep == "last":
        state.best_entropy, state.best_epoch = row["val_ce"], state.epoch
        state.best = _copies(state.leaves)
    waited = state.epoch - state.best_epoch
    if config.patience and waited >= config.patience and state.epoch < config.epochs:
        state.stopped = (
            f"stopped early after epoch {state.epoch}: the validation cross entropy has not fallen "
            f"for {waited} epochs; the weights are those of epoch {state.best_epoch}"
        )
    return row


def _learn(state: _State, lesson: _Lesson) -> Row:
    leaves = list(state.leaves.values())
    shares = _relative_gradient_norms(state, lesson) if lesson.surgical else None
    totals: dict[str, float] = {}
    seen = 0
    for batch in lesson.batches(state.epoch):
        gradients, sums, size = lesson.gradients(batch, state.leaves, state.steps + 1)
        if not size:
            continue
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        if shares is None:
            state.optimizer.step()
        else:
            _step_by_shares(state.optimizer, leaves, shares)
        state.steps += 1
        seen += size
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    if not seen:
        raise RunError("there is no image to learn from; scan more images, or add some by --train")
    return {name: total / seen for name, total in totals.items()}


def _relative_gradient_norms(state: _State, lesson: _Lesson) -> list[float]:
    """Return each leaf's mean gradient norm over its own norm, the largest one scaled to 1.

    Differs from source: over at most `RGN_BATCHES` batches of the epoch, not all of them, and per
    tensor whatever the optimizer.
    """
    leaves = list(state.leaves.values())
    sums = [0.0] * len(leaves)
    for batch in islice(lesson.batches(state.epoch), RGN_BATCHES):
        gradients, _, _ = lesson.gradients(batch, state.leaves, state.steps + 1)
        for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            size = float(torch.linalg.vector_norm(leaf.detach()))
            sums[number] += float(torch.linalg.vector_norm(gradient)) / size if size > 0 else 0.0
    largest = max(sums)
    return [value / largest if largest > 0 else 1.0 for value in sums]


def _step_by_shares(
    optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor], shares: Sequence[float]
) -> None:
    """Take an optimizer step, of which each leaf takes its share: a learning rate of its own."""
    before = [leaf.detach().clone() for leaf in leaves]
    optimizer.step()
    with torch.no_grad():
        for leaf, old, share in zip(leaves, before, shares, strict=True):
            leaf.copy_(torch.lerp(old, leaf, share))


def _batches(images: int, config: RepairConfig, epoch: int) -> list[Tensor]:
    """Return the rows of each batch: an order that depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(100_003 * config.seed + epoch)
    return _chunks(torch.randperm(images, generator=generator), config.batch_size)


def _chunks(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _validate(state: _State, lesson: _Lesson, validation: CrossingTensors) -> Row:
    said = None
    if len(validation) or lesson.team.alone:
        said, _ = predict(
            lesson.split,
            validation,
            state.leaves,
            divisor=lesson.config.divisor,
            limit=lesson.judging,
        )
    own = [0.0, 0.0, 0.0]
    if said is not None:
        own = [float(said.cross_entropies.sum()), float(said.right.sum()), float(len(said.labels))]
    sums = torch.tensor(own, dtype=torch.float64, device=lesson.device)
    entropy, right, images = lesson.team.sums([sums])[0].tolist()
    return {"val_ce": entropy / images, "val_accuracy": right / images}


def _sums(terms: LossTerms) -> dict[str, float]:
    values = {
        "loss": terms.loss,
        "ce": terms.cross_entropy,
        "saliency_mean": terms.saliency,
        "r1": terms.r1,
        "r2": terms.r2,
    }
    return {
        name: float(value.detach().sum()) for name, value in values.items() if value is not None
    }


def _check_finite(loss: float, gradients: Sequence[Tensor], step: int) -> None:
    # One number for all of them, so that an accelerator is waited for once.
    size = sum(gradient.abs().sum() for gradient in gradients)
    if not math.isfinite(float(size)) or not math.isfinite(loss):
        what = "gradient" if math.isfinite(loss) else "loss"
        raise _DivergedError(f"the {what} of step {step} is not finite")


def _check_validation(entropy: float, start: float) -> None:
    limit = max(WRECKED_FACTOR * start, WRECKED_NATS + start)
    if not entropy <= limit:  # also where it is not a number
        raise _DivergedError(
            f"the validation cross entropy went from {start:.3g} to {entropy:.3g} nats"
        )


def _role(config: RepairConfig, loss: str) -> str:
    return "repair" if loss == config.loss else loss


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


# -------------------------------------------------------------------- checkpoints


_PLAIN = ("epoch", "steps", "seconds", "stopped", "best_epoch", "best_entropy", "history")


def _save(state: _State, path: Path) -> None:
    document = {
        **{name: getattr(state, name) for name in _PLAIN},
        "leaves": {name: value.detach() for name, value in state.leaves.items()},
        "best": state.best,
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(document, temporary)


def _restore(state: _State, path: Path) -> None:
    try:
        document = load_whole(path)
        with torch.no_grad():
            for name, leaf in state.leaves.items():
                leaf.copy_(document["leaves"][name])
                state.best[name].copy_(document["best"][name])
        state.optimizer.load_state_dict(document["optimizer"])
        state.scheduler.load_state_dict(document["scheduler"])
        for name in _PLAIN:
            setattr(state, name, document[name])
    except Exception as error:
        raise DamagedCheckpointError(
            f"the checkpoint {path} is damaged; remove it and go on with --resume: that training "
            "starts again"
        ) from error


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
