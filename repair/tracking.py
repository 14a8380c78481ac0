"""Every epoch's numbers for TensorBoard: a set of curves for the repair, one for each control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.errors import UsageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_NO_CURVE = ("role", "epoch", "best")


class TrainingLog:
    """Event files below a folder, one sub-folder per role."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}

    @classmethod
    @contextmanager
    def open(cls, folder: Path | None) -> Iterator[TrainingLog | None]:
        """Yield a log in `folder/tensorboard`, None without a folder; close it in the end.

        Raises:
            UsageError: TensorBoard is not installed.
        """
        if folder is None:
            yield None
            return
        log = cls(folder / "tensorboard")
        try:
            yield log
        finally:
            for writer in log._writers.values():
                writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of one epoch, a row of history.parquet."""
        writer = self._writer(str(row["role"]), int(row["epoch"]))
        for name, value in row.items():
            if name not in _NO_CURVE and value is not None:
                writer.add_scalar(name, float(value), int(row["epoch"]))

    def _writer(self, role: str, epoch: int) -> SummaryWriter:
        if role not in self._writers:
            # What an earlier attempt wrote of this epoch and later ones is not shown.
            self._writers[role] = _summary_writer()(str(self._folder / role), purge_step=epoch)
        return self._writers[role]


def check_tensorboard() -> None:
    """Raise UsageError where TensorBoard is not installed."""
    _summary_writer()


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs TensorBoard; get it with `pip install 'layermend[tensorboard]'`"
        ) from error
    return SummaryWriter
