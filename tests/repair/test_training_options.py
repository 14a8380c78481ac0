"""How a training can go: schedules, early stopping, class weights, norms, all layers, precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import repair.training
from audit.errors import UsageError
from audit.networks.program import Program, Split
from repair.cache import CrossingBatch
from repair.config import SCHEDULES, RepairConfig
from repair.image_masks import ImageMasks
from repair.training import Trained, train_layer

IMAGES, SIDE = 48, 8
CONFIG = RepairConfig(loss="ce", epochs=3, batch_size=16, learning_rate=0.05)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.first(images)).relu()
        return self.head(self.norm2(self.second(features)).relu().mean((2, 3)))


class InMemory:
    """Images that cross a cut, all at once."""

    kind = "memory"
    bytes = 0
    tensors = 1
    seconds = 0.0

    def __init__(self, split: Split, images: Tensor, labels: Tensor) -> None:
        self.crossing, self.images, self.labels = split.prefix(images), images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> CrossingBatch:
        crossing = tuple(tensor[rows] for tensor in self.crossing)
        return CrossingBatch(
            crossing=crossing, labels=self.labels[rows], positions=rows, images=self.images[rows]
        )


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(3)  # of the first four, the one whose maps are lit and stay so
    module = Tiny().double()
    for norm in (module.norm, module.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.fixture
def program(module: nn.Module) -> Program:
    return Program.capture(module, (SIDE, SIDE))


def pictures(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes of unequal size: a bright quarter of the image is the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0] * 28 + [1] * 14 + [2] * 6)
    images[labels == 0, :, :4, :4] += 1
    images[labels == 1, :, 4:, :4] += 1
    images[labels == 2, :, 4:, 4:] += 1
    return images, labels


def train(split: Split, config: RepairConfig = CONFIG, **more: object) -> Trained:
    found = InMemory(split, *pictures())
    given = {"loss": config.loss, **more}
    return train_layer(split, found, InMemory(split, *pictures(1)), config, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["ce", "trust"])
def test_epochs_take_the_versions_of_the_images_in_turn(
    program: Program, tmp_path: Path, loss: str
) -> None:
    split = program.split("second")
    shown = [InMemory(split, *pictures(seed)) for seed in (0, 5, 6)]
    judged = InMemory(split, *pictures(1))
    config = replace(CONFIG, loss=loss, keep="last", epochs=5)
    found = train_layer(split, shown[0], judged, config, loss=loss, versions=shown[1:])
    state = tmp_path / "state.pt"
    for epoch in range(5):  # one at a time, each from where the last one stopped
        more = replace(config, epochs=epoch + 1)
        expected = train_layer(split, shown[epoch % 3], judged, more, loss=loss, state_path=state)
    for name, value in expected.parameters.items():
        assert torch.equal(found.parameters[name], value)
    alone = train_layer(split, shown[0], judged, config, loss=loss)
    assert not torch.equal(alone.parameters["second.weight"], found.parameters["second.weight"])


def test_versions_with_other_images_are_refused(program: Program) -> None:
    split = program.split("second")
    images, labels = pictures()
    whole, part = InMemory(split, images, labels), InMemory(split, images[:40], labels[:40])
    with pytest.raises(ValueError, match=r"\[40, 48\]"):
        train_layer(split, whole, whole, CONFIG, loss="ce", versions=[part])


def plain_loop(
    module: nn.Module, learning: Mapping[str, nn.Parameter], weights: Tensor | None = None
) -> None:
    """One epoch of ordinary training of the whole module in eval mode, in place."""
    images, labels = pictures()
    optimizer = torch.optim.SGD(learning.values(), lr=CONFIG.learning_rate, momentum=0.9)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1))
    for rows in order.split(CONFIG.batch_size):
        optimizer.zero_grad()
        nats = nn.functional.cross_entropy(module(images[rows]), labels[rows], reduction="none")
        (nats if weights is None else nats * weights[labels[rows]]).mean().backward()
        optimizer.step()


def of(module: nn.Module, *prefixes: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_follow_the_schedule(program: Program, schedule: str) -> None:
    config = replace(CONFIG, epochs=6, schedule=schedule)
    rows = train(program.split("second"), config).history[1:]
    expected = {
        "constant": lambda epoch: 1.0,
        "cosine": lambda epoch: (1 + math.cos(math.pi * epoch / 6)) / 2,
        "linear": lambda epoch: 1 - epoch / 6,
        "step": lambda epoch: 0.1 ** (epoch // 2),
    }[schedule]
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [0.05 * expected(epoch) for epoch in range(6)], rel=1e-9
    )


def test_a_schedule_goes_on_after_a_kill(program: Program, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=5, schedule="cosine", optimizer="adamw")
    whole = train(program.split("second"), config)

    class Killed(Exception):
        pass

    def kill(row: Mapping[str, object]) -> None:
        if row["epoch"] == 2:
            raise Killed

    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        train(program.split("second"), config, state_path=path, on_epoch=kill)
    resumed = train(program.split("second"), config, state_path=path)
    assert [r["learning_rate"] for r in resumed.history[1:]] == [
        r["learning_rate"] for r in whole.history[1:]
    ]
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[name])


@pytest.mark.parametrize(
    ("entropies", "patience", "epochs", "best"),
    [
        ([1.0, 0.9, 0.8, 0.85, 0.84, 0.83, 0.5], 3, 5, 2),
        ([1.0, 0.9, 0.8, 0.85, 0.84, 0.83, 0.5], 0, 6, 6),
        ([1.0, 1.1, 1.2, 0.5, 0.4, 0.3, 0.2], 2, 2, 0),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.6], 1, 6, 5),  # the last epoch is not early
    ],
)
def test_training_stops_when_patience_is_out(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    entropies: list[float],
    patience: int,
    epochs: int,
    best: int,
) -> None:
    said = iter(entropies)
    monkeypatch.setattr(
        repair.training, "_validate", lambda *given: {"val_ce": next(said), "val_accuracy": 0.5}
    )
    trained = train(program.split("second"), replace(CONFIG, epochs=6, patience=patience))
    assert len(trained.history) - 1 == epochs and trained.best_epoch == best
    if epochs < 6:
        assert trained.stopped is not None
        assert trained.stopped.startswith(f"stopped early after epoch {epochs}")
        assert trained.stopped.endswith(f"of epoch {best}")
    else:
        assert trained.stopped is None


def test_the_last_epoch_is_kept_where_that_is_asked_for(program: Program) -> None:
    split = program.split("second")
    config = replace(CONFIG, epochs=4, learning_rate=0.8)
    best, last = train(split, config), train(split, replace(config, keep="last"))
    entropies = [row["val_ce"] for row in last.history]
    assert last.best_epoch == 4 and best.best_epoch == int(np.argmin(entropies)) < 4
    assert not torch.equal(last.parameters["second.weight"], best.parameters["second.weight"])
    shorter = train(split, replace(config, epochs=best.best_epoch, keep="last"))
    if best.best_epoch:
        assert torch.equal(shorter.parameters["second.weight"], best.parameters["second.weight"])


def test_class_weights_are_those_of_a_weighted_training_loop(
    program: Program, module: nn.Module
) -> None:
    weights = torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64)
    trained = train(program.split("second"), replace(CONFIG, epochs=1), class_weights=weights)
    plain_loop(module, of(module, "second"), weights)
    torch.testing.assert_close(
        trained.parameters["second.weight"], module.second.weight.detach(), rtol=1e-9, atol=1e-12
    )


def test_the_norm_that_follows_learns_scale_and_shift_and_no_statistics(
    program: Program, module: nn.Module
) -> None:
    also = program.norm_parameters_after("second")
    assert list(also) == ["norm2.weight", "norm2.bias"]
    trained = train(program.split("second"), replace(CONFIG, epochs=1), also=also)
    learning = of(module, "second", "norm2")
    plain_loop(module, learning)
    assert set(trained.parameters) == set(learning)
    for name, value in trained.parameters.items():
        torch.testing.assert_close(value, learning[name].detach(), rtol=1e-9, atol=1e-12)
    assert program.norm_parameters_after("head") == {}


def test_the_uncut_network_trains_as_an_ordinary_loop_over_all_parameters(
    program: Program, module: nn.Module
) -> None:
    trained = train(program.uncut(), replace(CONFIG, epochs=1))
    learning = of(module, "")
    plain_loop(module, learning)
    assert set(trained.parameters) == set(learning)
    for name, value in trained.parameters.items():
        torch.testing.assert_close(value, learning[name].detach(), rtol=1e-9, atol=1e-12)


def test_auto_rgn_scales_each_tensors_steps_by_its_relative_gradient_norm(
    module: nn.Module,
) -> None:
    config = replace(CONFIG, epochs=1, batch_size=IMAGES)
    with torch.no_grad():
        for norm in (module.norm, module.norm2):
            norm.bias.normal_()
    program = Program.capture(module, (SIDE, SIDE))
    trained = train(program.uncut(), config, surgical=True)
    images, labels = pictures()
    nn.functional.cross_entropy(module(images), labels).backward()
    learning = of(module, "")
    share = {n: float(p.grad.norm() / p.detach().norm()) for n, p in learning.items()}
    largest = max(share.values())
    assert len(set(share.values())) == len(share)
    for name, p in learning.items():
        rate = config.learning_rate * share[name] / largest
        expected = p.detach() - rate * p.grad
        torch.testing.assert_close(trained.parameters[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["ce", "trust"])
def test_mixed_precision_rounds_steps_but_not_what_is_judged(module: nn.Module, loss: str) -> None:
    program = Program.capture(module.float(), (SIDE, SIDE))
    split = program.split("second")
    found = InMemory(split, *(pictures()[0].float(), pictures()[1]))
    config = replace(CONFIG, loss=loss)
    exact = train_layer(split, found, found, config, loss=loss)
    mixed = train_layer(split, found, found, replace(config, amp=True), loss=loss)
    assert mixed.history[0]["val_ce"] == exact.history[0]["val_ce"]
    for name, value in exact.parameters.items():
        assert mixed.parameters[name].dtype == torch.float32
        assert not torch.equal(mixed.parameters[name], value)
        torch.testing.assert_close(mixed.parameters[name], value, rtol=0.05, atol=0.02)


def test_channels_last_changes_the_layout_alone(program: Program) -> None:
    plain = train(program.split("second"))
    laid_out = train(program.split("second"), replace(CONFIG, channels_last=True))
    for name, value in plain.parameters.items():
        torch.testing.assert_close(laid_out.parameters[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("saliency", ["gradcam", "guided-gradcam"])
def test_the_energy_loss_moves_maps_into_the_masks(program: Program, saliency: str) -> None:
    split = program.split("second")
    masks = torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.float64)
    masks[:, :, :4] = 1
    config = replace(CONFIG, loss="energy", epochs=12, learning_rate=0.01, saliency=saliency)

    def outside(weight: float) -> list[float]:
        allowed = ImageMasks.of_all(masks)
        trained = train(split, replace(config, weight=weight), masks=allowed)
        return [row["saliency_mean"] for row in trained.history[1:]]

    charged, free = outside(5.0), outside(0.0)
    assert 0.1 < charged[-1] < 0.8 * charged[0]
    assert charged[-1] < 0.8 * free[-1]


def test_masks_are_brought_to_the_size_of_the_maps_by_area(program: Program) -> None:
    from repair.training import loss_terms

    split = program.split("second")
    batch = InMemory(split, *pictures()).batch(torch.arange(IMAGES))
    fine = torch.rand(IMAGES, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(2))
    known = torch.arange(IMAGES)
    known[5] = -1
    coarse = fine.unflatten(2, (SIDE, 4)).unflatten(1, (SIDE, 4)).mean(dim=(2, 4))
    config = replace(CONFIG, loss="trust-masks")
    terms = [
        loss_terms(
            split,
            batch,
            split.parameters,
            config,
            config.loss,
            masks=ImageMasks(masks, known),
        ).loss
        for masks in (fine, coarse)
    ]
    assert terms[0].isfinite().all()
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-6, atol=1e-7)


def test_guided_training_without_images_says_what_is_missing(program: Program) -> None:
    split = program.split("second")
    batch = replace(InMemory(split, *pictures()).batch(torch.arange(4)), images=None)
    config = RepairConfig(loss="trust", saliency="guided-gradcam")
    with pytest.raises(ValueError, match="beside"):
        repair.training.loss_terms(split, batch, split.parameters, config, "trust")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedule": "up"}, "--schedule is 'up'"),
        ({"patience": -1}, "--patience is -1"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"keep": "first"}, "--keep is 'first'"),
        ({"keep": "last", "patience": 2}, "--keep last excludes it"),
        ({"weight": -2.0}, "the weight is -2"),
        ({"saliency": "gradients"}, "goes with --loss rrr"),
        ({"saliency": "guided-gradcam", "loss": "rrr"}, "give --saliency gradients"),
        ({"saliency": "cam"}, "--saliency is 'cam'"),
    ],
)
def test_wrong_settings_name_the_option(setting: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RepairConfig(**setting)  # type: ignore[arg-type]


def test_balanced_weights_are_scikit_learns(
    make_run: object, network: object, folder: object
) -> None:
    from repair.material import RepairImages

    train_rows = folder.positions("train")  # type: ignore[attr-defined]
    kept = [p for p in train_rows if folder.records[p].label or p % 4 == 0]  # type: ignore[attr-defined]
    images = RepairImages(
        folder=folder,
        positions={"train": tuple(kept)},
        changed=(),
        additions=None,  # type: ignore[arg-type]
    )
    weights = images.class_weights(network, replace(CONFIG, balance_classes=True))  # type: ignore[arg-type]
    labels = np.array([folder.records[p].label for p in kept])  # type: ignore[attr-defined]
    counts = np.bincount(labels)
    assert weights is not None and len(set(counts)) > 1
    np.testing.assert_allclose(weights, len(labels) / (3 * counts), rtol=1e-6)
    assert images.class_weights(network, CONFIG) is None  # type: ignore[arg-type]
