"""What an unfinished scan has done so far, kept in its run folder until it is finished.

    RUN/progress/STEP.pt            what a finished step came to, by the first process
    RUN/progress/STEP-0of2.pt       how far process 0 of 2 is within a step
    RUN/progress/lock               held by the process that is writing the run

Files are written whole or not at all and hold tensors and plain values only, so that reading one
runs no code. Between two checkpoints of a step lies at least twenty times what one takes: they cost
a twentieth of the time at most, however large the network, and a killed scan loses that much.
"""

from __future__ import annotations

import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from audit.errors import RunError
from audit.files import replacing
from audit.parallel import ALONE, Team

__all__ = ["Checkpoint", "Checkpoints", "load_whole"]

INTERVAL = 20.0
"""Time between two checkpoints of a step, in times of what one takes."""

_ASSUMED_BYTES_A_SECOND = 100 * 2**20  # until one was written
_ASSUMED_LEAST_S = 0.02


class Checkpoints:
    """The checkpoints of one scan, one for each of its steps.

    Args:
        folder: The run folder.
        team: Processes that share the scan; each keeps its own part of a step.
    """

    def __init__(self, folder: Path, team: Team = ALONE) -> None:
        self._folder = folder / "progress"
        self._team = team
        self._steps: list[Checkpoint] = []

    @property
    def earlier_s(self) -> float:
        """Time that the steps seen so far had taken before they were interrupted."""
        return sum(step.earlier_s for step in self._steps)

    def step(self, name: str, *, shared: bool = True) -> Checkpoint:
        """Return the checkpoint of a step that begins now, or goes on now.

        Args:
            shared: Whether all processes of the team do it, and not the first one alone.
        """
        self._steps.append(Checkpoint(self._folder, name, self._team if shared else ALONE))
        return self._steps[-1]

    def remove(self) -> None:
        """Remove all of them; the run is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Checkpoint:
    """How far one step has come, from the moment on that this was made.

    Attributes:
        result: What the step came to, where it is finished; in the first process only.
        earlier: How far this process had come with it, where it was interrupted.
        earlier_s: Time that it had taken then.
        finished: Whether it is finished; all processes of a team agree on it.
    """

    def __init__(self, folder: Path, name: str, team: Team) -> None:
        self._team = team
        self._whole = folder / f"{name}.pt"
        self._part = folder / f"{name}-{team.rank}of{team.size}.pt"
        self._started_s = self._saved_s = time.perf_counter()
        self._cost_s: float | None = None
        whole = _read(self._whole) if team.leads else None
        part = _read(self._part) if whole is None else None
        self.finished = bool(team.leaders(whole is not None))
        self.result: Mapping[str, Any] | None = whole and whole["state"]
        self.earlier: Mapping[str, Any] | None = None
        if part is not None and not self.finished:
            self.earlier = part["state"]
        self.earlier_s = float((whole or part or {"seconds": 0.0})["seconds"])

    def due(self, size: int) -> bool:
        """Return whether so much time has passed that a state of `size` bytes may be saved."""
        cost_s = self._cost_s
        if cost_s is None:
            cost_s = max(size / _ASSUMED_BYTES_A_SECOND, _ASSUMED_LEAST_S)
        return time.perf_counter() - self._saved_s >= INTERVAL * cost_s

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep how far this process has come: tensors, numbers, text and collections of them."""
        started_s = time.perf_counter()
        _write(self._part, state, self._taken_s())
        self._saved_s = time.perf_counter()
        self._cost_s = self._saved_s - started_s

    def finish(self, result: Mapping[str, Any]) -> None:
        """Keep what the step came to, by the first process, instead of how far it was."""
        if not self._team.leads:
            return
        _write(self._whole, result, self._taken_s())
        for part in self._whole.parent.glob(f"{self._whole.stem}-*of*.pt"):
            part.unlink(missing_ok=True)

    def _taken_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self._started_s


def load_whole(path: Path) -> dict[str, Any]:
    """Return the tensors and plain values that `torch.save` wrote, on the CPU.

    Raises:
        Exception: The file is not what was written; torch alone would not notice a flipped bit.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    document: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return document


def _write(path: Path, state: Mapping[str, Any], seconds: float) -> None:
    with replacing(path) as temporary:
        torch.save({"state": dict(state), "seconds": seconds}, temporary)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        document = load_whole(path)
        return {"state": document["state"], "seconds": document["seconds"]}
    except Exception as error:  # whatever torch raises for it, the file is not whole
        raise RunError(
            f"the checkpoint {path} is damaged; start the scan again without --resume"
        ) from error
