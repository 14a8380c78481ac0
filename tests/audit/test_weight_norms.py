"""Weight norms stand out as SciPy's robust deviation says, and do where noise was added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation
from torch import nn

from audit.networks.program import Program
from audit.networks.small_vgg import SmallVGG
from audit.weight_norms import norm_outliers
from tests.audit.example_networks import SIZE, network


def example() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return SmallVGG(classes=2, widths=(8, 8, 12, 16, 16)).eval()


def test_a_norm_stands_out_by_robust_standard_deviations_of_its_logarithm() -> None:
    module = example()
    found = norm_outliers(Program.capture(module, (32, 32)))
    expected = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            rows = [float(row.detach().double().norm()) for row in part.weight]
            expected[name] = np.log(np.sqrt(np.mean(np.square(rows))))
    values = np.array(list(expected.values()))
    spread = median_abs_deviation(values, scale="normal")
    assert found == pytest.approx(
        {name: (value - np.median(values)) / spread for name, value in expected.items()}, rel=1e-4
    )


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
    assert found["block3_conv2"] > 2 * max(others)


def test_too_few_convolutions_have_no_usual_norm() -> None:
    assert norm_outliers(Program.capture(network("plain"), SIZE)) == {}
