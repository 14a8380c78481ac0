"""Commands that a page starts: `repair layer` and `repair export`, each in a child process.

A job is the command that a person would type, on a run that the server was started on and with
choices that come from lists, never through a shell. It runs as the user whose server this is,
whoever opened the page; what it says on stderr is its progress. Cancelling interrupts it as Ctrl-C
would, so a repair can be resumed. Jobs end with the server.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from audit.errors import UsageError

__all__ = ["Job", "Kind", "cancel", "forget", "job_of", "start_job"]

Kind = Literal["repair", "export"]
State = Literal["running", "done", "failed", "cancelled"]
COMMANDS: dict[Kind, tuple[str, ...]] = {
    "repair": ("repair", "layer"),
    "export": ("repair", "export"),
}
KEPT_LINES = 200
PATIENCE_S = 15  # after an interrupt; then it is killed
_AMOUNT = re.compile(r"^(?P<what>.+?)(?::| \() ?(?P<done>\d+) of (?P<total>\d+)")


@dataclass
class Job:
    """One command under way, or ended.

    Attributes:
        run: The run that it works on.
        command: As it could be typed.
        lines: What it said on stderr last.
        result: The JSON document that it printed, None before it has ended well.
    """

    kind: Kind
    run: Path
    command: str
    process: subprocess.Popen[str]
    started_s: float
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    result: dict[str, Any] | None = None
    cancelled: bool = False
    ended_s: float | None = None

    @property
    def state(self) -> State:
        if self.ended_s is None:
            return "running"
        if self.process.returncode == 0:
            return "done"
        return "cancelled" if self.cancelled else "failed"

    @property
    def seconds(self) -> float:
        return (self.ended_s or time.monotonic()) - self.started_s

    @property
    def progress(self) -> tuple[str, float | None]:
        """What it does now, and how far that step is in [0, 1], None where it does not say."""
        for line in reversed(self.lines):
            found = _AMOUNT.match(line)
            if found:
                total = int(found["total"])
                return found["what"], min(1.0, int(found["done"]) / total) if total else None
        return (self.lines[-1] if self.lines else "starting"), None

    @property
    def failure(self) -> str:
        """Why it failed, in the command's own line."""
        errors = [line for line in self.lines if "error: " in line]
        said = errors or list(self.lines)
        return said[-1] if said else f"it ended with {self.process.returncode} and said nothing"


_jobs: dict[Path, Job] = {}
_lock = threading.Lock()


def start_job(kind: Kind, run: Path, arguments: Sequence[str], *, served: Sequence[Path]) -> Job:
    """Start a command on a run and return it under way.

    Args:
        arguments: Options of the command beside the run.
        served: The runs that the server was started on; no other is touched.

    Raises:
        UsageError: The run is not one of them, or a command works on it already.
    """
    run = run.resolve()
    if run not in {one.resolve() for one in served}:
        raise UsageError(f"{run.name} is not among the runs that the dashboard was started on")
    with _lock:
        under_way = _jobs.get(run)
        if under_way is not None and under_way.state == "running":
            raise UsageError(f"`{under_way.command}` works on this run already; wait or cancel it")
        words = [*COMMANDS[kind], "--run", str(run), *arguments]
        job = Job(
            kind=kind,
            run=run,
            command=shlex.join(words),
            process=_started(words),
            started_s=time.monotonic(),
        )
        _jobs[run] = job
    threading.Thread(target=_follow, args=(job,), daemon=True).start()
    return job


def job_of(run: Path) -> Job | None:
    """Return the last command that was started on a run, None where there was none."""
    return _jobs.get(run.resolve())


def forget(run: Path) -> None:
    """Leave out a command that has ended."""
    with _lock:
        job = _jobs.get(run.resolve())
        if job is not None and job.state != "running":
            del _jobs[run.resolve()]


def cancel(job: Job) -> None:
    """Interrupt a command; it is killed if it goes on for `PATIENCE_S`."""
    job.cancelled = True
    _signal(job, signal.SIGINT)

    def insist() -> None:
        try:
            job.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            _signal(job, signal.SIGKILL)

    threading.Thread(target=insist, daemon=True).start()


def _started(words: Sequence[str]) -> subprocess.Popen[str]:
    program, *arguments = words
    spec = find_spec(program)  # the package beside this one, installed or not
    source = Path(str(spec.origin)).parents[1] if spec and spec.origin else Path.cwd()
    paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", program, *arguments, "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # an interrupt reaches what it has started, too, and nothing else
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "LAYERMEND_PROGRESS": "lines",
            "PYTHONUNBUFFERED": "1",
        },
    )


def _follow(job: Job) -> None:
    """Read what a command says until it ends."""
    said: list[str] = []
    with job.process as process:  # closes the pipes at the end
        reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
        reader.start()
        for line in process.stderr or ():
            if line.strip():
                job.lines.append(line.rstrip())
        reader.join()
    with contextlib.suppress(json.JSONDecodeError):
        job.result = json.loads("".join(said))
    job.ended_s = time.monotonic()


def _signal(job: Job, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(job.process.pid, number)
        else:
            job.process.terminate()


@atexit.register
def _end_all() -> None:
    for job in _jobs.values():
        if job.process.poll() is None:
            _signal(job, signal.SIGTERM)
