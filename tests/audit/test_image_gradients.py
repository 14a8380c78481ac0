"""Gradients of single images equal a loop over images in float64, on every kind of network."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.image_gradients import add_gradients, error_margins, margin_gradients
from audit.networks.program import Program
from tests.audit.example_networks import NETWORKS, SIZE, images, labels, network

IMAGES = 5


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Program]:
    module = network(request.param, torch.float64)
    return module, Program.capture(module, SIZE)


def test_the_cross_entropy_is_the_softplus_of_minus_the_margin() -> None:
    logits = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20) % 7
    margins = error_margins(logits * 10, targets)
    expected = F.cross_entropy(logits * 10, targets, reduction="none")
    torch.testing.assert_close(F.softplus(-margins), expected)


def test_a_sure_image_keeps_a_finite_margin_and_gradient() -> None:
    logits = torch.tensor([[300.0, 0.0, 1.0]], requires_grad=True)
    margin = error_margins(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    others = torch.tensor([0.0, 1.0]).softmax(dim=0)
    assert margin.item() == pytest.approx(300 - torch.tensor([0.0, 1.0]).logsumexp(0).item())
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -others[0], -others[1]]]))


def test_each_image_has_the_gradient_that_it_has_alone(case: tuple[nn.Module, Program]) -> None:
    module, program = case
    given, targets = images(IMAGES, torch.float64), labels(IMAGES)
    names = [layer.name for layer in program.layers]
    margins, found = margin_gradients(program, given, targets, names)
    gradients = dict(found)
    assert list(gradients) == names
    for image in range(IMAGES):
        module.zero_grad()
        p = module(given[image : image + 1]).softmax(dim=1)[0, targets[image]]
        margin = p.log() - (1 - p).log()
        margin.backward()
        assert float(margins[image]) == pytest.approx(float(margin.detach()), abs=1e-9)
        for layer in program.layers:
            expected = _gradient_by_weight(module, layer.parameter_names)
            torch.testing.assert_close(gradients[layer.name][image], expected)


@pytest.mark.parametrize("at_once", [1, 500, 10**6])
def test_sums_are_those_of_the_rows_however_many_are_held_at_once(
    case: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    _, program = case
    monkeypatch.setattr("audit.image_gradients._MOST_VALUES", at_once)
    given, targets = images(IMAGES, torch.float64), labels(IMAGES)
    names = [layer.name for layer in program.layers]
    calls, logits = program.calls(given, names)
    margins = error_margins(logits, targets)
    asked = torch.autograd.grad(margins.sum(), [call.outputs for call in calls])
    generator = torch.Generator().manual_seed(3)
    factors = torch.randn(2, IMAGES, generator=generator, dtype=torch.float64)
    units = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    for name, rows in margin_gradients(program, given, targets, names)[1]:
        uses = [(c, a) for c, a in zip(calls, asked, strict=True) if c.layer == name]
        sums = torch.ones(3, rows.shape[1], dtype=torch.float64)
        norms = add_gradients(sums, uses, factors, units)
        lengths = torch.tensor([math.sqrt(float(row @ row)) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(norms, lengths)
        for at in range(2):
            expected = 1 + sum(factors[at, i] * rows[i] for i in range(IMAGES))
            torch.testing.assert_close(sums[at], expected)
        directions = 1 + sum(units[i] * rows[i] / lengths[i] for i in range(IMAGES))
        torch.testing.assert_close(sums[2], directions)


def _gradient_by_weight(module: nn.Module, names: tuple[str, ...]) -> Tensor:
    parameters = dict(module.named_parameters())
    return torch.cat([parameters[name].grad.flatten() for name in names])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(3, 6, (3, 1), padding=(1, 0), groups=3),
        nn.Conv2d(3, 3, 5, padding=2, groups=3),
        nn.Conv2d(3, 4, 3, padding="same", bias=False),
        nn.Conv2d(3, 4, 4, stride=(3, 2)),
        nn.ConvTranspose2d(3, 4, 3, stride=2),
    ],
    ids=str,
)
def test_every_setting_of_a_convolution(layer: nn.Module) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    with torch.no_grad():
        width = module(torch.zeros(1, 3, *SIZE)).shape[1]
    module = nn.Sequential(*module, nn.Linear(width, 5)).double()
    program = Program.capture(module, SIZE)
    given, targets = images(IMAGES, torch.float64), labels(IMAGES)
    _, found = margin_gradients(program, given, targets, ["0"])
    ((_, gradients),) = found
    for image in range(IMAGES):
        module.zero_grad()
        p = module(given[image : image + 1]).softmax(dim=1)[0, targets[image]]
        (p.log() - (1 - p).log()).backward()
        expected = _gradient_by_weight(module, program.layer("0").parameter_names)
        torch.testing.assert_close(gradients[image], expected)
