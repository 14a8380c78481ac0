"""A new head on old features, against the same network trained step by step with torch alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import repair.cli
from audit.errors import NetworkError
from audit.images import ImageFolder, load_pixels, open_image_folder
from audit.networks import ModelCard, Network, Preprocessing, open_network
from audit.networks.program import Program
from audit.networks.torchvision_import import import_torchvision
from repair.cache import CrossingTensors, cross_tensors
from repair.config import RepairConfig
from repair.new_head import CLASSIFIER, CONVOLUTION, head_split, with_new_head
from repair.transfer import transfer

import_torchvision()
import torchvision.models  # noqa: E402

CONFIG = RepairConfig(epochs=2, batch_size=16, learning_rate=0.05)


def network_of(module: nn.Module, size: tuple[int, int] = (64, 64)) -> Network:
    card = ModelCard(
        arch=None,
        classes=tuple(f"class {i}" for i in range(10)),
        preprocessing=Preprocessing(
            input_size=size, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop=1.0
        ),
        provenance={},
    )
    program = Program.capture(module.eval(), size)
    return Network(program=program, card=card, source="test", sha256="0" * 64)


def run_repair(arguments: list[str]) -> int:
    """Run the command in this process, as its entry point does."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["repair", *arguments])
        repair.cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def crossing(network: Network, folder: ImageFolder) -> dict[str, CrossingTensors]:
    split, _ = head_split(with_new_head(network, network.card.classes, seed=3))
    return {
        name: cross_tensors(
            network,
            split,
            folder,
            folder.positions(name),
            budget_bytes=2**30,  # type: ignore[arg-type]
        )
        for name in ("train", "val", "test")
    }


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("mobilenet_v2", lambda module, images: module.features(images)),
        ("resnet18", lambda module, images: nn.Sequential(*list(module.children())[:-2])(images)),
        ("vgg11", lambda module, images: module.avgpool(module.features(images))),
    ],
)
def test_the_head_reads_the_last_feature_maps(name: str, features) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None).eval()
    changed = with_new_head(network_of(module), ("cat", "dog"), filters=8, seed=1)
    state = changed.program.state
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        maps = features(module, images)
        hidden = torch.einsum("fc,bchw->bfhw", state["transfer.weight"][:, :, 0, 0], maps)
        hidden = (hidden + state["transfer.bias"].view(1, -1, 1, 1)).clamp(min=0)
        pooled = hidden.flatten(2).mean(dim=2)
        expected = pooled @ state["classifier.weight"].T + state["classifier.bias"]
        torch.testing.assert_close(changed.program.logits(images), expected, rtol=1e-4, atol=1e-5)
    assert changed.card.classes == ("cat", "dog")


def test_the_seed_alone_decides_the_first_weights(network: Network) -> None:
    def weight(seed: int) -> Tensor:
        return with_new_head(network, ("a", "b"), seed=seed).program.state["transfer.weight"]

    torch.manual_seed(5)
    one = weight(0)
    torch.manual_seed(6)
    assert torch.equal(one, weight(0))
    assert not torch.equal(one, weight(1))


class Shortcut(nn.Module):
    """What the head would miss: part of the image goes around the feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(5, 10)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.convolution(images).relu().mean(dim=(2, 3))
        return self.linear(torch.cat([pooled, images.flatten(1).mean(dim=1, keepdim=True)], dim=1))


@pytest.mark.parametrize(
    "module", [Shortcut(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))]
)
def test_a_network_without_last_feature_maps_is_refused(module: nn.Module) -> None:
    with pytest.raises(NetworkError, match="no last feature maps"):
        with_new_head(network_of(module, (16, 16)), ("a", "b"))


def test_training_equals_plain_torch_on_both_new_layers(
    network: Network, folder: ImageFolder, crossing: dict[str, CrossingTensors]
) -> None:
    """Cross entropy by SGD with momentum, written out, over the same batches."""
    changed = with_new_head(network, network.card.classes, seed=3)
    found = transfer(changed, crossing, RepairConfig(**{**vars(CONFIG), "loss": "ce"}))
    assert found.control is None and found.ssim is None

    state = changed.program.state
    names = [
        f"{layer}.{kind}" for layer in (CONVOLUTION, CLASSIFIER) for kind in ("weight", "bias")
    ]
    leaves = [state[name].clone().requires_grad_() for name in names]
    optimizer = torch.optim.SGD(leaves, lr=CONFIG.learning_rate, momentum=0.9)
    train = crossing["train"]

    def logits(maps: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(maps, leaves[0], leaves[1]).relu()
        return hidden.mean(dim=(2, 3)) @ leaves[2].T + leaves[3]

    by_epoch: dict[int, dict[str, Tensor]] = {0: {n: state[n] for n in names}}
    for epoch in range(1, CONFIG.epochs + 1):
        generator = torch.Generator().manual_seed(epoch)
        for rows in torch.randperm(len(train), generator=generator).split(CONFIG.batch_size):
            batch = train.batch(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(batch.crossing[0]), batch.labels).backward()
            optimizer.step()
        by_epoch[epoch] = {n: leaf.detach().clone() for n, leaf in zip(names, leaves, strict=True)}
    expected = by_epoch[found.trained.best_epoch]
    assert found.trained.best_epoch > 0
    for name in names:
        torch.testing.assert_close(
            found.network.program.state[name], expected[name], rtol=1e-4, atol=1e-5
        )


def test_the_features_stay_bit_identical_and_the_control_differs_in_the_loss_alone(
    network: Network, folder: ImageFolder, crossing: dict[str, CrossingTensors]
) -> None:
    changed = with_new_head(network, network.card.classes, seed=3)
    found = transfer(changed, crossing, CONFIG)
    plain = transfer(changed, crossing, RepairConfig(**{**vars(CONFIG), "loss": "ce"}))
    learned = {
        f"{layer}.{kind}" for layer in (CONVOLUTION, CLASSIFIER) for kind in ("weight", "bias")
    }
    before, after = changed.program.state, found.network.program.state
    assert {name for name in before if not torch.equal(before[name], after[name])} == learned
    assert found.control is not None and found.ssim is not None
    np.testing.assert_array_equal(found.control.p_true, plain.test.p_true)
    assert found.ssim.shape == (len(crossing["test"]),)
    record = found.as_dict(network.card.classes, seed=0)
    assert "plain cross entropy" in record["penalty"]["sentence"]
    assert record["after"]["accuracy"]["value"] == pytest.approx(found.test.right.mean())


def test_the_command_writes_a_program_that_opens_again_and_says_the_same(
    model_file: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "shapes.pt2"
    arguments = ["transfer", str(model_file), "--data", str(photos), "--out", str(out)]
    short = ["--epochs", "2", "--filters", "8", "--lr", "0.05", "--json"]
    assert run_repair([*arguments, *short]) == 0
    record = json.loads(capfd.readouterr().out)
    assert json.loads(out.with_suffix(".json").read_text()) == record
    opened = open_network(str(out))
    assert opened.card.classes == ("disk", "square", "stripes")
    assert opened.layer("last_conv").shape[:1] == (8,)
    folder = open_image_folder(photos, opened.card.classes)
    batch = load_pixels(folder, folder.positions("test"), opened.card.preprocessing)
    with torch.no_grad():
        said = opened.program.logits(opened.normalize(batch.pixels)).argmax(dim=1)
    labels = torch.tensor([folder.records[i].label for i in batch.indices.tolist()])
    right = float((said == labels).float().mean())
    assert record["after"]["accuracy"]["value"] == pytest.approx(right)

    assert run_repair([*arguments, *short]) == 2
    assert "is there already; give another name with --out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--out", "network.pt"], "its name ends in .pt2"),
        (["--filters", "0"], "--filters is 0; expected at least 1"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line(
    model_file: Path,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_repair(["transfer", str(model_file), "--data", str(photos), *extra]) in (1, 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0]
    assert list(tmp_path.iterdir()) == []
