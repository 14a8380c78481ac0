"""What no change of photographs explains: against networks that remember changed ones, against a
plain search over changed images, and on damaged first layers."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from audit.drift import ONSET_FLOOR, ChannelSums, drift
from audit.networks.program import BatchNorm, Program
from audit.photo_changes import CONTRASTS, SIZES, unexplained_drift
from tests.audit.test_artefacts import photos

SIDE = 32
CHANNELS = 12


def images(count: int, *, seed: int) -> Tensor:
    return (photos(count, seed=seed).double() / 255 - 0.5) / 0.25


def resized(given: Tensor, size: float) -> Tensor:
    if size == 1:
        return given
    return F.interpolate(given, scale_factor=size, mode="bilinear", antialias=True)


def first_layer(*, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, CHANNELS, 3, bias=bias).double()  # no padding: a cast is one everywhere


def remembering(convolution: nn.Conv2d, seen: Tensor) -> Program:
    """A network whose first batch norm remembers what the layer made of some images."""
    parts = OrderedDict(
        conv=convolution,
        norm=nn.BatchNorm2d(CHANNELS),
        relu=nn.ReLU(),
        deep=nn.Conv2d(CHANNELS, 4, 3),
        norm2=nn.BatchNorm2d(4),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(4, 3),
    )
    module = nn.Sequential(parts).double().eval()
    with torch.no_grad():
        outputs = convolution(seen)
        norm = parts["norm"]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(outputs.mean(dim=(0, 2, 3)))
        norm.running_var.copy_(outputs.var(dim=(0, 2, 3), correction=0))
    return Program.capture(module, (SIDE, SIDE))


def seen_drift(convolution: nn.Conv2d, given: Tensor, norm: BatchNorm) -> float:
    sums = ChannelSums.empty(CHANNELS, given.device)
    with torch.no_grad():
        sums.add(convolution(given))
    return drift(sums, norm)


def onset(value: float) -> float:
    return math.log((value + ONSET_FLOOR) / ONSET_FLOOR)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_photographs_that_were_changed_are_explained_whole(size: float, bias: bool) -> None:
    given = images(40, seed=0)
    contrast, cast = CONTRASTS[10], torch.tensor([0.4, -0.2, 0.1]).double()
    changed = contrast * resized(given, size) + cast[:, None, None]
    program = remembering(first_layer(bias=bias), changed)
    norm = program.batch_norm_after("conv")
    assert norm is not None
    assert seen_drift(first_layer(bias=bias), given, norm) > 0.2
    (found,) = unexplained_drift(program, given.split(16), ["conv"]).values()
    assert found == pytest.approx(0, abs=1e-9)


def test_it_is_the_least_drift_of_a_plain_search_over_changed_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = CONTRASTS[::4]
    monkeypatch.setattr("audit.photo_changes.CONTRASTS", few)
    given, convolution = images(24, seed=1), first_layer()
    program = remembering(convolution, images(24, seed=2).flip(1).square())
    norm = program.batch_norm_after("conv")
    assert norm is not None
    (found,) = unexplained_drift(program, [given], ["conv"]).values()
    deviations = (norm.variance + norm.eps).sqrt()

    def distance(cast: np.ndarray, picture: Tensor) -> float:
        shifted = picture + torch.from_numpy(cast)[:, None, None]
        with torch.no_grad():
            means = convolution(shifted).mean(dim=(0, 2, 3))
        return float(((means - norm.mean) / deviations).square().sum())

    least = math.inf
    for size in SIZES:
        for contrast in few:
            picture = contrast * resized(given, size)
            best = minimize(distance, np.zeros(3), args=(picture,), tol=1e-12)
            changed = picture + torch.from_numpy(best.x)[:, None, None]
            least = min(least, seen_drift(convolution, changed, norm))
    assert found == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("damage", ["permuted", "noise", "dead"])
def test_damage_is_not_explained(damage: str) -> None:
    given, convolution = images(96, seed=3), first_layer()
    program = remembering(convolution, images(96, seed=4))
    healthy = unexplained_drift(program, given.split(32), ["conv"])["conv"]
    assert onset(healthy) < 0.2
    weight = program.state["conv.weight"].clone()
    if damage == "permuted":
        weight[:4] = weight[[1, 2, 3, 0]]
    elif damage == "dead":
        weight[:3] = 0
    else:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
        weight += 1.5 * weight.std() * noise
    damaged = program.with_state({"conv.weight": weight})
    assert onset(unexplained_drift(damaged, given.split(32), ["conv"])["conv"]) > 1


def test_layers_that_do_not_take_colors_are_left_out() -> None:
    program = remembering(first_layer(), images(8, seed=5))
    found = unexplained_drift(program, [images(8, seed=6)], ["conv", "deep", "head"])
    assert set(found) == {"conv"}
    assert unexplained_drift(program, [], ["conv"]) == {}


def test_photographs_too_small_to_be_halved_are_looked_at_as_large_as_they_are() -> None:
    small = images(32, seed=7)[:, :, :12, :12]
    program = remembering(first_layer(), small)
    (found,) = unexplained_drift(program, [small], ["conv"]).values()
    assert found == pytest.approx(0, abs=1e-12)
