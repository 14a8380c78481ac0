"""What crosses the cut before a layer, computed once: the prefix of a repair never changes.

All that comes before the repaired layer is frozen, so the tensors that enter it are the same in
every epoch. `cross_tensors` keeps them in memory while they fit a budget (`MemoryCache`), else in
memory-mapped files within another (`DiskCache`), else computes them again for every batch
(`RecomputedPrefix`): the same tensors bit for bit, for every prefix pass takes equally many images.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import torch
from torch import Tensor

from audit.batches import BatchLimit
from audit.errors import RunError
from audit.files import read_json, write_json
from audit.images import ImageFolder, iterate_batches

if TYPE_CHECKING:
    from audit.networks import Network, Split
    from audit.networks.guided_prefix import GuidedPrefix
    from repair.counterfactuals import Counterfactuals

CacheKind = Literal["memory", "disk", "recompute"]
Beside = Literal["images", "gates"]
GIB = 2**30

_SMALLEST_PASS, _LARGEST_PASS = 16, 64  # images per prefix pass
_SHARE_OF_MEMORY = 0.25  # of what is available now, where no budget is given
_SHARE_OF_DISK = 0.25  # of what is free now, where no budget is given
_MANIFEST = "manifest.json"
_SHARE_OF_DEVICE = 0.5  # of free accelerator memory that the cache may take


@dataclass(frozen=True, kw_only=True)
class CrossingBatch:
    """What one batch sends across the cut.

    Attributes:
        crossing: Every tensor that crosses, each batch first, on the network's device.
        labels: True classes, int64 (B,), there too.
        positions: Where the images stand in the folder's records, int64 (B,), on the CPU.
        images: What it all came from, normalized, (B, 3, H, W), where that was asked for.
        gates: Those of `Split.guided_prefix` for the images, uint8 (B, bytes), likewise.
    """

    crossing: tuple[Tensor, ...]
    labels: Tensor
    positions: Tensor
    images: Tensor | None = None
    gates: Tensor | None = None


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


@dataclass(frozen=True, kw_only=True)
class DiskSpace:
    """Where crossing tensors may lie on the disk.

    Attributes:
        folder: For them alone; made when it is used, and the caller's to remove.
        budget_bytes: What they may take there.
    """

    folder: Path
    budget_bytes: int


def cross_tensors(
    network: Network,
    split: Split,
    folder: ImageFolder,
    indices: Sequence[int],
    *,
    budget_bytes: int,
    disk: DiskSpace | None = None,
    kind: CacheKind | None = None,
    batch_size: int = 32,
    beside: Beside | None = None,
    counterfactuals: Counterfactuals | None = None,
    on_skip: Callable[[int, str], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> MemoryCache | DiskCache | RecomputedPrefix:
    """Return the images of a folder as they look at a cut.

    A disk that cannot take them after all leads to recomputation, whose `failure` says why.

    Args:
        network: Where the pixels are normalized.
        split: The cut.
        folder: The images.
        indices: Positions of the wanted images in the folder's records.
        budget_bytes: What the tensors may take in memory.
        disk: Where they may lie if that is too little; nowhere when None.
        kind: Decides in place of the budgets, to repeat an earlier choice.
        batch_size: Images that will be asked for at a time.
        beside: Keep the normalized images too, or the prefix's gates for guided gradients (the
            images where an operation of the prefix has no rule there).
        counterfactuals: Makes of each image what takes its place.
        on_skip: Called with position and reason for each image that cannot be decoded.
        on_batch: Called with the number of images of each batch that was computed.
    """
    source = _Source(
        network=network,
        split=split,
        folder=folder,
        pass_size=min(max(batch_size, _SMALLEST_PASS), _LARGEST_PASS),
        beside=_beside(beside, split),
        counterfactuals=counterfactuals,
        on_skip=on_skip,
    )
    if kind is None:
        kind = _choose(source.bytes(len(indices)), budget_bytes, disk)
    if kind == "memory":
        return MemoryCache(source, indices, on_batch=on_batch)
    failure = None
    if kind == "disk":
        if disk is None:
            raise ValueError("kind is 'disk', but there is no disk space to use; pass disk=...")
        try:
            return DiskCache(source, indices, disk.folder, on_batch=on_batch)
        except OSError as error:
            failure = error.strerror or str(error)
    return RecomputedPrefix(source, indices, failure=failure)


def crossing_bytes(split: Split, images: int) -> int:
    """Return the memory that the crossing tensors of so many images take."""
    # Every crossing tensor is counted in single precision; few networks use another.
    return 4 * images * sum(math.prod(shape) for shape in split.crossing_shapes)


def default_budget_bytes() -> int:
    """Return a quarter of the memory that is available to this process now."""
    available = [_available_in_system(), *_available_in_cgroup()]
    return int(_SHARE_OF_MEMORY * min(available))


def default_disk_bytes(folder: Path) -> int:
    """Return a quarter of what is free on the file system of a folder."""
    return int(_SHARE_OF_DISK * shutil.disk_usage(folder).free)


def _choose(needed_bytes: int, memory_bytes: int, disk: DiskSpace | None) -> CacheKind:
    if needed_bytes <= memory_bytes:
        return "memory"
    if disk is not None and needed_bytes <= disk.budget_bytes:
        return "disk"
    return "recompute"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Images and the prefix that they run through, `pass_size` at a time."""

    network: Network
    split: Split
    folder: ImageFolder
    pass_size: int
    on_skip: Callable[[int, str], None] | None
    limit: BatchLimit = field(default_factory=BatchLimit)
    beside: Beside | None = None
    counterfactuals: Counterfactuals | None = None

    def bytes(self, images: int) -> int:
        """Return the memory that so many images take."""
        own = 0
        if self.beside == "images":
            own = 4 * 3 * math.prod(self.network.program.input_size)
        elif self.beside == "gates":
            own = self._guided_prefix.bytes
        return crossing_bytes(self.split, images) + own * images

    @property
    def tensors(self) -> int:
        return len(self.split.crossing_shapes)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all that is stored, without the batch axis."""
        own: list[tuple[int, ...]] = []
        if self.beside == "images":
            own = [(3, *self.network.program.input_size)]
        elif self.beside == "gates":
            own = [(self._guided_prefix.bytes,)]
        return [*self.split.crossing_shapes, *own]

    @property
    def _guided_prefix(self) -> GuidedPrefix:
        prefix = self.split.guided_prefix
        assert prefix is not None  # see `_beside`
        return prefix

    def batch(self, stored: Sequence[Tensor], labels: Tensor, positions: Tensor) -> CrossingBatch:
        """Return the batch whose tensors are stored in the order of `_tensors`."""
        return CrossingBatch(
            crossing=tuple(stored[: self.tensors]),
            labels=labels,
            positions=positions,
            images=stored[-1] if self.beside == "images" else None,
            gates=stored[-1] if self.beside == "gates" else None,
        )

    def batches(self, indices: Sequence[int]) -> Iterator[CrossingBatch]:
        network = self.network
        for batch in iterate_batches(
            self.folder,
            indices,
            network.card.preprocessing,
            batch_size=self.pass_size,
            on_skip=self.on_skip,
        ):
            if self.counterfactuals is not None:
                batch = self.counterfactuals(batch)
            count = len(batch.indices)
            images = network.normalize(_filled_up(batch.pixels, self.pass_size))
            computed = list(self._prefix(images))
            if self.beside == "images":
                computed.append(images)
            elif self.beside == "gates":
                computed.append(self._guided_prefix.gates(images))
            stored = [tensor[:count] for tensor in computed]
            yield self.batch(stored, self.labels(batch.indices), batch.indices)

    def _prefix(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what crosses the cut, all images in one pass where they fit in memory."""
        passes = list(self.limit.parts(lambda rows: self.split.prefix(images[rows]), len(images)))
        if len(passes) == 1:
            return tuple(passes[0])
        return tuple(map(torch.cat, zip(*passes, strict=True)))

    def labels(self, positions: Tensor) -> Tensor:
        found = [self.folder.records[position].label for position in positions.tolist()]
        return torch.tensor(found, dtype=torch.int64, device=self.network.program.device)

    def fingerprint(self, indices: Sequence[int]) -> str:
        """Return the SHA-256 of all that the bits of the crossing tensors depend on."""
        program = self.network.program
        images = [(int(index), self.folder.records[index].sha256) for index in indices]
        parts = {
            "model": self.network.sha256,
            "preprocessing": asdict(self.network.card.preprocessing),
            "layer": self.split.layer.name,
            "crossing": [node.name for node in self.split.crossing_nodes],
            "shapes": self.split.crossing_shapes,
            "run_with": [torch.__version__, str(program.dtype), program.device.type],
            "pass_size": self.pass_size,
            "beside": self.beside,
            "counterfactuals": self.counterfactuals.fingerprint if self.counterfactuals else None,
            "images": images,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tensors(batch: CrossingBatch) -> tuple[Tensor, ...]:
    """Return all that is stored of a batch."""
    beside = batch.images if batch.gates is None else batch.gates
    return batch.crossing if beside is None else (*batch.crossing, beside)


def _beside(wanted: Beside | None, split: Split) -> Beside | None:
    return "images" if wanted == "gates" and split.guided_prefix is None else wanted


def _filled_up(pixels: Tensor, count: int) -> Tensor:
    """Return (B, 3, H, W) as (count, 3, H, W); the further images are black.

    Kernels are chosen by the size of a batch and round differently: equal sizes, equal bits.
    """
    missing = pixels.new_zeros((count - len(pixels), *pixels.shape[1:]))
    return torch.cat([pixels, missing]) if len(missing) else pixels


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
        self._source = source
        self._device = source.network.program.device
        stored: list[Tensor] = []
        labels: list[Tensor] = []
        positions: list[Tensor] = []
        filled = 0
        place = _storage_device(self._device, source.bytes(len(indices)))
        for batch in source.batches(indices):
            if not stored:
                stored = [
                    torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype, device=place)
                    for tensor in _tensors(batch)
                ]
            count = len(batch.positions)
            for kept, tensor in zip(stored, _tensors(batch), strict=True):
                kept[filled : filled + count] = tensor
            labels.append(batch.labels)
            positions.append(batch.positions)
            filled += count
            if on_batch is not None:
                on_batch(count)
        self._stored = [tensor[:filled] for tensor in stored]
        self._labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
        self._positions = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
        self.bytes = sum(tensor.nbytes for tensor in self._stored)
        self.tensors = source.tensors
        self.seconds = time.perf_counter() - started_s

    def __len__(self) -> int:
        return len(self._positions)

    def batch(self, rows: Tensor) -> CrossingBatch:
        return self._source.batch(
            [tensor[rows.to(tensor.device)].to(self._device) for tensor in self._stored],
            self._labels[rows.to(self._labels.device)],
            self._positions[rows],
        )


class DiskCache:
    """Crossing tensors in memory-mapped files, one for each; complete files are taken over.

    The files hold the rows in order, raw, in the tensor's own type. The manifest is written last,
    whole or not at all: a folder without one that fits is filled anew.

    Raises:
        OSError: The disk is full, or the folder cannot be written; nothing is left in it.
    """

    kind: CacheKind = "disk"

    def __init__(
        self,
        source: _Source,
        indices: Sequence[int],
        folder: Path,
        *,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self._source = source
        self._device = source.network.program.device
        fingerprint = source.fingerprint(indices)
        manifest = _matching_manifest(folder, fingerprint)
        if manifest is None:
            manifest = _fill(folder, source, indices, fingerprint, on_batch)
        else:
            _repeat_calls(manifest, source, on_batch)
        try:
            self._stored = [_mapped(folder, entry) for entry in manifest["tensors"]]
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._positions = torch.tensor(manifest["positions"], dtype=torch.int64)
        self._labels = source.labels(self._positions)
        self.bytes = sum(tensor.nbytes for tensor in self._stored)
        self.tensors = source.tensors
        self.seconds = float(manifest["seconds"])

    def __len__(self) -> int:
        return len(self._positions)

    def batch(self, rows: Tensor) -> CrossingBatch:
        return self._source.batch(
            [tensor[rows].to(self._device) for tensor in self._stored],
            self._labels[rows.to(self._labels.device)],
            self._positions[rows],
        )


class RecomputedPrefix:
    """Crossing tensors computed again whenever they are asked for.

    Attributes:
        failure: Why they are not on the disk although they should be, None if they should not.
    """

    kind: CacheKind = "recompute"
    bytes = 0
    seconds = 0.0

    def __init__(
        self, source: _Source, indices: Sequence[int], *, failure: str | None = None
    ) -> None:
        self._source = source
        self._indices = torch.as_tensor(list(indices), dtype=torch.int64)
        self.tensors = source.tensors
        self.failure = failure

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, rows: Tensor) -> CrossingBatch:
        batches = list(self._source.batches(self._indices[rows].tolist()))
        if batches:
            return self._source.batch(
                [
                    torch.cat(parts) if len(parts) > 1 else parts[0]
                    for parts in zip(*map(_tensors, batches), strict=True)
                ],
                torch.cat([batch.labels for batch in batches]),
                torch.cat([batch.positions for batch in batches]),
            )
        program = self._source.network.program
        shapes = self._source.shapes
        nothing = torch.empty(0, dtype=torch.int64)
        return self._source.batch(
            [torch.empty((0, *shape), device=program.device) for shape in shapes],
            nothing.to(program.device),
            nothing,
        )


# -------------------------------------------------------------------- files of the disk cache


def _fill(
    folder: Path,
    source: _Source,
    indices: Sequence[int],
    fingerprint: str,
    on_batch: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Compute the tensors into a folder and return its manifest; nothing is left on failure."""
    started_s = time.perf_counter()
    skipped: list[tuple[int, str]] = []
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        if source.bytes(len(indices)) > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        noting = _noting(source, skipped)
        tensors, positions = _write_tensors(folder, noting.batches(indices), on_batch)
        manifest = {
            "fingerprint": fingerprint,
            "tensors": tensors,
            "positions": positions,
            "skipped": skipped,
            "seconds": time.perf_counter() - started_s,
        }
        write_json(folder / _MANIFEST, manifest)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return manifest


def _noting(source: _Source, skipped: list[tuple[int, str]]) -> _Source:
    """Return the source, which also notes the images that it skips."""

    def note(position: int, reason: str) -> None:
        skipped.append((position, reason))
        if source.on_skip is not None:
            source.on_skip(position, reason)

    return replace(source, on_skip=note)


def _write_tensors(
    folder: Path, batches: Iterator[CrossingBatch], on_batch: Callable[[int], None] | None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Write what crosses; return an entry for each file, and the images' positions.

    Written, not mapped: a disk that is full answers a write with an error, a mapped page with the
    end of the process.
    """
    entries: list[dict[str, Any]] = []
    positions: list[int] = []
    with ExitStack() as stack:
        streams: list[BinaryIO] = []
        for batch in batches:
            if not streams:
                entries = [_entry(number, tensor) for number, tensor in enumerate(_tensors(batch))]
                streams = [stack.enter_context((folder / e["file"]).open("wb")) for e in entries]
            for stream, tensor in zip(streams, _tensors(batch), strict=True):
                flat = tensor.cpu().contiguous().reshape(-1)
                stream.write(flat.view(torch.uint8).numpy().data)
            positions += batch.positions.tolist()
            if on_batch is not None:
                on_batch(len(batch.positions))
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
    for entry in entries:
        entry["shape"][0] = len(positions)
    return entries, positions


def _entry(number: int, tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"file": f"{number}.bin", "dtype": dtype, "shape": list(tensor.shape)}


def _matching_manifest(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the manifest of a complete cache of the same tensors, None if there is none."""
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["fingerprint"] != fingerprint:
            return None
        for entry in manifest["tensors"]:
            item_bytes = getattr(torch, entry["dtype"]).itemsize
            if (folder / entry["file"]).stat().st_size != item_bytes * math.prod(entry["shape"]):
                return None
    except (RunError, OSError, LookupError, TypeError, AttributeError):  # gone or damaged
        return None
    return manifest


def _repeat_calls(
    manifest: dict[str, Any], source: _Source, on_batch: Callable[[int], None] | None
) -> None:
    """Report what was reported when the files were filled."""
    if source.on_skip is not None:
        for position, reason in manifest["skipped"]:
            source.on_skip(position, reason)
    if on_batch is not None:
        on_batch(len(manifest["positions"]))


def _mapped(folder: Path, entry: dict[str, Any]) -> Tensor:
    shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
    try:
        flat = torch.from_file(
            str(folder / entry["file"]), shared=False, size=math.prod(shape), dtype=dtype
        )
    except RuntimeError as error:  # a file system without memory maps
        raise OSError(errno.ENODEV, f"cannot map {entry['file']} into memory") from error
    return flat.view(shape)


# -------------------------------------------------------------------- what is available


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
