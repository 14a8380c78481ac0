"""Guided gradients from kept gates, and derivatives of frozen operations, equal torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.networks.frozen_operations import convolution, frozen_batch_norm
from audit.networks.program import Program, Split
from audit.saliency import trainable_guided_maps

from ..example_networks import CLASSES, NETWORKS, SIZE, images, labels, network


class Branching(nn.Module):
    """Overlapping and uneven pooling, asymmetric padding, dilation, concatenation, differences."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 4, 3, padding=1)
        self.right = nn.Conv2d(6, 4, (1, 3), padding=(0, 2), dilation=(1, 2))
        self.norm2 = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.stem(F.pad(images, (0, 1, 0, 1)))).relu()  # 12 x 12
        hidden = F.max_pool2d(hidden, 3, 2, padding=1, ceil_mode=True)  # 7 x 7
        hidden = F.max_pool2d(hidden, (2, 3), 1, padding=(0, 1))  # 6 x 7
        left, right = self.left(hidden), F.hardtanh(self.right(hidden), -0.5, 0.5)
        both = self.norm2(torch.cat([left - right, right + left], dim=1)).relu()
        both = F.avg_pool2d(both, 3, 1, padding=1) + both
        return self.fc(self.last(F.relu6(both)).relu().mean(dim=(2, 3)))


def captured(name: str) -> Program:
    if name != "branching":
        return Program.capture(network(name, torch.float64), SIZE)
    torch.manual_seed(5)
    module = Branching().double()
    for norm in (module.norm, module.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    return Program.capture(module.eval(), SIZE)


def maps_and_gradients(split: Split, gates: Tensor | None) -> tuple[Tensor, ...]:
    """Return guided maps of the whole network, or from gates, and how the layer changes them."""
    given = images(4, torch.float64)
    leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
    maps, _ = trainable_guided_maps(
        split,
        given if gates is None else None,
        split.prefix(given),
        leaves,
        labels(4),
        gates=gates,
    )
    weights = torch.linspace(-1, 2, maps.numel(), dtype=torch.float64).view_as(maps)
    found = torch.autograd.grad(
        (weights * maps.square()).sum(), list(leaves.values()), materialize_grads=True
    )
    return (maps.detach(), *found)


@pytest.mark.parametrize("name", [*NETWORKS, "branching"])
def test_maps_from_gates_and_their_gradients_are_those_of_the_whole_network(name: str) -> None:
    program = captured(name)
    lit = 0
    for layer in (layer for layer in program.layers if layer.has_maps):
        split = program.split(layer.name)
        assert split.guided_prefix is not None
        gates = split.guided_prefix.gates(images(4, torch.float64))
        assert gates.dtype == torch.uint8
        assert gates.shape == (4, split.guided_prefix.bytes)
        expected = maps_and_gradients(split, None)
        for found, wanted in zip(maps_and_gradients(split, gates), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max())
        lit += bool(expected[0].abs().max() > 0 and expected[1].abs().max() > 0)
    assert lit >= 2


def test_gates_serve_mixed_precision() -> None:
    split = Program.capture(network("depthwise"), SIZE).split("project")
    given, targets = images(4), labels(4)
    assert split.guided_prefix is not None
    gates = split.guided_prefix.gates(given)
    found = []
    for amp in (False, True):
        leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            maps, _ = trainable_guided_maps(
                split, None, split.prefix(given), leaves, targets, gates=gates
            )
        gradients = torch.autograd.grad(maps.float().square().sum(), leaves["project.weight"])
        found.append(gradients[0])
    exact, mixed = found
    assert not torch.equal(exact, mixed)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0.1 * float(exact.abs().max()))


def test_gates_take_a_bit_a_rectifier_and_a_byte_a_pooled_position() -> None:
    program = captured("plain")
    prefix = program.split("conv2").guided_prefix
    assert prefix is not None
    assert prefix.bytes == 6 * 24 * 24 // 8 + 6 * 12 * 12
    first = program.split("conv1").guided_prefix
    assert first is not None
    assert first.bytes == 0  # nothing comes before


@pytest.mark.parametrize("between", [nn.SiLU(), nn.AdaptiveMaxPool2d(12), nn.LogSoftmax(dim=1)])
def test_operations_without_a_rule_are_left_to_the_whole_network(between: nn.Module) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        between,
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    program = Program.capture(module.double(), SIZE)
    assert program.split("3").guided_prefix is None
    assert program.split("0").guided_prefix is not None


# ------------------------------------------------------------------ frozen operations


SHAPES = [
    {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
    {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 4},
]


@pytest.mark.parametrize("settings", SHAPES)
def test_a_frozen_convolution_has_torchs_values_and_derivatives(
    settings: dict[str, object],
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    groups = int(str(settings["groups"]))
    weight, bias, inputs = draw(8, 4 // groups, 3, 3), draw(8), draw(2, 4, 7, 8)
    compare(
        lambda x: convolution(x, weight, bias, **settings),  # type: ignore[arg-type]
        lambda x: F.conv2d(x, weight, bias, **settings),  # type: ignore[arg-type]
        inputs,
    )


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_batch_norm_has_torchs_values_and_derivatives(affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, mean = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    variance = torch.rand(4, generator=generator, dtype=torch.float64)
    learned = (weight, bias) if affine else (None, None)
    inputs = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    compare(
        lambda x: frozen_batch_norm(x, *learned, mean, variance, 0.1, 1e-5),
        lambda x: F.batch_norm(x, mean, variance, *learned, False, 0.1, 1e-5),
        inputs,
    )


def compare(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], inputs: Tensor
) -> None:
    """The output, a gradient by the input, and how that gradient moves with what came in."""
    told = []
    for function in (ours, theirs):
        leaf = inputs.clone().requires_grad_()
        outputs = function(leaf.sin())
        (gradient,) = torch.autograd.grad(outputs.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), leaf)
        told.append((outputs.detach(), gradient.detach(), second))
    for found, wanted in zip(*told, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max())
    assert math.isfinite(float(told[0][2].sum()))
    leaf = inputs.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ours(x.sin()), (leaf,))


def test_weights_that_learn_have_their_gradients() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(convolution(inputs, weight).square().sum(), weight)
    (wanted,) = torch.autograd.grad(F.conv2d(inputs, weight).square().sum(), weight)
    torch.testing.assert_close(found, wanted)
