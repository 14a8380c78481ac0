"""Two checkpoints on the same images: `repair compare A B`.

Both networks classify the same photographs, each with its own preprocessing; the difference is
tested on pairs (exact McNemar test, paired bootstrap). Where both have the layer, their maps of the
true class are compared by structural similarity; where both have the same tensors, those that
differ are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audit import console
from audit.environment import choose_device
from audit.errors import LayerNotFoundError, UsageError
from audit.images import ImageFolder, iterate_batches, open_image_folder
from audit.networks import Network, open_network
from audit.saliency import layer_maps, normalize_maps, resize_maps
from audit.statistics import bootstrap_mean, calibration_error
from repair.decision import Predictions, compare
from repair.losses import cross_entropy
from repair.maps import map_similarity

CHOICES = ("test", "val", "train", "all")


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """Which two networks, on which images.

    Attributes:
        first: A model file or a registry name.
        second: Another, with the same classes.
        data: Image folder.
        split: `test`, `val`, `train` or `all`.
        layer: Whose maps are compared; module path or alias.
        arch: Architecture of state dicts without a card.
        batch_size: Images per forward pass.
        device: `auto`, `cpu` or `cuda`.
        seed: Of splits and bootstraps.
        trust_pickle: Let pickled modules run their code.
        code: Folder with the code of pickled modules.
    """

    first: str
    second: str
    data: Path
    split: str = "test"
    layer: str = "last_conv"
    arch: str | None = None
    batch_size: int = 32
    device: str = "auto"
    seed: int = 0
    trust_pickle: bool = False
    code: Path | None = None

    def __post_init__(self) -> None:
        if self.split not in CHOICES:
            raise UsageError(f"--split is {self.split!r}; expected one of {', '.join(CHOICES)}")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What one network made of the images: predictions, confidence (N,), maps (N, h, w)."""

    predictions: Predictions
    confidence: np.ndarray
    maps: Tensor | None
    positions: np.ndarray


def compare_networks(request: ComparisonRequest) -> dict[str, Any]:
    """Return metrics of both networks, the paired difference (second minus first), map similarity.

    Raises:
        LayermendError: A network or the images cannot be used, or the classes differ.
    """
    device = choose_device(request.device)
    first, second = (_open(source, request, device) for source in (request.first, request.second))
    if set(first.card.classes) != set(second.card.classes):
        raise UsageError(
            f"{request.first} tells {_listed(first)} apart, {request.second} {_listed(second)}; "
            "only networks with the same classes can be compared"
        )
    classes = first.card.classes
    folder = open_image_folder(request.data, classes, seed=request.seed)
    indices = _chosen(folder, request.split)
    order = torch.tensor([second.card.classes.index(name) for name in classes])
    seen = []
    with console.progress("classifying with both networks", 2 * len(indices)) as bar:
        for network, columns in ((first, None), (second, order)):
            seen.append(_look(network, folder, indices, request, columns, bar.advance))
    one, other = seen
    difference = compare(one.predictions, other.predictions, seed=request.seed)
    return {
        "images": len(one.positions),
        "split": request.split,
        "data": {"root": str(folder.root), "fingerprint": folder.fingerprint},
        "first": _record(first, one, classes, request.seed),
        "second": _record(second, other, classes, request.seed),
        "difference": difference.as_dict(),
        "maps": _similarity(one.maps, other.maps, request),
        "changed": _changed(first, second),
    }


def _open(source: str, request: ComparisonRequest, device: str) -> Network:
    return open_network(
        source,
        arch=request.arch,
        trust_pickle=request.trust_pickle,
        code=request.code,
        device=device,
    )


def _chosen(folder: ImageFolder, split: str) -> list[int]:
    found = [i for i, record in enumerate(folder.records) if split in ("all", record.split)]
    if not found:
        raise UsageError(f"{folder.root} has no {split} images; choose others with --split")
    return found


def _look(
    network: Network,
    folder: ImageFolder,
    indices: list[int],
    request: ComparisonRequest,
    order: Tensor | None,
    advance: Callable[[int], None],
) -> _Seen:
    """Return what a network says; `order` puts its outputs in the order of the folder's labels."""
    layer = _layer_with_maps(network, request.layer)
    parts: list[tuple[Tensor, ...]] = []
    maps: list[Tensor] = []
    batches = iterate_batches(
        folder, indices, network.card.preprocessing, batch_size=request.batch_size
    )
    for batch in batches:
        images = network.normalize(batch.pixels)
        labels = torch.tensor([folder.records[i].label for i in batch.indices.tolist()])
        with torch.no_grad():
            logits = network.program.logits(images).double().cpu()
        logits = logits if order is None else logits[:, order]
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        parts.append((labels, predicted, cross_entropy(logits, labels), confidence, batch.indices))
        if layer is not None:
            targets = labels if order is None else order[labels]
            found = layer_maps(network.program, images, targets.to(images.device), layers=[layer])
            maps.append(normalize_maps(found[layer]).float().cpu())
        advance(len(labels))
    true, said, nats, sure, positions = (
        torch.cat(column).numpy() for column in zip(*parts, strict=True)
    )
    return _Seen(
        predictions=Predictions(
            labels=true, predicted=said, p_true=np.exp(-nats), cross_entropies=nats
        ),
        confidence=sure,
        maps=torch.cat(maps) if maps else None,
        positions=positions,
    )


def _layer_with_maps(network: Network, name: str) -> str | None:
    try:
        layer = network.layer(name)
    except LayerNotFoundError:
        return None
    return layer.name if layer.has_maps else None


def _record(network: Network, seen: _Seen, classes: tuple[str, ...], seed: int) -> dict[str, Any]:
    return {
        "source": network.source,
        "sha256": network.sha256,
        **seen.predictions.metrics(classes, seed=seed),
        "calibration_error": calibration_error(seen.confidence, seen.predictions.right),
    }


def _similarity(
    one: Tensor | None, other: Tensor | None, request: ComparisonRequest
) -> dict[str, Any] | None:
    """Return the SSIM of both networks' maps, None where one has no such layer."""
    if one is None or other is None:
        return None
    height, width = (max(one.shape[axis], other.shape[axis]) for axis in (1, 2))
    pair = [
        maps if maps.shape[1:] == (height, width) else resize_maps(maps, (height, width))
        for maps in (one, other)
    ]
    values = map_similarity(*pair)
    ssim = bootstrap_mean(values, seed=request.seed).as_dict()
    return {"layer": request.layer, "method": "gradcam", "ssim": ssim}


def _changed(first: Network, second: Network) -> dict[str, Any] | None:
    """Return which tensors differ, None where the networks do not have the same ones."""
    one, other = first.program.state, second.program.state
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
        return None
    differing = [name for name, value in one.items() if not torch.equal(value, other[name])]
    return {"tensors": len(one), "differing": differing}


def _listed(network: Network) -> str:
    names = network.card.classes
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
