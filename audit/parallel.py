"""Several processes that share one job: each runs the same program on its part of the images.

One process needs nothing of this: `ALONE` does nothing and imports nothing. More of them are
started by `--devices N`, which runs the command again in N - 1 further processes, or by `torchrun`.
Lightning Fabric starts them, finds each one's device and holds the process group (gloo on CPUs,
nccl on GPUs).

Rows of a job are dealt out in turn: row i belongs to process i modulo the number of processes. A
scan deals out whole batches instead, so that each is the one that a single process would have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from audit import console
from audit.errors import LayermendError, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import Tensor

__all__ = ["ALONE", "Team", "join_team"]

T = TypeVar("T")


class Team:
    """The processes of a job, seen from one of them.

    Attributes:
        rank: Number of this process, 0 to `size` - 1.
        size: How many there are.
    """

    def __init__(self, fabric: Fabric | None = None, threads: int | None = None) -> None:
        self._fabric = fabric
        self._threads = threads
        self.rank = fabric.global_rank if fabric else 0
        self.size = fabric.world_size if fabric else 1

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """Where Fabric put this process, such as ``cuda:1``; None for a process alone."""
        return str(self._fabric.device) if self._fabric else None

    def dismiss_others(self) -> None:
        """Take the whole processor from here on; the other processes have nothing left to do."""
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)

    def part(self, items: Sequence[Any]) -> tuple[Any, ...]:
        """Return this process's part of what is dealt out."""
        return tuple(items[self.rank :: self.size])

    def part_by_batch(self, items: Sequence[Any], batch_size: int) -> tuple[Any, ...]:
        """Return this process's part where whole batches are dealt out, each as one would have."""
        starts = range(self.rank * batch_size, len(items), self.size * batch_size)
        return tuple(item for at in starts for item in items[at : at + batch_size])

    def own(self, rows: Tensor) -> Tensor:
        """Return where rows of the whole stand in this process's part; others' are left out."""
        return rows[rows % self.size == self.rank] // self.size

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum over all processes of each tensor; all are of one type and device."""
        if self._fabric is None:
            return list(tensors)
        import torch

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        total = cast("Tensor", self._fabric.all_reduce(flat, reduce_op="sum"))
        parts = torch.split(total, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def leaders(self, value: Any) -> Any:
        """Return what the first process passed."""
        return value if self._fabric is None else self._fabric.broadcast(value, src=0)

    def decided(self, decide: Callable[[], T]) -> T:
        """Return what the first process decides; where it raises one of our errors, all do."""
        if self._fabric is None:
            return decide()
        outcome: T | LayermendError | None = None
        if self.leads:
            try:
                outcome = decide()
            except LayermendError as error:
                outcome = error
        found = self.leaders(outcome)
        if isinstance(found, LayermendError):
            raise found
        return cast("T", found)

    def gathered(self, value: Any) -> list[Any]:
        """Return what every process passed, in their order; to the others nothing."""
        if self._fabric is None:
            return [value]
        from torch import distributed

        values = [None] * self.size if self.leads else None
        distributed.gather_object(value, values, dst=0)
        return values or []


ALONE = Team()


def join_team(devices: int, device: str) -> Team:
    """Return the team of this process, after starting the others where that is its task.

    Args:
        devices: Processes on this machine; under `torchrun`, which decides that, 1 or the same.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: `devices` is below 1, more than there are, or not what torchrun started.
    """
    if devices < 1:
        raise UsageError(f"--devices is {devices}; expected at least 1")
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _under_torchrun() else None
    if started is not None and devices not in (1, started):
        raise UsageError(
            f"--devices is {devices}, but torchrun started {started} processes; leave it out"
        )
    if devices == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch
    from lightning_fabric import Fabric

    accelerator = device
    if device == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    count = started or devices
    if accelerator == "cuda" and count > torch.cuda.device_count():
        raise UsageError(
            f"--devices is {count}, but there are {torch.cuda.device_count()} GPUs; "
            "ask for fewer, or for --device cpu"
        )
    threads = torch.get_num_threads()
    if accelerator == "cpu":  # the processes share the processor, they do not each take all of it
        torch.set_num_threads(max(1, threads // count))
    fabric = Fabric(
        accelerator=accelerator,
        devices=count,
        num_nodes=int(os.environ.get("WORLD_SIZE", count)) // count,
        strategy="ddp",
    )
    fabric.launch()
    team = Team(fabric, threads)
    if not team.leads:
        console.be_quiet()
    return team


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
