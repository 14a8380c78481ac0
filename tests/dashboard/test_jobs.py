"""Commands that a page starts: really run, followed, cancelled, and on served runs alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from audit.errors import UsageError
from dashboard import jobs

CHILD = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
if "--name=slow" in sys.argv:
    print("training the repair, epochs: 3 of 12", file=sys.stderr, flush=True)
    time.sleep(60)
if "--name=bad" in sys.argv:
    sys.exit("error: no layer 'bad'; closest: good")
print(json.dumps({"arguments": sys.argv[1:]}))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stands for `repair`."""
    package = tmp_path / "standin"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(jobs.COMMANDS, "repair", ("standin", "layer"))
    monkeypatch.setattr(jobs, "_jobs", {})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "one run"
    path.mkdir(parents=True)
    return path


def _ended(job: jobs.Job) -> jobs.Job:
    for _ in range(400):
        if job.state != "running":
            return job
        time.sleep(0.05)
    raise AssertionError("the command goes on")


@pytest.mark.usefixtures("program")
def test_a_command_runs_without_a_shell_and_leaves_its_document(run: Path) -> None:
    name = "--name=x; touch hacked $(id)"
    job = _ended(jobs.start_job("repair", run, [name], served=[run]))
    assert job.state == "done"
    assert job.result == {"arguments": ["layer", "--run", str(run), name, "--json"]}
    assert jobs.job_of(run) is job
    jobs.forget(run)
    assert jobs.job_of(run) is None


@pytest.mark.usefixtures("program")
def test_a_failed_command_says_why_in_its_own_line(run: Path) -> None:
    job = _ended(jobs.start_job("repair", run, ["--name=bad"], served=[run]))
    assert (job.state, job.failure) == ("failed", "error: no layer 'bad'; closest: good")


@pytest.mark.usefixtures("program")
def test_a_command_is_followed_and_can_be_cancelled(run: Path) -> None:
    job = jobs.start_job("repair", run, ["--name=slow"], served=[run])
    for _ in range(400):
        if job.lines:
            break
        time.sleep(0.05)
    assert job.progress == ("training the repair, epochs", 0.25)
    with pytest.raises(UsageError, match="works on this run already"):
        jobs.start_job("repair", run, [], served=[run])
    started_s = time.monotonic()
    jobs.cancel(job)
    assert _ended(job).state == "cancelled"
    assert time.monotonic() - started_s < jobs.PATIENCE_S


def test_only_runs_that_are_served_are_worked_on(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not among the runs"):
        jobs.start_job("repair", tmp_path, [], served=[run])


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ("starting", None)),
        (["the loss is energy"], ("the loss is energy", None)),
        (["training, epochs (0 of 10) ..."], ("training, epochs", 0.0)),
        (["a: 5 of 5 in 0.1 s", "proving on held-out images: 30 of 60"],
         ("proving on held-out images", 0.5)),
    ],
)  # fmt: skip
def test_progress_is_read_from_what_commands_say(
    lines: list[str], expected: tuple[str, float | None]
) -> None:
    job = jobs.Job(kind="export", run=Path(), command="", process=None, started_s=0.0)  # type: ignore[arg-type]
    job.lines.extend(lines)
    assert job.progress == expected


def test_commands_say_how_far_they_are_when_asked_to(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import time\nfrom audit import console\nconsole._LINES_EVERY_S = 0.05\n"
        "with console.progress('steps', 4) as bar:\n"
        "    for _ in range(4): time.sleep(0.06); bar.advance()\n"
    )
    said = {
        asked: subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(Path(__file__).parents[2]), "LAYERMEND_PROGRESS": asked},
            capture_output=True, text=True, check=True, timeout=60,
        ).stderr.splitlines()
        for asked in ("", "lines")
    }  # fmt: skip
    assert len(said[""]) == 2
    assert said["lines"][1:-1] == [f"steps: {done} of 4" for done in (1, 2, 3, 4)]
