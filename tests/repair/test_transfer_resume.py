"""A transfer killed by SIGKILL and gone on with: the same weights and numbers, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.networks import open_network
from repair.training import train_layer
from tests.conftest import PROJECT

from .test_transfer import run_repair

SHORT = ["--epochs", "3", "--filters", "8", "--lr", "0.05", "--batch-size", "16", "--seed", "4"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}

# Dies by its own hand after an epoch of a training, or at a call that comes later.
DYING = """
import os, signal, sys
import repair.transfer, repair.transfer_progress
from repair.cli import main

what, epoch, *arguments = sys.argv[1:]
train = repair.transfer.train_layer

def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)

def train_and_die(*given, loss, on_epoch, **more):
    def after(row):
        on_epoch(row)
        if (loss, str(row["epoch"])) == (what, epoch):
            die()
    return train(*given, loss=loss, on_epoch=after, **more)

repair.transfer.train_layer = train_and_die
if what == "program":
    repair.transfer.write_bytes = die
if what == "tidying":
    repair.transfer_progress.Progress._remove = die
sys.argv = ["repair", *arguments]
main()
"""


def arguments(model: Path, photos: Path, out: Path) -> list[str]:
    return ["transfer", str(model), "--data", str(photos), "--out", str(out)]


def kill(moment: tuple[str, int], model: Path, photos: Path, out: Path) -> None:
    """Start a transfer in a process of its own that SIGKILL ends at a moment."""
    ended = subprocess.run(
        [sys.executable, "-c", DYING, *map(str, moment), *arguments(model, photos, out), *SHORT],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def numbers(out: Path) -> dict[str, Any]:
    """Return the record without what may differ: times, and what the file is called."""
    record: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    for row in record["history"]:
        row.pop("seconds", None)
    return {key: value for key, value in record.items() if key not in ("command", "out")}


@pytest.fixture(scope="module")
def undisturbed(model_file: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "shapes.pt2"
    assert run_repair([*arguments(model_file, photos, out), *SHORT]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "shapes.json",
        "shapes.pt2",
        "shapes.toml",
    ]
    return out


@pytest.fixture(scope="module")
def half(model_file: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a transfer leaves that was killed after the second epoch of its head."""
    out = tmp_path_factory.mktemp("half") / "shapes.pt2"
    kill(("trust", 2), model_file, photos, out)
    return out


@pytest.fixture
def killed(half: Path, tmp_path: Path) -> Path:
    """The same, to go on with."""
    shutil.copytree(half.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / half.name


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        (("trust", 1), [("trust", 2), ("trust", 3), ("ce", 1), ("ce", 2), ("ce", 3)]),
        (("ce", 2), [("ce", 3)]),
        (("program", 0), []),
        (("tidying", 0), []),
    ],
)
def test_a_killed_transfer_resumes_to_the_same_weights_and_numbers(
    moment: tuple[str, int],
    left: list[tuple[str, int]],
    undisturbed: Path,
    model_file: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "shapes.pt2"
    kill(moment, model_file, photos, out)
    assert (tmp_path / "shapes.progress").is_dir()
    assert out.exists() == (moment[0] == "tidying")
    trained = []

    def told(*given: Any, loss: str, on_epoch: Any, **more: Any) -> Any:
        def after(row: dict[str, Any]) -> None:
            trained.append((loss, row["epoch"]))
            on_epoch(row)

        return train_layer(*given, loss=loss, on_epoch=after, **more)

    monkeypatch.setattr("repair.transfer.train_layer", told)
    # The settings come from what was kept, not from the second command line.
    assert run_repair([*arguments(model_file, photos, out), "--resume"]) == 0
    assert trained == left
    assert numbers(out) == numbers(undisturbed)
    resumed, expected = (open_network(str(one)).program.state for one in (out, undisturbed))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    names = [path.name for path in undisturbed.parent.iterdir()]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def error_of(code: int, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return exit code and the one line of an error."""
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    return code, errors[0]


def test_what_was_trained_is_not_trained_over(
    killed: Path, model_file: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (killed.parent / "shapes.progress" / "state-trust.pt").read_bytes()
    code, line = error_of(run_repair([*arguments(model_file, photos, killed), *SHORT]), capfd)
    assert code == 2 and "shapes.progress holds an unfinished transfer; go on with it by" in line
    assert (killed.parent / "shapes.progress" / "state-trust.pt").read_bytes() == before


def test_nothing_to_resume_is_one_line(
    model_file: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = arguments(model_file, photos, tmp_path / "shapes.pt2")
    code, line = error_of(run_repair([*given, "--resume"]), capfd)
    assert code == 1 and "no unfinished transfer to" in line and "without --resume" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (["--epochs", "4"], "was started with epochs 3, not 4; leave it out to resume"),
        (["--filters", "9"], "was started with filters 8, not 9; leave it out to resume"),
        (["--no-controls"], "was started with controls ce, not none; leave it out to resume"),
        (["--lambda", "0.5"], "was started with balance 0.9, not 0.5; leave it out to resume"),
    ],
)
def test_other_settings_are_refused_in_one_line(
    stated: list[str],
    message: str,
    killed: Path,
    model_file: Path,
    photos: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [*arguments(model_file, photos, killed), "--resume", *stated]
    code, line = error_of(run_repair(given), capfd)
    assert code == 2 and message in line
    assert (killed.parent / "shapes.progress" / "state-trust.pt").is_file()


def test_another_model_and_other_images_are_refused_in_one_line(
    killed: Path,
    model_file: Path,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.safetensors"
    # One of the weights is another one now.
    other.write_bytes(model_file.read_bytes()[:-1] + b"\x00")
    shutil.copy(model_file.with_suffix(".toml"), other.with_suffix(".toml"))
    code, line = error_of(run_repair([*arguments(other, photos, killed), "--resume"]), capfd)
    assert code == 2 and f"was started with another model, {model_file}" in line
    fewer = tmp_path / "fewer"
    shutil.copytree(photos, fewer)
    next((fewer / "disk").iterdir()).unlink()
    code, line = error_of(run_repair([*arguments(model_file, fewer, killed), "--resume"]), capfd)
    assert code == 2 and "was started on other images" in line


def test_damaged_progress_is_one_line(
    killed: Path, model_file: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    resume = [*arguments(model_file, photos, killed), "--resume"]
    state = killed.parent / "shapes.progress" / "state-trust.pt"
    whole = state.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[: len(whole) // 2], bytes(flipped)):
        state.write_bytes(damaged)
        code, line = error_of(run_repair(resume), capfd)
        assert code == 1 and f"{state} is damaged; remove it and go on with --resume" in line

    settings = killed.parent / "shapes.progress" / "settings.json"
    recorded = json.loads(settings.read_text())
    wrong = {**recorded, "config": {**recorded["config"], "epochs": "three"}}
    for text in ("", "{", "{}", json.dumps(wrong)):
        settings.write_text(text)
        code, line = error_of(run_repair(resume), capfd)
        assert code == 1 and f"{settings} is damaged; remove" in line


def test_a_damaged_checkpoint_can_be_removed_and_its_training_starts_again(
    killed: Path, undisturbed: Path, model_file: Path, photos: Path
) -> None:
    (killed.parent / "shapes.progress" / "state-trust.pt").unlink()
    assert run_repair([*arguments(model_file, photos, killed), "--resume"]) == 0
    assert numbers(killed) == numbers(undisturbed)


def test_no_code_of_a_checkpoint_runs(
    killed: Path, model_file: Path, photos: Path, tmp_path: Path
) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"epoch": Payload()}, killed.parent / "shapes.progress" / "state-trust.pt")
    assert run_repair([*arguments(model_file, photos, killed), "--resume"]) == 1
    assert not (tmp_path / "ran").exists()


def test_two_at_once_do_not_mix(
    killed: Path, model_file: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    holding = "import sys, time; from pathlib import Path; from audit.locks import lock_file\n"
    holding += "print(lock_file(Path(sys.argv[1]))); sys.stdout.flush(); time.sleep(200)"
    lock = killed.parent / "shapes.progress" / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(lock)], env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        resumed = run_repair([*arguments(model_file, photos, killed), "--resume"])
        other.kill()
    code, line = error_of(resumed, capfd)
    assert code == 1 and "another process is at work on" in line
