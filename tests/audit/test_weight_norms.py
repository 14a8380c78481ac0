"""Weight norms stand out as Grubbs' table says, and do where noise was added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from audit.networks.program import Program
from audit.networks.small_vgg import SmallVGG
from audit.weight_norms import norm_outliers, outlying
from tests.audit.example_networks import SIZE, network


def example() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return SmallVGG(classes=2, widths=(8, 8, 12, 16, 16)).eval()


# Grubbs 1950, one-sided: G that n normal values exceed with a chance of .05 and of .01.
GRUBBS = [(6, 0.05, 1.822), (6, 0.01, 1.944), (13, 0.05, 2.331), (13, 0.01, 2.607)]


@pytest.mark.parametrize(("count", "chance", "critical"), GRUBBS)
def test_outlying_is_the_p_value_of_grubbs(count: int, chance: float, critical: float) -> None:
    others = np.random.default_rng(count).normal(size=count - 1)

    def grubbs(value: float) -> float:
        values = np.append(others, value)
        return float((value - values.mean()) / values.std(ddof=1)) - critical

    values = np.append(others, brentq(grubbs, others.max(), 1000))
    assert 10 ** -outlying(values)[-1] == pytest.approx(chance, rel=0.02)


def test_norms_are_root_mean_squares_over_channels_compared_as_logarithms() -> None:
    module = example()
    found = norm_outliers(Program.capture(module, (32, 32)))
    expected = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            rows = [float(row.detach().double().norm()) for row in part.weight]
            expected[name] = np.log(np.sqrt(np.mean(np.square(rows))))
    values = outlying(np.array(list(expected.values())))
    assert found == pytest.approx(dict(zip(expected, values, strict=True)), rel=1e-4)


def test_no_norm_is_surer_than_a_float_can_say() -> None:
    assert outlying(np.array([0.0] * 400 + [1e9]))[-1] == 300


def test_noise_as_large_as_the_weights_stands_out_and_nothing_else_does() -> None:
    module = example()
    weight = module.get_submodule("block3_conv2").weight
    assert isinstance(weight, nn.Parameter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight += weight.std() * torch.randn(weight.shape, generator=generator)
    found = norm_outliers(Program.capture(module, (32, 32)))
    assert max(found, key=lambda name: found[name]) == "block3_conv2"
    others = [value for name, value in found.items() if name != "block3_conv2"]
    assert found["block3_conv2"] > 1.3 > 2 * max(others)  # 5 in 100


def test_too_few_convolutions_have_no_usual_norm() -> None:
    assert norm_outliers(Program.capture(network("plain"), SIZE)) == {}
