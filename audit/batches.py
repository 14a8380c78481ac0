"""How many images at a time? As many as were asked for, and half as many where memory runs out.

An allocation that fails is no end: the images in hand are taken again in halves, and so are all
that follow. What is computed of each image stays the same, up to the order of summation.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from audit import console
from audit.errors import LayermendError

__all__ = ["BatchLimit", "NoMemoryError", "is_out_of_memory"]

T = TypeVar("T")
S = TypeVar("S")

# torch's CPU allocator raises a plain RuntimeError; cuDNN and cuBLAS have words of their own.
_OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    "|unable to find an engine|Cannot allocate memory|std::bad_alloc",
    re.IGNORECASE,
)


class NoMemoryError(LayermendError):
    """A single image that does not fit in memory."""


class BatchLimit:
    """How many images are worked on at a time; halves itself when they do not fit in memory.

    Attributes:
        size: At most so many; None until the first failure, where all that come are tried.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def whole(self, work: Callable[[int], T]) -> T:
        """Return `work(size)`, begun anew with half the size as often as memory runs out.

        `work` has to be repeatable: what it does twice has to come to the same.

        Raises:
            NoMemoryError: A single image does not fit.
        """
        if self.size is None:
            raise ValueError("whole passes need a size to begin with")
        while True:
            done = self._attempt(work, self.size, self.size)
            if done is not None:
                return done[0]

    def parts(self, work: Callable[[slice], T], images: int) -> Iterator[T]:
        """Yield `work` of each stretch of so many images, in order, each as long as fits.

        What `work` does before it fails must not count: it is called again with a shorter stretch.

        Raises:
            NoMemoryError: A single image does not fit.
        """
        start = 0
        while start < images:
            size = min(self.size or images, images - start)
            done = self._attempt(work, slice(start, start + size), size)
            if done is not None:
                start += size
                yield done[0]

    def _attempt(self, work: Callable[[S], T], argument: S, size: int) -> tuple[T] | None:
        """Return what work returned, or None with the limit halved."""
        try:
            return (work(argument),)
        except Exception as error:  # the allocators of torch, CUDA and Python raise three kinds
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise NoMemoryError(
                    "a single image does not fit in memory; use a machine with more of it, "
                    "--device cpu, or a smaller network"
                ) from error
        # Outside of the handler: the error's frames hold what has to be freed.
        self.size = size // 2
        console.say(f"out of memory with {size} images at a time; going on with {self.size}")
        _release()
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is a RuntimeError.
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _release() -> None:
    """Give back what failed work left behind, to the device too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # nothing where no GPU is in use
