"""What crosses the cut of a layer, for the images of every split, where there is room for it.

Room goes to the training images first: they are asked for in every epoch; further versions of them
(`repair.counterfactuals`) come last. What was chosen is told in one line, recorded, and repeated by
a repair that is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit import console
from audit.images import ImageFolder
from audit.wording import byte_size
from repair.cache import (
    GIB,
    Beside,
    CacheKind,
    CrossingTensors,
    DiskSpace,
    RecomputedPrefix,
    cross_tensors,
    default_budget_bytes,
    default_disk_bytes,
)

if TYPE_CHECKING:
    from audit.networks import Network, Split
    from repair.counterfactuals import Counterfactuals

_WORDINGS: dict[CacheKind, str] = {
    "memory": "kept in memory",
    "disk": "kept on disk until the repair is finished",
    "recompute": "computed again for each batch",
}


@dataclass(frozen=True, kw_only=True)
class Room:
    """What crossing tensors may take.

    Attributes:
        memory_bytes: In memory.
        disk_bytes: On the disk.
        folder: Where on the disk; nowhere when None.
    """

    memory_bytes: int
    disk_bytes: int = 0
    folder: Path | None = None


def choose_room(
    memory_gib: float | None, disk_gib: float | None = None, folder: Path | None = None
) -> Room:
    """Return the room that was asked for, else a quarter of what is available.

    Args:
        memory_gib: 0 alone asks for no cache at all.
        disk_gib: Beside it, on the disk.
        folder: For the files, inside a folder that exists; none are written when None.
    """
    if disk_gib is None and memory_gib == 0:
        disk_gib = 0
    disk_bytes = 0
    if folder is not None:
        disk_bytes = default_disk_bytes(folder.parent) if disk_gib is None else int(disk_gib * GIB)
    return Room(
        memory_bytes=default_budget_bytes() if memory_gib is None else int(memory_gib * GIB),
        disk_bytes=disk_bytes,
        folder=folder,
    )


def cross_splits(
    network: Network,
    split: Split,
    folder: ImageFolder,
    positions: Mapping[str, Sequence[int]],
    room: Room,
    *,
    earlier: Mapping[str, CacheKind] | None = None,
    batch_size: int = 32,
    beside: Mapping[str, Beside] | None = None,
    counterfactuals: Mapping[str, Sequence[Counterfactuals]] | None = None,
    on_skip: Callable[[int, str], None] | None = None,
    on_choice: Callable[[Mapping[str, CrossingTensors]], None] | None = None,
) -> dict[str, CrossingTensors]:
    """Return the images of each split as they look at the cut.

    Further versions of them have the names that `version_name` gives.

    Args:
        network: Where the pixels are normalized.
        split: The cut.
        folder: The images.
        positions: By split, in the order in which they get room, the images' places in the
            folder's records.
        room: For all of them together.
        earlier: Kinds of cache that an earlier attempt chose, by split.
        batch_size: Images that will be asked for at a time.
        beside: By split, what is kept beside the crossing tensors.
        counterfactuals: By split, what takes the place of its images, a version of them each.
        on_skip: Called with place and reason for each image that cannot be decoded.
        on_choice: Called after each split with all that there is so far.
    """
    memory_bytes, disk_bytes = room.memory_bytes, room.disk_bytes
    crossing: dict[str, CrossingTensors] = {}
    made = counterfactuals or {}
    wanted = [
        (number, name, version)
        for name in positions
        for number, version in enumerate(made.get(name) or (None,))
    ]
    wanted.sort(key=lambda one: one[0] > 0)
    total = sum(len(positions[name]) for _, name, _ in wanted)
    with console.progress(f"computing what enters {split.layer.name}", total) as bar:
        for number, of_split, version in wanted:
            name = version_name(of_split, number)
            space = None
            if room.folder is not None:
                space = DiskSpace(folder=room.folder / name, budget_bytes=disk_bytes)
            tensors = crossing[name] = cross_tensors(
                network,
                split,
                folder,
                positions[of_split],
                budget_bytes=memory_bytes,
                disk=space,
                kind=(earlier or {}).get(name),
                batch_size=batch_size,
                beside=(beside or {}).get(of_split),
                counterfactuals=version,
                on_skip=on_skip,
                on_batch=bar.advance,
            )
            if isinstance(tensors, RecomputedPrefix):
                bar.advance(len(tensors))
                disk_bytes = 0 if tensors.failure else disk_bytes
            elif tensors.kind == "disk":
                disk_bytes -= tensors.bytes
            else:
                memory_bytes -= tensors.bytes
            if on_choice is not None:
                on_choice(crossing)
    return crossing


def version_name(split: str, number: int) -> str:
    """Return the name of a version of a split's images; the first, 0, has the split's."""
    return f"{split}-{number + 1}" if number else split


def further_versions(
    crossing: Mapping[str, CrossingTensors], split: str
) -> tuple[CrossingTensors, ...]:
    """Return the versions of a split's images but the first, in order."""
    found: list[CrossingTensors] = []
    while (name := version_name(split, len(found) + 1)) in crossing:
        found.append(crossing[name])
    return tuple(found)


def cache_kinds(crossing: Mapping[str, CrossingTensors]) -> dict[str, CacheKind]:
    """Return where the tensors of each split are."""
    return {name: tensors.kind for name, tensors in crossing.items()}


def cache_record(crossing: Mapping[str, CrossingTensors]) -> dict[str, Any]:
    """Return where the tensors are and what they take, for repair.json."""
    return {
        "kind": crossing["train"].kind,
        "bytes": sum(tensors.bytes for tensors in crossing.values()),
        "tensors": crossing["train"].tensors,
        "seconds": sum(tensors.seconds for tensors in crossing.values()),
        "splits": cache_kinds(crossing),
    }


def cache_line(layer: str, crossing: Mapping[str, CrossingTensors]) -> str:
    """Return where the tensors are, in one line, and why where they are nowhere."""
    failures = [t.failure for t in crossing.values() if isinstance(t, RecomputedPrefix)]
    why = next(filter(None, failures), None)
    reason = (
        f"the disk cache failed: {why}"
        if why
        else "it exceeds the budgets; --cache-gib and --cache-disk-gib raise them"
    )
    parts = []
    for kind, wording in _WORDINGS.items():
        names = [name for name, tensors in crossing.items() if tensors.kind == kind]
        size = sum(crossing[name].bytes for name in names)
        amount = reason if kind == "recompute" else byte_size(size)
        if names:
            parts.append(f"{wording} for {_told(names)} ({amount})")
    return f"what enters {layer} is {', '.join(parts)}"


def _told(names: Sequence[str]) -> str:
    """Return splits by name, and how many further versions of them there are."""
    splits = [name for name in names if "-" not in name]  # see `version_name`
    versions = len(names) - len(splits)
    further = f"{versions} further {'version' if versions == 1 else 'versions'}"
    return ", ".join([*splits, *([further] if versions else [])])
