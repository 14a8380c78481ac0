"""What crosses the cut before a layer, computed once: the prefix of a repair never changes.

All that comes before the repaired layer is frozen, so the tensors that enter it are the same in
every epoch. `cross_tensors` keeps them in memory while they fit a budget (`MemoryCache`), else
computes them again for every batch (`RecomputedPrefix`): the same tensors, many times slower.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from audit.images import ImageFolder, iterate_batches

if TYPE_CHECKING:
    from audit.networks import Network, Split

CacheKind = Literal["memory", "recompute"]
GIB = 2**30

_PREFIX_BATCH = 64  # images per prefix pass; no influence on the result beyond rounding
_SHARE_OF_MEMORY = 0.25  # of what is available now, where no budget is given
_SHARE_OF_DEVICE = 0.5  # of free accelerator memory that the cache may take


@dataclass(frozen=True, kw_only=True)
class CrossingBatch:
    """What one batch sends across the cut.

    Attributes:
        crossing: Every tensor that crosses, each batch first, on the network's device.
        labels: True classes, int64 (B,), there too.
        positions: Where the images stand in the folder's records, int64 (B,), on the CPU.
    """

    crossing: tuple[Tensor, ...]
    labels: Tensor
    positions: Tensor


class CrossingTensors(Protocol):
    """Images as they look at the cut; rows count from 0 to `len`."""

    kind: CacheKind
    bytes: int
    tensors: int
    seconds: float

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> CrossingBatch:
        """Return the given rows (B,), in that order; unreadable images are left out."""
        ...


def cross_tensors(
    network: Network,
    split: Split,
    folder: ImageFolder,
    indices: Sequence[int],
    *,
    budget_bytes: int,
    kind: CacheKind | None = None,
    on_skip: Callable[[int, str], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> MemoryCache | RecomputedPrefix:
    """Return the images of a folder as they look at a cut.

    Args:
        network: Where the pixels are normalized.
        split: The cut.
        folder: The images.
        indices: Positions of the wanted images in the folder's records.
        budget_bytes: What the tensors may take in memory.
        kind: Decides in place of the budget, to repeat an earlier choice.
        on_skip: Called with position and reason for each image that cannot be decoded.
        on_batch: Called with the number of images of each batch that was computed.
    """
    source = _Source(network=network, split=split, folder=folder, on_skip=on_skip)
    if kind is None:
        kind = "memory" if crossing_bytes(split, len(indices)) <= budget_bytes else "recompute"
    if kind == "memory":
        return MemoryCache(source, indices, on_batch=on_batch)
    return RecomputedPrefix(source, indices)


def crossing_bytes(split: Split, images: int) -> int:
    """Return the memory that the crossing tensors of so many images take."""
    # Every crossing tensor is counted in single precision; few networks use another.
    return 4 * images * sum(math.prod(shape) for shape in split.crossing_shapes)


def default_budget_bytes() -> int:
    """Return a quarter of the memory that is available to this process now."""
    available = [_available_in_system(), *_available_in_cgroup()]
    return int(_SHARE_OF_MEMORY * min(available))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Images and the prefix that they run through."""

    network: Network
    split: Split
    folder: ImageFolder
    on_skip: Callable[[int, str], None] | None

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[CrossingBatch]:
        network = self.network
        for batch in iterate_batches(
            self.folder,
            indices,
            network.card.preprocessing,
            batch_size=batch_size,
            on_skip=self.on_skip,
        ):
            crossing = self.split.prefix(network.normalize(batch.pixels))
            yield CrossingBatch(
                crossing=crossing, labels=self.labels(batch.indices), positions=batch.indices
            )

    def labels(self, positions: Tensor) -> Tensor:
        found = [self.folder.records[position].label for position in positions.tolist()]
        return torch.tensor(found, dtype=torch.int64, device=self.network.program.device)


class MemoryCache:
    """Crossing tensors in memory: on the network's device where they fit, else on the host."""

    kind: CacheKind = "memory"

    def __init__(
        self,
        source: _Source,
        indices: Sequence[int],
        *,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        started_s = time.perf_counter()
        self._device = source.network.program.device
        stored: list[Tensor] = []
        labels: list[Tensor] = []
        positions: list[Tensor] = []
        filled = 0
        place = _storage_device(self._device, crossing_bytes(source.split, len(indices)))
        for batch in source.batches(indices, _PREFIX_BATCH):
            if not stored:
                stored = [
                    torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype, device=place)
                    for tensor in batch.crossing
                ]
            count = len(batch.positions)
            for kept, tensor in zip(stored, batch.crossing, strict=True):
                kept[filled : filled + count] = tensor
            labels.append(batch.labels)
            positions.append(batch.positions)
            filled += count
            if on_batch is not None:
                on_batch(count)
        self._crossing = [tensor[:filled] for tensor in stored]
        self._labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
        self._positions = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
        self.bytes = sum(tensor.nbytes for tensor in self._crossing)
        self.tensors = len(source.split.crossing_shapes)
        self.seconds = time.perf_counter() - started_s

    def __len__(self) -> int:
        return len(self._positions)

    def batch(self, rows: Tensor) -> CrossingBatch:
        return CrossingBatch(
            crossing=tuple(
                tensor[rows.to(tensor.device)].to(self._device) for tensor in self._crossing
            ),
            labels=self._labels[rows.to(self._labels.device)],
            positions=self._positions[rows],
        )


class RecomputedPrefix:
    """Crossing tensors computed again whenever they are asked for."""

    kind: CacheKind = "recompute"
    bytes = 0
    seconds = 0.0

    def __init__(self, source: _Source, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = torch.as_tensor(list(indices), dtype=torch.int64)
        self.tensors = len(source.split.crossing_shapes)

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, rows: Tensor) -> CrossingBatch:
        wanted = self._indices[rows].tolist()
        batches = list(self._source.batches(wanted, max(1, len(wanted))))
        if batches:
            (batch,) = batches
            return batch
        device = self._source.network.program.device
        shapes = self._source.split.crossing_shapes
        nothing = torch.empty(0, dtype=torch.int64)
        return CrossingBatch(
            crossing=tuple(torch.empty((0, *shape), device=device) for shape in shapes),
            labels=nothing.to(device),
            positions=nothing,
        )


def _storage_device(device: torch.device, needed_bytes: int) -> torch.device:
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if needed_bytes <= _SHARE_OF_DEVICE * free else torch.device("cpu")


def _available_in_system() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # No such file outside Linux: count on half of all memory.
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * GIB


def _available_in_cgroup() -> list[int]:
    """Return what a container's limit leaves, where there is one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no cgroup, or "max"
        return []
    return [max(0, limit - used)]
