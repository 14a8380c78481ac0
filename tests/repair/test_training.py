"""Training one layer: the same with and without cache, after a kill, and only that layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from audit.errors import RunError
from audit.images import ImageFolder, load_pixels
from audit.networks import Network
from repair.cache import CacheKind, CrossingTensors, cross_tensors, crossing_bytes
from repair.config import RepairConfig
from repair.training import Trained, predict, train_layer

from .conftest import DAMAGED, Crossed, whole_network_predictions

CONFIG = RepairConfig(epochs=3, learning_rate=0.05)


def train(
    network: Network,
    crossed: Crossed,
    config: RepairConfig = CONFIG,
    kind: CacheKind = "memory",
    state_path: Path | None = None,
    **more: object,
) -> Trained:
    return train_layer(
        network.program.split(DAMAGED),
        crossed("train", kind),
        crossed("val", kind),
        config,
        loss=config.loss,
        state_path=state_path,
        **more,  # type: ignore[arg-type]
    )


def test_crossing_tensors_give_the_uncut_networks_predictions(
    network: Network, folder: ImageFolder, crossed: Crossed
) -> None:
    for kind in ("memory", "recompute"):
        predictions, positions = predict(
            network.program.split(DAMAGED),
            crossed("test", kind),  # type: ignore[arg-type]
        )
        expected = whole_network_predictions(network, folder, folder.positions("test"))
        assert tuple(positions) == folder.positions("test")
        assert (predictions.predicted == expected.predicted).all()
        assert abs(predictions.cross_entropies - expected.cross_entropies).max() < 1e-5


@pytest.mark.parametrize("loss", ["trust", "ce"])
def test_training_is_the_same_with_and_without_the_cache(
    network: Network, crossed: Crossed, loss: str
) -> None:
    config = replace(CONFIG, loss=loss)
    cached = train(network, crossed, config)
    recomputed = train(network, crossed, config, kind="recompute")
    for name, value in cached.parameters.items():
        torch.testing.assert_close(recomputed.parameters[name], value, rtol=1e-6, atol=1e-6)


def test_the_cache_stays_within_its_budget(network: Network, folder: ImageFolder) -> None:
    split = network.program.split(DAMAGED)
    wanted = folder.positions("val")
    needed = crossing_bytes(split, len(wanted))

    def choice(budget: int) -> CrossingTensors:
        return cross_tensors(network, split, folder, wanted, budget_bytes=budget)

    kept, not_kept = choice(needed), choice(needed - 1)
    assert (kept.kind, kept.bytes) == ("memory", needed)
    assert (not_kept.kind, not_kept.bytes) == ("recompute", 0)


@pytest.mark.parametrize("soft", [False, True])
def test_plain_cross_entropy_takes_the_steps_of_an_ordinary_training_loop(
    network: Network, folder: ImageFolder, model_file: Path, crossed: Crossed, soft: bool
) -> None:
    from safetensors.torch import load_file

    from audit.networks.small_vgg import SmallVGG

    from .conftest import CONVOLUTIONS, WIDTHS

    config = replace(CONFIG, loss="ce", epochs=1, keep="last")
    drawn = torch.rand(len(folder.records), 3, generator=torch.Generator().manual_seed(5))
    targets = drawn / drawn.sum(dim=1, keepdim=True)
    trained = train(network, crossed, config, targets=targets if soft else None)
    module = SmallVGG(classes=3, widths=WIDTHS, convolutions=CONVOLUTIONS).eval()
    module.load_state_dict(load_file(model_file))
    layer = module.get_submodule(DAMAGED)
    optimizer = torch.optim.SGD(layer.parameters(), lr=config.learning_rate, momentum=0.9)
    batch = load_pixels(folder, folder.positions("train"), network.card.preprocessing)
    images = network.normalize(batch.pixels)
    labels = torch.tensor([folder.records[i].label for i in batch.indices.tolist()])
    wanted = targets[batch.indices] if soft else labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for rows in order.split(config.batch_size):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images[rows]), wanted[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(
        trained.parameters[f"{DAMAGED}.weight"], layer.weight.detach(), rtol=1e-4, atol=1e-6
    )


def test_training_changes_nothing_in_the_network_it_was_given(
    network: Network, crossed: Crossed
) -> None:
    before = {name: value.clone() for name, value in network.program.state.items()}
    trained = train(network, crossed)
    assert all(torch.equal(before[name], value) for name, value in network.program.state.items())
    assert set(trained.parameters) == {f"{DAMAGED}.weight", f"{DAMAGED}.bias"}
    assert not torch.equal(trained.parameters[f"{DAMAGED}.weight"], before[f"{DAMAGED}.weight"])


class Killed(BaseException):
    """What a killed process looks like from inside."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_training_resumes_to_the_same_bits(
    network: Network, crossed: Crossed, tmp_path: Path, optimizer: str, killed_after: int
) -> None:
    config = replace(CONFIG, optimizer=optimizer)  # type: ignore[arg-type]
    undisturbed = train(network, crossed, config)

    def kill(row: dict[str, object]) -> None:
        if row["epoch"] == killed_after:
            raise Killed

    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        train(network, crossed, config, state_path=path, on_epoch=kill)
    epochs: list[object] = []
    resumed = train(
        network, crossed, config, state_path=path, on_epoch=lambda row: epochs.append(row["epoch"])
    )
    assert epochs == list(range(killed_after + 1, config.epochs + 1))
    assert_same_training(resumed, undisturbed)


def assert_same_training(one: Trained, other: Trained) -> None:
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name])
    assert (one.best_epoch, one.steps) == (other.best_epoch, other.steps)
    for row, other_row in zip(one.history, other.history, strict=True):
        assert {**row, "seconds": 0} == {**other_row, "seconds": 0}


def test_a_damaged_checkpoint_is_refused_with_a_remedy(
    network: Network, crossed: Crossed, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"PK\x03\x04 half a checkpoint")
    with pytest.raises(RunError, match="damaged; remove it and go on with --resume"):
        train(network, crossed, state_path=path)


def test_the_best_epoch_by_validation_cross_entropy_is_kept(
    network: Network, crossed: Crossed
) -> None:
    config = replace(CONFIG, optimizer="adamw", epochs=7, learning_rate=0.02)
    trained = train(network, crossed, config)
    assert 0 < trained.best_epoch < config.epochs, "the last epoch must not be the best by chance"
    entropies = [row.get("val_ce", float("inf")) for row in trained.history]
    assert entropies.index(min(entropies)) == trained.best_epoch
    assert [row["epoch"] for row in trained.history if row["best"]] == [trained.best_epoch]
    predictions, _ = predict(
        network.program.split(DAMAGED), crossed("val", "memory"), trained.parameters
    )
    assert predictions.cross_entropies.mean() == pytest.approx(min(entropies), rel=1e-9)


@pytest.mark.parametrize(("rate", "cause"), [(1e38, "not finite"), (300.0, "epoch 1")])
def test_divergence_is_noticed_and_rolled_back(
    network: Network, crossed: Crossed, rate: float, cause: str
) -> None:
    trained = train(network, crossed, replace(CONFIG, learning_rate=rate))
    assert trained.stopped is not None and cause in trained.stopped
    assert trained.stopped.endswith("rolled back to the weights of epoch 0")
    start = network.program.split(DAMAGED).parameters
    assert all(torch.equal(trained.parameters[name], value) for name, value in start.items())


def test_images_that_cannot_be_decoded_are_left_out(network: Network, folder: ImageFolder) -> None:
    wanted = folder.positions("val")
    broken = replace(folder.records[wanted[1]], path="not-there.png")
    records = list(folder.records)
    records[wanted[1]] = broken
    damaged = replace(folder, records=tuple(records))
    split = network.program.split(DAMAGED)
    seen: list[Tensor] = []
    for kind in ("memory", "recompute"):
        skipped: list[int] = []
        images = cross_tensors(
            network,
            split,
            damaged,
            wanted,
            budget_bytes=0,
            kind=kind,  # type: ignore[arg-type]
            on_skip=lambda position, reason, skipped=skipped: skipped.append(position),
        )
        _, positions = predict(split, images)
        seen.append(positions.tolist())
        assert skipped == [wanted[1]]
    assert seen[0] == seen[1] == [i for i in wanted if i != wanted[1]]
