"""A learning rate chosen for the layer: what it is chosen by, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

import repair.layer
from audit.errors import UsageError
from audit.files import sha256_file
from audit.report import material_sentences
from audit.runs import RepairFolder, Run
from repair.config import RepairConfig
from repair.layer import RepairRequest, repair_layer
from repair.options import parse_rate
from repair.rates import RATES, TRIED_EPOCHS, best_rate, try_rates
from repair.summary import repair_summary

from .conftest import write_run

MakeRun = Callable[..., Run]
CONFIG = RepairConfig(epochs=3, learning_rate="auto", controls=("ce",), seeds=2)


@pytest.fixture(scope="module")
def chosen(make_module_run: MakeRun) -> RepairFolder:
    return repair_layer(make_module_run(), CONFIG, RepairRequest())


@pytest.fixture(scope="module")
def make_module_run(
    tmp_path_factory: pytest.TempPathFactory,
    photos: Any,
    model_file: Any,
    network: Any,
    folder: Any,
) -> MakeRun:
    return lambda: write_run(tmp_path_factory.mktemp("runs"), photos, model_file, network, folder)


def test_what_each_rate_comes_to_is_what_a_repair_by_it_comes_to(
    chosen: RepairFolder, make_module_run: MakeRun
) -> None:
    told = chosen.info["rates"]["repair"]["val_ce"]
    rates = RATES["sgd"]
    assert list(told) == [f"{rate:g}" for rate in rates]
    for rate in (rates[0], rates[2], rates[-1]):
        config = replace(CONFIG, learning_rate=rate, epochs=TRIED_EPOCHS, controls=("ce",), seeds=1)
        by_rate = repair_layer(make_module_run(), config, RepairRequest())
        for role in ("repair", "ce"):
            rows = by_rate.history[by_rate.history["role"] == role]
            lowest = chosen.info["rates"][role]["val_ce"][f"{rate:g}"]
            assert rows["val_ce"].min() == pytest.approx(lowest, rel=1e-6)


def test_repair_and_controls_are_those_of_the_rates_that_did_best(
    chosen: RepairFolder, make_module_run: MakeRun
) -> None:
    rates = chosen.info["rates"]
    assert set(rates) == {"repair", "ce"}  # further seeds go by the first one's
    for one in rates.values():
        assert one["val_ce"][f"{one['chosen']:g}"] == min(one["val_ce"].values())
    history = chosen.history
    for role in ("repair", "ce"):
        used = history[(history["role"] == role) & (history["epoch"] > 0)]["learning_rate"]
        assert set(used) == {rates[role]["chosen"]}
    assert len(history[history["role"] == "repair"]) == CONFIG.epochs + 1
    stated = replace(CONFIG, learning_rate=rates["repair"]["chosen"], controls=(), seeds=1)
    by_hand = repair_layer(make_module_run(), stated, RepairRequest())
    assert sha256_file(chosen.weights) == sha256_file(by_hand.weights)
    assert "rates" not in by_hand.info
    assert chosen.info["config"]["lr"] == "auto"
    assert {f"learning rates of {plan}" for plan in rates} <= set(chosen.info["timings_s"])
    told = console_text(repair_summary(chosen))
    assert f"Learning rate {rates['repair']['chosen']:g}, the best of 6 that were tried." in told
    assert "Learning rate" not in console_text(repair_summary(by_hand))
    rate = f"The learning rate was {rates['repair']['chosen']:g}, of 6 tried"
    assert [s for s in material_sentences(chosen.info) if s.startswith(rate)]
    assert not [s for s in material_sentences(by_hand.info) if "learning rate" in s]


def console_text(told: RenderableType) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(told)
    return console.export_text()


class Killed(BaseException):
    """What a killed process looks like from inside."""


def test_a_resumed_repair_keeps_the_rates_it_had(
    chosen: RepairFolder, make_module_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_module_run()
    train = repair.layer.train_layer

    def killing(*given: Any, **more: Any) -> Any:
        if "state_path" in more and more["loss"] == "trust":
            raise Killed
        return train(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(repair.layer, "train_layer", killing)
        with pytest.raises(Killed):
            repair_layer(run, CONFIG, RepairRequest())
    tries: list[str] = []
    once = repair.layer.try_rates

    def counted(*given: Any, **more: Any) -> Any:
        tries.append("tried")
        return once(*given, **more)

    monkeypatch.setattr(repair.layer, "try_rates", counted)
    resumed = repair_layer(run, RepairConfig(), RepairRequest(resume=True))
    assert tries == ["tried"]  # the control's alone
    assert resumed.info["rates"] == chosen.info["rates"]
    assert sha256_file(resumed.weights) == sha256_file(chosen.weights)


@pytest.mark.parametrize("epochs", [1, 10])
def test_rates_are_the_optimizers_and_no_longer_tried_than_trained_by(epochs: int) -> None:
    asked: list[RepairConfig] = []

    def train(config: RepairConfig) -> Any:
        asked.append(config)
        return SimpleNamespace(history=[{"val_ce": 0.7}, {"val_ce": 0.5}, {"val_ce": 0.6}, {}])

    config = RepairConfig(optimizer="adamw", schedule="cosine", epochs=epochs, learning_rate="auto")
    assert set(try_rates(train, config).values()) == {0.5}
    assert [one.rate for one in asked] == pytest.approx([rate / 10 for rate in RATES["sgd"]])
    assert {one.epochs for one in asked} == {min(epochs, TRIED_EPOCHS)}
    assert {(one.optimizer, one.schedule) for one in asked} == {("adamw", "constant")}


def test_of_rates_that_do_nothing_the_lowest_is_taken() -> None:
    assert best_rate({0.3: 0.7, 0.001: 0.7, 0.01: 0.7}) == 0.001
    assert best_rate({0.3: 0.6, 0.001: 0.7}) == 0.3


def test_a_rate_is_a_number_or_auto() -> None:
    assert parse_rate("0.02") == 0.02 and parse_rate("auto") == "auto"
    with pytest.raises(UsageError, match="--lr is 'fast'; expected a number above 0, or auto"):
        parse_rate("fast")
    with pytest.raises(UsageError, match="--lr is -1; expected a number above 0, or auto"):
        RepairConfig(learning_rate=-1)
    assert RepairConfig.from_dict(CONFIG.as_dict()) == CONFIG
    with pytest.raises(ValueError, match="auto"):
        CONFIG.rate  # noqa: B018 - made for its error
