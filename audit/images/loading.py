"""Load the pixels of recorded images in batches, in order, with or without worker processes.

A file that cannot be decoded is left out of its batch and reported; everything else arrives the
same however many workers there are. Pixels stay uint8: normalizing is the network's business
(`Network.normalize`).
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from audit.errors import ImageError
from audit.images.decoding import UnreadableImageError, decode, preprocess, quiet_pillow
from audit.images.records import ImageFolder

if TYPE_CHECKING:
    from audit.networks.card import Preprocessing

__all__ = ["ImageBatch", "iterate_batches", "load_pixels"]

_Loaded = tuple[int, Tensor | None, str]  # position, pixels, reason if there are none
_Collated = tuple[Tensor, Tensor, list[tuple[int, str]]]  # pixels, positions, skipped


@dataclass
class ImageBatch:
    """Pixels uint8 (B, 3, h, w) and their positions in the folder's records, int64 (B,)."""

    pixels: Tensor
    indices: Tensor


def iterate_batches(
    folder: ImageFolder,
    indices: Sequence[int],
    preprocessing: "Preprocessing",
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    on_skip: Callable[[int, str], None] | None = None,
) -> Iterator[ImageBatch]:
    """Yield the preprocessed images at the given positions, in that order.

    A batch is smaller than `batch_size` where images were skipped, and left out where all of them
    were.

    Args:
        workers: Worker processes; at most as many as there are processors and batches. 0 loads in
            this process.
        pin_memory: Put batches into page-locked memory; only where there is a GPU.
        on_skip: Called with the position and the reason, in one line, of each image that cannot be
            loaded.

    Raises:
        ImageError: If a worker process died.
    """
    if not len(indices):
        return
    images = _Images(folder, [int(i) for i in indices], preprocessing)
    batches = -(-len(indices) // batch_size)
    loader = DataLoader(
        images,
        batch_size=batch_size,
        num_workers=min(workers, batches, _processors()),
        pin_memory=pin_memory and torch.cuda.is_available(),
        collate_fn=images.collate,
        worker_init_fn=_leave_interrupts_to_parent,
        generator=torch.Generator(),  # its own: loading leaves the global random state alone
    )
    for pixels, positions, skipped in _in_order(loader):
        if on_skip is not None:
            for position, reason in skipped:
                on_skip(position, reason)
        if len(positions):
            yield ImageBatch(pixels=pixels, indices=positions)


def load_pixels(
    folder: ImageFolder,
    indices: Sequence[int],
    preprocessing: "Preprocessing",
    *,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
    on_skip: Callable[[int, str], None] | None = None,
) -> ImageBatch:
    """Return all the images at the given positions at once; see `iterate_batches`."""
    loading = iterate_batches(
        folder,
        indices,
        preprocessing,
        batch_size=batch_size,
        workers=workers,
        pin_memory=pin_memory,
        on_skip=on_skip,
    )
    batches = list(loading)
    if not batches:
        return ImageBatch(
            pixels=torch.empty((0, 3, *preprocessing.input_size), dtype=torch.uint8),
            indices=torch.empty(0, dtype=torch.int64),
        )
    return ImageBatch(
        pixels=torch.cat([batch.pixels for batch in batches]),
        indices=torch.cat([batch.indices for batch in batches]),
    )


class _Images(Dataset[_Loaded]):
    """Decodes and preprocesses in whatever process it was sent to."""

    def __init__(
        self, folder: ImageFolder, positions: list[int], preprocessing: "Preprocessing"
    ) -> None:
        # The paths alone: each worker process gets a copy.
        self.root = folder.root
        self.positions = positions
        self.paths = [folder.records[position].path for position in positions]
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> _Loaded:
        position = self.positions[item]
        try:
            with quiet_pillow():
                image = decode(self.root / self.paths[item])
                return position, torch.from_numpy(preprocess(image, self.preprocessing)), ""
        except UnreadableImageError as error:
            return position, None, str(error)

    def collate(self, loaded: Sequence[_Loaded]) -> _Collated:
        good = [(position, pixels) for position, pixels, _ in loaded if pixels is not None]
        skipped = [(position, reason) for position, pixels, reason in loaded if pixels is None]
        empty = torch.empty((0, 3, *self.preprocessing.input_size), dtype=torch.uint8)
        return (
            torch.stack([pixels for _, pixels in good]) if good else empty,
            torch.tensor([position for position, _ in good], dtype=torch.int64),
            skipped,
        )


def _in_order(loader: "DataLoader[Any]") -> Iterator[_Collated]:
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads; workers use nothing that a thread may hold.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        batches = iter(loader)
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ImageError(
                "a worker process that loads images died, most likely for want of memory; "
                "use fewer workers or smaller batches"
            ) from error


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
