"""Run layermend's commands as a user does: as child processes, each with its time and memory."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import Any

_TELLING = """
import atexit, runpy, sys
from pathlib import Path
from audit.environment import peak_memory_mib
place = Path(sys.argv.pop(1))
atexit.register(lambda: place.write_text(str(peak_memory_mib())))
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Runs a command, and writes its own peak of memory: what the system tells of a child is at least
that of the process that started it."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that ended with exit code 0: what it printed and what it cost."""

    arguments: list[str]
    stdout: str
    seconds: float
    processor_seconds: float
    peak_memory_mib: float

    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.stdout)
        return document


def run_command(
    arguments: Sequence[str | Path], *, working_directory: Path | None = None
) -> Finished:
    """Run `audit ...` or `repair ...` in this Python's environment.

    Raises:
        RuntimeError: The command did not exit with 0; the message holds the end of its stderr.
    """
    given = [str(argument) for argument in arguments]
    started_s = time.perf_counter()
    with TemporaryFile("w+", encoding="utf-8") as errors, NamedTemporaryFile("r") as peak:
        command = [sys.executable, "-c", _TELLING, peak.name, *given]
        child = Popen(command, stdout=PIPE, stderr=errors, cwd=working_directory, text=True)
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)  # the child's own time, not that of all children
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started_s
        if child.returncode != 0:
            errors.seek(0)
            end = errors.read()[-2000:]
            raise RuntimeError(f"`{' '.join(given)}` exited with {child.returncode}:\n{end}")
        peak_memory_mib = float(peak.read())
    return Finished(
        arguments=given,
        stdout=printed,
        seconds=seconds,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        peak_memory_mib=peak_memory_mib,
    )
