"""Two processes give the weights of one, share its files, and end together when one fails.

Gradients are summed in another order, so weights agree to a few units in the last place of single
precision: within 1e-5 of each other here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from audit.errors import UsageError
from audit.parallel import ALONE, join_team
from audit.runs import Run, open_repair

MakeRun = Callable[..., Run]
SETTINGS = ("--epochs", "2", "--batch-size", "7", "--lr", "0.02", "--device", "cpu")


def repair(run: Run, *arguments: str, launcher: tuple[str, ...] = ()) -> Any:
    command = [*(launcher or (sys.executable,)), "-m", "repair", "layer"]
    command += ["--run-folder", str(run.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *SETTINGS, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


def outcome(finished: Any) -> dict[str, Any]:
    assert finished.returncode == 0, finished.stderr
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def test_two_processes_give_the_weights_of_one(make_run: MakeRun) -> None:
    run = make_run()
    given = ("--controls", "ce,next-layer", "--json")
    one = outcome(repair(run, *given))
    finished = repair(run, *given, "--devices", "2")
    two = outcome(finished)
    first, second = (open_repair(path) for path in sorted((run.path / "repairs").iterdir()))
    weights = load_file(first.weights)
    for name, value in load_file(second.weights).items():
        assert_close(value, weights[name], rtol=1e-5, atol=1e-5)
    assert two["frozen"] == one["frozen"]
    assert two["splits"] == one["splits"]
    assert two["decision"] == one["decision"]
    assert two["after"]["accuracy"] == one["after"]["accuracy"]
    assert [c["name"] for c in two["controls"]] == [c["name"] for c in one["controls"]]
    # One of the two talks, one of the two writes.
    assert finished.stderr.count("training the repair") <= 2
    assert len(list((run.path / "repairs").iterdir())) == 2
    assert not list(second.path.glob("cache*")) and not list(second.path.glob("state-*"))


def test_torchrun_starts_them_too(make_run: MakeRun) -> None:
    run = make_run()
    given = ("--no-controls", "--json", "--lr", "auto", "--temperature", "auto")
    one = outcome(repair(run, *given))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    two = outcome(repair(run, *given, launcher=launcher))
    assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-3)
    assert one["temperature"] > 1
    own, shared = (found["rates"]["repair"] for found in (one, two))
    assert shared["chosen"] == own["chosen"]
    assert shared["val_ce"] == pytest.approx(own["val_ce"], rel=1e-4)
    first, second = (open_repair(path) for path in sorted((run.path / "repairs").iterdir()))
    weights = load_file(first.weights)
    for name, value in load_file(second.weights).items():
        assert_close(value, weights[name], rtol=1e-5, atol=1e-5)


def test_an_error_ends_both_with_one_line(make_run: MakeRun) -> None:
    finished = repair(make_run("none"), "--devices", "2")
    assert finished.returncode == 1
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--name LAYER" in lines[0]


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_team(1, "auto") is ALONE
    assert ALONE.alone and ALONE.leads and ALONE.part(range(5)) == (0, 1, 2, 3, 4)


def test_what_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--devices is 0"):
        join_team(0, "cpu")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="torchrun started 4 processes"):
        join_team(2, "cpu")


def test_rows_are_dealt_out_in_turn() -> None:
    import torch

    from audit.parallel import Team

    teams = [Team() for _ in range(3)]
    for rank, team in enumerate(teams):
        team.rank, team.size = rank, 3
    items = list("abcdefgh")
    rows = torch.tensor([7, 0, 3, 4, 2])
    seen = [team.part(items)[i] for team in teams for i in team.own(rows).tolist()]
    assert sorted(seen) == sorted(items[row] for row in rows.tolist())
