"""A new head on old features, against the same network trained step by step with torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audit.errors import NetworkError
from audit.images import ImageFolder
from audit.networks import ModelCard, Network, Preprocessing
from audit.networks.program import Program
from audit.networks.torchvision_import import import_torchvision
from repair.cache import CrossingTensors, cross_tensors
from repair.config import RepairConfig
from repair.transfer import CLASSIFIER, CONVOLUTION, head_split, transfer, with_new_head

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


@pytest.fixture(scope="module")
def crossing(network: Network, folder: ImageFolder) -> dict[str, CrossingTensors]:
    split, _ = head_split(with_new_head(network, folder_classes(network), seed=3))
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


def folder_classes(network: Network) -> Sequence[str]:
    return network.card.classes


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
    changed = with_new_head(network, folder_classes(network), seed=3)
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
    changed = with_new_head(network, folder_classes(network), seed=3)
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
    assert "plain cross entropy" in found.penalty_sentence(seed=0)
