"""The temperature of the loss: that it is the best one, and that it only divides logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import repair.layer
from audit.errors import UsageError
from audit.files import sha256_file
from audit.images import ImageFolder
from audit.networks import Network
from audit.report import material_sentences
from audit.runs import Run
from repair.cache import CrossingBatch
from repair.cli import app
from repair.config import RepairConfig
from repair.layer import RepairRequest, repair_layer
from repair.summary import repair_summary
from repair.teaching import own_answers
from repair.temperature import LARGEST, fit_temperature
from repair.training import loss_terms, predict, train_layer

from .conftest import DAMAGED, Crossed
from .test_rates import console_text

MakeRun = Callable[..., Run]
CONFIG = RepairConfig(epochs=2, learning_rate=0.02, loss="ce", controls=("logits",))


@dataclass
class Said:
    """Stands in for a network and for images: what it says of them crosses the cut."""

    logits: Tensor
    labels: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"weight": self.logits}

    def suffix(self, crossing: Sequence[Tensor], parameters: Any = None) -> Tensor:
        return crossing[0]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> CrossingBatch:
        return CrossingBatch(
            crossing=(self.logits[rows],), labels=self.labels[rows], positions=rows
        )


def fitted(logits: Tensor, labels: Tensor) -> float:
    said = Said(logits, labels)
    # Of a network and of images it needs no more than these have.
    return fit_temperature(said, said)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [1.0, 1.7, 6.0])
def test_a_network_that_is_as_sure_as_right_times_a_factor_has_that_temperature(
    factor: float,
) -> None:
    # Right in 8 of 10 where it says .8, and in 6 of 10 where it says .6: calibrated.
    sure = torch.tensor([[0.8, 0.2]] * 10 + [[0.6, 0.4]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 8 + [1] * 2 + [0] * 6 + [1] * 4)
    assert fitted(factor * sure.log() + 3, labels) == pytest.approx(factor, rel=1e-3)


def test_it_is_that_of_scikit_learn() -> None:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
        classes_ = np.arange(5)

        def fit(self, logits: np.ndarray, labels: np.ndarray) -> Given:
            return self

        def __sklearn_is_fitted__(self) -> bool:
            return True

        def decision_function(self, logits: np.ndarray) -> np.ndarray:
            return logits

        def predict(self, logits: np.ndarray) -> np.ndarray:
            return logits.argmax(axis=1)

    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(700, 5, generator=generator)  # more than one batch
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    peer = CalibratedClassifierCV(FrozenEstimator(Given()), method="temperature")
    peer.fit(logits.numpy(), labels.numpy())
    logits_of_peer = np.log(peer.predict_proba(logits.numpy()[:50].astype(np.float64)))
    ours = (logits[:50].double() / fitted(logits, labels)).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(logits_of_peer, ours, rtol=2e-3, atol=2e-3)


def test_a_network_that_is_not_too_sure_is_left_as_it_is() -> None:
    sure = torch.tensor([[0.6, 0.4]] * 10, dtype=torch.float64)
    right = torch.tensor([0] * 8 + [1] * 2)
    assert fitted(sure.log(), right) == pytest.approx(1, abs=1e-3)
    assert fitted(torch.tensor([[9.0, 0.0]]), torch.tensor([0])) == pytest.approx(1, abs=1e-3)
    wrong = torch.tensor([[9.0, 0.0]])  # no temperature is high enough
    assert fitted(wrong, torch.tensor([1])) == pytest.approx(LARGEST, rel=1e-3)
    assert fitted(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)) == 1
    assert fitted(torch.tensor([[torch.inf, 0.0]]), torch.tensor([1])) == 1


@pytest.mark.parametrize("loss", ["trust", "ce"])
def test_a_loss_by_a_temperature_is_that_of_a_network_with_divided_logits(
    network: Network, crossed: Crossed, loss: str
) -> None:
    last = {
        name: value / 2.5
        for name, value in network.program.state.items()
        if name.startswith("predictions.")
    }
    assert len(last) == 2
    cooler = network.with_state(last)
    given = [crossed(split) for split in ("train", "val")]
    config = replace(CONFIG, loss=loss, temperature=2.5)
    one = train_layer(network.program.split(DAMAGED), *given, config, loss=loss)
    cool = cooler.program.split(DAMAGED)
    two = train_layer(cool, *given, replace(config, temperature=1.0), loss=loss)
    for row, other in zip(one.history, two.history, strict=True):
        assert row["val_ce"] == pytest.approx(other["val_ce"], rel=1e-4)
    for name, value in one.parameters.items():
        torch.testing.assert_close(value, two.parameters[name], rtol=1e-4, atol=1e-5)
    said, _ = predict(network.program.split(DAMAGED), given[1], divisor=2.5)
    plain, _ = predict(cool, given[1])
    np.testing.assert_allclose(said.p_true, plain.p_true, rtol=1e-5)
    batch = given[0].batch(torch.arange(4))
    split = network.program.split(DAMAGED)
    terms = loss_terms(split, batch, split.parameters, config, "ce")
    nats = torch.nn.functional.cross_entropy(
        split.suffix(batch.crossing) / 2.5, batch.labels, reduction="none"
    )
    torch.testing.assert_close(terms.loss, nats)


def test_a_repair_fits_it_and_has_a_control_without(make_run: MakeRun) -> None:
    auto = replace(CONFIG, temperature="auto")
    repaired = repair_layer(make_run(), auto, RepairRequest())
    found = repaired.info["temperature"]
    assert 1 < found < LARGEST and repaired.info["config"]["temperature"] == "auto"
    stated = repair_layer(make_run(), replace(CONFIG, temperature=found), RepairRequest())
    assert sha256_file(stated.weights) == sha256_file(repaired.weights)
    plain = repair_layer(make_run(), CONFIG, RepairRequest())
    assert plain.info["temperature"] == 1 and plain.info["controls"] == []
    assert sha256_file(plain.weights) != sha256_file(repaired.weights)
    (control,) = repaired.info["controls"]
    assert control["name"] == "logits"
    assert control["after"] == plain.info["after"]
    rows = repaired.history
    as_they_are = rows[rows["role"] == "logits"]["val_ce"].tolist()
    assert as_they_are == plain.history["val_ce"].tolist()
    told = console_text(repair_summary(repaired))
    assert f"Logits were divided by {found:.3g} in the loss." in told
    assert "Logits were" not in console_text(repair_summary(plain))
    assert [s for s in material_sentences(repaired.info) if f"divided logits by {found:.3g}" in s]
    assert not [s for s in material_sentences(plain.info) if "logits" in s]


class Killed(BaseException):
    """What a killed process looks like from inside."""


def test_a_resumed_repair_has_the_temperature_it_had(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = replace(CONFIG, temperature="auto", controls=())
    whole = repair_layer(make_run(), auto, RepairRequest())
    run = make_run()

    def killed(*given: Any, **more: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(repair.layer, "train_layer", killed)
        with pytest.raises(Killed):
            repair_layer(run, auto, RepairRequest())
    resumed = repair_layer(run, CONFIG, RepairRequest(resume=True))
    assert resumed.info["temperature"] == whole.info["temperature"]
    assert sha256_file(resumed.weights) == sha256_file(whole.weights)
    request = RepairRequest(resume=True, stated=frozenset({"temperature"}))
    resumed.write_info(status="failed")
    with pytest.raises(UsageError, match="started with temperature auto, not 2"):
        repair_layer(run, replace(auto, temperature=2.0), request)


@pytest.mark.parametrize("given", ["0", "-1", "inf", "warm"])
def test_a_temperature_that_is_none_is_refused(given: str) -> None:
    result = CliRunner().invoke(app, ["layer", "--temperature", given])
    assert isinstance(result.exception, UsageError)
    assert "--temperature is" in str(result.exception)


def test_own_answers_are_asked_at_the_temperature(network: Network, folder: ImageFolder) -> None:
    train = folder.positions("train")
    # Guidance that hides nothing: all images are asked about as they are.
    guidance = SimpleNamespace(artefact=None, masks=SimpleNamespace(among=lambda _: []))
    answers = [
        own_answers(network, folder, train, guidance, divisor=divisor)  # type: ignore[arg-type]
        for divisor in (1.0, 3.0)
    ]
    rows = torch.tensor(train)
    cooler = (answers[0][rows].double().log() / 3).softmax(dim=1).float()
    torch.testing.assert_close(answers[1][rows], cooler, rtol=1e-4, atol=1e-6)
