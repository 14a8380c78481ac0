"""Teach a trained network other classes: `repair transfer`.

    put a new head on its features     1x1 convolution and classifier (repair.new_head)
    compute the features once          they are frozen (repair.cache)
    train the head                     by the loss, whose maps are those of the new convolution;
                                       again by plain cross entropy (repair.training)
    judge on the test split            which training never saw
    write an exported program          with its card, for `audit scan`, and a record of all numbers

How far it has come is kept beside the program until that is written (repair.transfer_progress).

Source: Halliwell and Lecue 2020, section 4.1.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audit import console
from audit.environment import choose_device, device_record, versions
from audit.errors import UsageError
from audit.files import read_json, write_bytes, write_json
from audit.images import ImageFolder, Split, class_names, open_image_folder
from audit.networks import Network, open_network, write_card
from audit.statistics import bootstrap_mean
from repair.cache import CrossingTensors
from repair.config import RepairConfig
from repair.crossing import choose_room, cross_splits
from repair.decision import Predictions, compare, judge_penalty
from repair.maps import map_similarity, true_class_maps
from repair.new_head import FILTERS, head_split, with_new_head
from repair.sources import positions
from repair.training import Row, Trained, predict, train_layer
from repair.transfer_progress import Progress, Settings

_SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class TransferRequest:
    """What to teach which network, and with what at hand; `RepairConfig` decides the numbers.

    Attributes:
        model: A model file or a registry name.
        data: Image folder, one sub-folder per new class.
        out: The exported program to write; its card (.toml) and record (.json) stand beside it.
        filters: Of the new 1x1 convolution.
        arch: Architecture of a state dict.
        device: `auto`, `cpu` or `cuda`.
        cache_gib: Memory for the features; a quarter of what is available when None.
        command: The command line, for the record.
        trust_pickle: Let a pickled module run its code.
        code: Folder with the code of a pickled module.
        resume: Go on with the transfer to `out` that was interrupted, by the settings it was
            started with.
        stated: Settings (fields of `RepairConfig`, and `filters`) that must equal those of a
            resumed transfer.
    """

    model: str
    data: Path
    out: Path
    filters: int = FILTERS
    arch: str | None = None
    device: str = "auto"
    cache_gib: float | None = None
    command: tuple[str, ...] = ()
    trust_pickle: bool = False
    code: Path | None = None
    resume: bool = False
    stated: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.filters < 1:
            raise UsageError(f"--filters is {self.filters}; expected at least 1")
        if self.out.suffix != ".pt2":
            raise UsageError(
                f"--out is {self.out}; an exported program is written, so its name ends in .pt2"
            )


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """A trained head, what it says about held-out images, and the same by plain cross entropy.

    Attributes:
        network: Features and head, with the weights of the best epoch.
        trained: How the head was trained.
        test: What the network says about the held-out images.
        control: What a head says that plain cross entropy trained from the same start, over the
            same batches; None where it was not asked for, or the loss was cross entropy itself.
        ssim: Similarity of each held-out image's map to the control's, (N,); None without one.
    """

    network: Network
    trained: Trained
    test: Predictions
    control: Predictions | None
    ssim: np.ndarray | None

    def as_dict(self, classes: Sequence[str], *, seed: int) -> dict[str, Any]:
        """Return the numbers for the record, with intervals."""
        document: dict[str, Any] = {
            "after": self.test.metrics(classes, seed=seed),
            "control": None,
            "penalty": {"earned": None, "sentence": "The penalty was not judged: no control ran."},
            "ssim": None,
            "history": self.trained.history,
            "best_epoch": self.trained.best_epoch,
            "stopped": self.trained.stopped,
        }
        if self.control is not None and self.ssim is not None:
            difference = compare(self.control, self.test, seed=seed)
            judgement = judge_penalty(self.test, self.control, difference)
            document["control"] = {
                "name": "ce",
                "after": self.control.metrics(classes, seed=seed),
                "versus": difference.as_dict(),
            }
            document["penalty"] = {"earned": judgement.earned, "sentence": judgement.sentence}
            document["ssim"] = bootstrap_mean(self.ssim, seed=seed).as_dict()
        return document


def transfer_network(request: TransferRequest, config: RepairConfig) -> dict[str, Any]:
    """Write the network with its new head, its card and its record; return the record.

    Raises:
        LayermendError: The model, the images or the place to write cannot be used.
    """
    if config.loss_function.needs_masks:
        raise UsageError(f"transfer has no masks, so --loss cannot be {config.loss}")
    progress = Progress(request.out)
    if request.resume:
        was = progress.agreed(config, request.filters, request.stated)
        config = was.config
        request = replace(request, filters=was.filters, command=was.command)
    else:
        _check_free(request.out, progress)
    device = choose_device(request.device)
    classes = class_names(request.data)
    if len(classes) < 2:
        raise UsageError(
            f"{request.data} holds the class {', '.join(classes)} alone; a classifier needs two"
        )
    network = open_network(
        request.model,
        arch=request.arch,
        trust_pickle=request.trust_pickle,
        code=request.code,
        device=device,
    )
    folder = open_image_folder(request.data, classes, seed=config.seed)
    settings = Settings(
        config=config,
        filters=request.filters,
        command=request.command,
        source=network.source,
        model=network.sha256,
        data=folder.fingerprint,
        classes=classes,
    )
    with progress.under_way():
        if request.resume:
            progress.check_same(settings)
            console.say(f"resuming {progress.folder}")
        else:
            progress.begin(settings)
        if request.out.exists():  # all was done, but for tidying up
            return read_json(_record_path(request.out))
        return _carry_out(request, settings, network, folder, progress)


def _check_free(out: Path, progress: Progress) -> None:
    if progress.has_trained:
        raise UsageError(
            f"{progress.folder} holds an unfinished transfer; go on with it by --resume, or give "
            "another name with --out"
        )
    present = [path for path in (out, _record_path(out)) if path.exists()]
    if present:
        raise UsageError(f"{present[0]} is there already; give another name with --out")


def _carry_out(
    request: TransferRequest,
    settings: Settings,
    network: Network,
    folder: ImageFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Train the head, or go on with it, and write everything; return the record."""
    config = settings.config
    start = with_new_head(network, settings.classes, filters=settings.filters, seed=config.seed)
    crossing = _cross(start, folder, request, config)
    trainings = 2 if config.has_control else 1
    with console.progress("training the new head, epochs", trainings * config.epochs) as bar:
        found = transfer(
            start, crossing, config, progress=progress, on_epoch=lambda row: bar.advance()
        )
    if found.trained.stopped:
        console.say(f"training {found.trained.stopped}")
    record = {
        "command": list(settings.command),
        "config": {**config.as_dict(), "filters": settings.filters},
        "versions": versions(),
        "device": device_record(network.program.device.type),
        "model": {"source": network.source, "sha256": network.sha256},
        "data": {"root": str(folder.root), "fingerprint": folder.fingerprint},
        "classes": list(settings.classes),
        "splits": {name: len(tensors) for name, tensors in crossing.items()},
        **found.as_dict(settings.classes, seed=config.seed),
        "out": str(request.out),
    }
    buffer = io.BytesIO()
    torch.export.save(found.network.program.to_exported(), buffer)
    write_card(found.network.card, request.out.with_suffix(".toml"))
    write_json(_record_path(request.out), record)
    write_bytes(request.out, buffer.getvalue())  # last: where it is, all is
    return record


def transfer(
    network: Network,
    crossing: Mapping[str, CrossingTensors],
    config: RepairConfig,
    *,
    progress: Progress | None = None,
    on_epoch: Callable[[Row], None] | None = None,
) -> Transferred:
    """Return the head trained by the configured loss, and judged beside plain cross entropy.

    Args:
        network: From `with_new_head`.
        crossing: Images by split (train, val, test) as they enter the new convolution.
        config: Loss, penalty and training settings.
        progress: Keeps how far training has come, and knows how far it had; nothing is kept when
            None.
        on_epoch: Called with the history row of every epoch, the control's included.
    """
    split, classifier = head_split(network)

    def train(loss: str) -> Trained:
        return train_layer(
            split,
            crossing["train"],
            crossing["val"],
            config,
            loss=loss,
            also=classifier,
            state_path=progress.state_path(loss) if progress else None,
            on_epoch=on_epoch,
        )

    test = crossing["test"]
    trained = train(config.loss)
    said, _ = predict(split, test, trained.parameters)
    control, similarity = None, None
    if config.has_control:
        plain = train("ce").parameters
        control, _ = predict(split, test, plain)
        similarity = map_similarity(
            true_class_maps(split, test, plain), true_class_maps(split, test, trained.parameters)
        )
    return Transferred(
        network=network.with_state(trained.parameters),
        trained=trained,
        test=said,
        control=control,
        ssim=similarity,
    )


def _cross(
    start: Network, folder: ImageFolder, request: TransferRequest, config: RepairConfig
) -> dict[str, CrossingTensors]:
    """Return the features of every image, by split."""
    split, _ = head_split(start)
    wanted: dict[str, tuple[int, ...]] = {name: positions(folder, name) for name in _SPLITS}
    return cross_splits(
        start,
        split,
        folder,
        wanted,
        choose_room(request.cache_gib),
        beside=config.beside,
    )


def _record_path(out: Path) -> Path:
    return out.with_suffix(".json")
