"""The grid search: the paper's points, judged by validation alone, resumed and shared."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from PIL import Image

from audit.errors import RunError, UsageError
from audit.images import ImageFolder
from audit.networks import Network
from audit.runs import Run
from repair.cache import cross_tensors
from repair.config import RepairConfig
from repair.grid import _Bench, search
from repair.grid_report import grid_summary, write_plots
from repair.grid_request import GridRequest
from repair.training import predict, train_layer

from .conftest import DAMAGED

MakeRun = Callable[..., Run]
CONFIG = RepairConfig(epochs=1, controls=())
SMALL = GridRequest(rates=(0.01, 0.1), balances=(0.9, 0.5))


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_the_papers_grid_is_the_default() -> None:
    points = {(point["lr"], point["lambda"]) for point in GridRequest().points}
    assert points == {(lr, b) for lr in (0.01, 0.1, 0.3) for b in (0.9, 0.7, 0.5)}


def test_every_point_is_what_a_plain_loop_gives(
    make_run: MakeRun, network: Network, folder: ImageFolder
) -> None:
    grid = search(make_run(), CONFIG, SMALL)
    split = network.program.split(DAMAGED)
    crossing = {
        name: cross_tensors(
            network,
            split,
            folder,
            folder.positions(name),
            budget_bytes=2**30,  # type: ignore[arg-type]
        )
        for name in ("train", "val", "test")
    }
    expected = []
    for lr in SMALL.rates:
        for balance in SMALL.balances:
            config = replace(CONFIG, learning_rate=lr, balance=balance)
            trained = train_layer(split, crossing["train"], crossing["val"], config, loss="trust")
            said, _ = predict(split, crossing["val"], trained.parameters)
            tested, _ = predict(split, crossing["test"], trained.parameters)
            expected.append(
                (said.right.mean(), -said.cross_entropies.mean(), lr, balance, tested.right.mean())
            )
    rows = {(row["lr"], row["lambda"]): row for row in grid.record["trials"]}
    for accuracy, less_ce, lr, balance, _ in expected:
        assert rows[lr, balance]["val_accuracy"] == pytest.approx(accuracy)
        assert rows[lr, balance]["val_ce"] == pytest.approx(-less_ce, rel=1e-6)
    _, _, lr, balance, tested_accuracy = max(expected)
    assert (grid.record["best"]["lr"], grid.record["best"]["lambda"]) == (lr, balance)
    assert grid.record["test"]["best"]["accuracy"]["value"] == pytest.approx(tested_accuracy)
    assert [row["lr"] for row in grid.record["plain"]] == list(SMALL.rates)
    table = pd.read_parquet(grid.folder / "trials.parquet")
    assert list(zip(table["lr"], table["lambda"], strict=True)) == list(rows)


def test_a_stopped_search_does_only_the_rest(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(make_run(), CONFIG, SMALL)
    run = make_run()
    trained: list[tuple[float, float, str]] = []
    original = _Bench.train

    def train(bench: _Bench, config: RepairConfig, loss: str) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((config.learning_rate, config.balance, loss))
        return original(bench, config, loss)

    with monkeypatch.context() as patch:
        patch.setattr(_Bench, "train", train)
        with pytest.raises(KeyboardInterrupt):
            search(run, CONFIG, SMALL)
    again: list[tuple[float, float, str]] = []

    def counted(bench: _Bench, config: RepairConfig, loss: str) -> Any:
        again.append((config.learning_rate, config.balance, loss))
        return original(bench, config, loss)

    with monkeypatch.context() as patch:
        patch.setattr(_Bench, "train", counted)
        resumed = search(run, CONFIG, SMALL)
        assert set(again[:2]).isdisjoint(trained)
        assert len([one for one in again[: 2 + 2] if one[2] == "trust"]) == 2
        again.clear()
        finished = search(run, CONFIG, SMALL)
        assert len(again) == 2  # the two that are judged on the test split
    assert bare(resumed.record["trials"]) == bare(whole.record["trials"])
    assert bare(finished.record["trials"]) == bare(whole.record["trials"])
    assert resumed.record["test"] == whole.record["test"]


def test_two_workers_share_the_points_and_find_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    alone = search(make_run(), CONFIG, SMALL)
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    together = search(make_run(), CONFIG, replace(SMALL, workers=2, storage=storage, study="both"))
    assert bare(together.record["trials"]) == bare(alone.record["trials"])
    study = optuna.load_study(study_name="both", storage=storage)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == 4


def test_a_study_of_other_settings_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    named = replace(SMALL, rates=(0.01,), balances=(0.9,), study="mine")
    search(run, CONFIG, named)
    with pytest.raises(UsageError, match="was made with another epochs; .* --study"):
        search(run, replace(CONFIG, epochs=2), named)


def test_a_diverging_point_is_shown_and_does_not_win(make_run: MakeRun) -> None:
    grid = search(
        make_run(), replace(CONFIG, epochs=2), replace(SMALL, rates=(0.02, 1e6), balances=(0.9,))
    )
    wild = next(row for row in grid.record["trials"] if row["lr"] == 1e6)
    assert wild["stopped"].startswith("diverged") and wild["best_epoch"] == 0
    assert grid.record["best"]["lr"] == 0.02


def test_drawn_points_lie_between_the_ends(make_run: MakeRun) -> None:
    request = replace(SMALL, sampler="random", trials=5)
    grid = search(make_run(), CONFIG, request)
    rows = grid.record["trials"]
    assert len(rows) == 5
    assert all(0.01 <= row["lr"] <= 0.1 and 0.5 <= row["lambda"] <= 0.9 for row in rows)


def test_plots_and_summary_show_the_best_point(make_run: MakeRun) -> None:
    from rich.console import Console

    grid = search(make_run(), CONFIG, SMALL)
    for path in write_plots(grid):
        with Image.open(path) as picture:
            assert picture.width > 400
    console = Console(width=120, file=io.StringIO())
    console.print(grid_summary(grid))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    best = grid.record["best"]
    assert f"learning rate {best['lr']:g}, lambda {best['lambda']:g}" in text
    assert f"{100 * best['val_accuracy']:.1f} %" in text and "plain cross entropy" in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rates": ()}, "--lr is empty"),
        ({"rates": (0.0, 0.1)}, "--lr is 0,0.1; expected numbers above 0"),
        ({"balances": (1.5,)}, "--lambda is 1.5; expected numbers from 0 to 1"),
        ({"balances": (0.5, 0.5)}, "names a value twice"),
        ({"workers": 0}, "--workers is 0"),
        ({"sampler": "cma"}, "--sampler is 'cma'"),
    ],
)
def test_wrong_requests_name_the_option(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GridRequest(**setting)


def test_the_command_refuses_what_is_no_list_and_a_healthy_run(
    make_run: MakeRun,
) -> None:
    from repair.grid_cli import _numbers

    assert _numbers("--lr", ".01, .1") == (0.01, 0.1)
    with pytest.raises(UsageError, match="expected numbers between commas"):
        _numbers("--lr", "fast")
    with pytest.raises(RunError, match="--name LAYER"):
        search(make_run("none"), CONFIG, SMALL)
