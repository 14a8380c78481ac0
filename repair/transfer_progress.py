"""A transfer under way, kept beside the file that it is to write until that is written.

    NAME.progress/settings.json     what it was asked to do, of which network, on which images
    NAME.progress/state-LOSS.pt     how far the training by a loss has come (repair.training)
    NAME.progress/lock              held by the process that is at work on it

Files are written whole or not at all and hold tensors and plain values only, so that reading one
runs no code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit import console
from audit.errors import LayermendError, RunError, UsageError
from audit.files import read_json, write_json
from audit.locks import lock_file
from repair.config import RepairConfig

_ANOTHER_NAME = "or give another name with --out"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the numbers of a transfer.

    Attributes:
        config: Loss, penalty and training settings.
        filters: Of the new 1x1 convolution.
        command: The command line that it was started by.
        source: The network's name or file.
        model: SHA-256 of the network.
        data: Fingerprint of the images.
        classes: Names of the new classes.
    """

    config: RepairConfig
    filters: int
    command: tuple[str, ...]
    source: str
    model: str
    data: str
    classes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config.as_dict()}

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> Settings:
        return cls(
            config=RepairConfig.from_dict(recorded["config"]),
            filters=int(recorded["filters"]),
            command=tuple(map(str, recorded["command"])),
            source=str(recorded["source"]),
            model=str(recorded["model"]),
            data=str(recorded["data"]),
            classes=tuple(map(str, recorded["classes"])),
        )


class Progress:
    """The folder that holds how far a transfer has come.

    Args:
        out: The file that the transfer is to write.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_suffix(".progress")
        self._out = out
        self._settings = self.folder / "settings.json"

    @property
    def has_trained(self) -> bool:
        return self._settings.exists() and bool(self._states())

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Keep other processes off, and what was trained where the work is interrupted.

        Raises:
            RunError: Another process is at work on it already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Elsewhere no lock ends with its process; two at once are then up to the user.
        lock = lock_file(self.folder / "lock") if os.name == "posix" else -1
        if lock is None:
            raise RunError(
                f"another process is at work on {self.folder}; wait for it, {_ANOTHER_NAME}"
            )
        try:
            yield
        except BaseException as error:
            if not self.has_trained:
                self._remove()
            elif isinstance(error, KeyboardInterrupt):
                console.say("stopped; go on with `repair transfer --resume`")
            raise
        else:
            self._remove()
        finally:
            if lock >= 0:
                os.close(lock)

    def begin(self, settings: Settings) -> None:
        """Forget what was there, and keep what is to be done."""
        for state in self._states():
            state.unlink()
        write_json(self._settings, settings.as_dict())

    def settings(self) -> Settings:
        """Return what the interrupted transfer was asked to do.

        Raises:
            RunError: There is none, or its record is damaged.
        """
        if not self._settings.exists():
            raise RunError(f"no unfinished transfer to {self._out}; start one without --resume")
        try:
            return Settings.from_dict(read_json(self._settings))
        except (LayermendError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RunError(
                f"{self._settings} is damaged; remove {self.folder} and start again without "
                "--resume"
            ) from error

    def agreed(self, config: RepairConfig, filters: int, stated: frozenset[str]) -> Settings:
        """Return what the interrupted transfer was asked to do.

        Args:
            config: What this command asks for.
            filters: Likewise.
            stated: Settings of its command line, which have to be those of the interrupted one.

        Raises:
            RunError: There is none, or its record is damaged.
            UsageError: A stated setting is another one.
        """
        was = self.settings()
        other = was.config.disagreement(config, stated - {"filters"})
        if "filters" in stated and was.filters != filters:
            other = f"filters {was.filters}, not {filters}"
        if other:
            raise UsageError(
                f"{self.folder} was started with {other}; leave it out to resume, {_ANOTHER_NAME}"
            )
        return was

    def check_same(self, now: Settings) -> None:
        """Raise UsageError where the interrupted transfer had another network or other images."""
        was = self.settings()
        if was.model != now.model:
            raise UsageError(
                f"{self.folder} was started with another model, {was.source}; "
                f"resume with that one, {_ANOTHER_NAME}"
            )
        if (was.data, was.classes) != (now.data, now.classes):
            raise UsageError(
                f"{self.folder} was started on other images; resume with those, {_ANOTHER_NAME}"
            )

    def state_path(self, loss: str) -> Path:
        return self.folder / f"state-{loss}.pt"

    def _remove(self) -> None:
        """Remove all of it, and what a killed process was writing of its results."""
        results = {self._out.with_suffix(suffix).name for suffix in (".pt2", ".toml", ".json")}
        for left in self._out.parent.glob(".partial-*"):
            if left.name.split("-", 2)[-1] in results:
                left.unlink(missing_ok=True)
        for state in self._states():
            state.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _states(self) -> list[Path]:
        return list(self.folder.glob("state-*.pt"))
