"""Signs that a layer's own batch norm cannot tell are seen in the depthwise layer behind it."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from audit.evidence import LayerEvidence, gather_evidence
from audit.networks.program import Program
from audit.plain_images import drift_without_artefacts
from audit.signs_behind import WORTH_A_LOOK, Behind, depthwise_behind
from tests.audit.example_networks import SIZE, network

SIDE, CHANNELS = 12, 12
SENDER, DEPTHWISE = "expand", "depthwise"


def photographs() -> Tensor:
    """Skewed, as natural images' features are: uint8, (256, 3, SIDE, SIDE)."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(256, 3, SIDE, SIDE, generator=generator)
    return (-80 * drawn.log()).clamp(max=255).to(torch.uint8)


def normalized(pixels: Tensor) -> Tensor:
    return pixels.float() / 80 - 1


@pytest.fixture(scope="module")
def bottleneck() -> nn.Sequential:
    """A linear bottleneck, whose expansion takes channels around nought, with batch norms that
    remember these images."""
    torch.manual_seed(0)
    parts: list[tuple[str, nn.Module]] = [("stem", nn.Conv2d(3, 8, 3, padding=1, bias=False))]
    parts += [("norm0", nn.BatchNorm2d(8)), ("relu0", nn.ReLU())]
    parts += [("project", nn.Conv2d(8, 6, 1, bias=False)), ("norm1", nn.BatchNorm2d(6))]
    parts += [(SENDER, nn.Conv2d(6, CHANNELS, 1, bias=False))]
    parts += [("norm2", nn.BatchNorm2d(CHANNELS)), ("relu2", nn.ReLU())]
    parts += [(DEPTHWISE, nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, bias=False))]
    parts += [("norm3", nn.BatchNorm2d(CHANNELS)), ("relu3", nn.ReLU())]
    parts += [("after", nn.Conv2d(CHANNELS, 6, 1, bias=False)), ("norm4", nn.BatchNorm2d(6))]
    parts += [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", nn.Linear(6, 2))]
    module = nn.Sequential(OrderedDict(parts))
    images = normalized(photographs())
    with torch.no_grad():
        for _ in range(200):
            module.train()(images[torch.randint(256, (64,))])
    return module.eval()


def damaged(healthy: nn.Sequential, damage: str) -> Program:
    program = Program.capture(healthy, (SIDE, SIDE))
    layer = DEPTHWISE if damage == "noise behind" else SENDER
    weight = program.state[f"{layer}.weight"].clone()
    if damage == "signs":
        weight[:5] = -weight[:5]
    elif damage != "none":
        generator = torch.Generator().manual_seed(3)
        weight += 2 * weight.std() * torch.randn(weight.shape, generator=generator)
    return program.with_state({f"{layer}.weight": weight})


def gathered(program: Program) -> tuple[list[LayerEvidence], list[LayerEvidence]]:
    """Evidence as the first pass has it, and as a second look leaves it."""
    pixels = photographs()
    labels = torch.arange(len(pixels)) % 2
    first = gather_evidence(program, [(normalized(pixels), labels)], program.layers, seed=0)
    found, _ = drift_without_artefacts(
        first,
        program,
        normalized,
        lambda places: pixels[torch.from_numpy(places)],
        np.arange(len(pixels)),
        [],
        batch_size=32,
        seed=0,
    )
    return first, found


@pytest.mark.parametrize("damage", ["signs", "noise", "noise behind", "none"])
def test_signs_are_told_of_the_layer_before_the_one_where_drift_sets_in(
    bottleneck: nn.Sequential, damage: str
) -> None:
    first, found = gathered(damaged(bottleneck, damage))
    before, after = ({one.layer.name: one for one in of} for of in (first, found))
    told = {name for name, one in after.items() if one.signs_onset > 0.01}
    assert told == ({SENDER} if damage == "signs" else set())
    if damage == "signs":
        assert before[SENDER].drift < 0.01  # its own batch norm sees nothing
        assert after[SENDER].signs_seen_in == DEPTHWISE
        assert after[SENDER].signs_onset == before[DEPTHWISE].drift_onset > WORTH_A_LOOK
        assert after[SENDER].drift_by_signs > 0.9 * before[DEPTHWISE].drift
        assert after[DEPTHWISE] == before[DEPTHWISE]
    else:
        assert not any(one.signs_seen_in for one in found)


def test_what_changed_signs_explain_is_what_the_better_sign_of_each_channel_saves(
    bottleneck: nn.Sequential,
) -> None:
    program = damaged(bottleneck, "signs")
    norm = bottleneck.get_submodule("norm3")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    remembered = Normal(norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt())
    order = np.random.default_rng(0).permutation(256)[:96]
    images = normalized(photographs()[torch.from_numpy(order)])
    divergences = []
    for sign in (1, -1):
        turned = program.with_state({f"{SENDER}.weight": sign * program.state[f"{SENDER}.weight"]})
        with torch.no_grad():
            given = turned.watch(images, [DEPTHWISE])[0][DEPTHWISE].double()
        deviation = (given.var((0, 2, 3), correction=0) + norm.eps).sqrt()
        divergences.append(kl_divergence(Normal(given.mean((0, 2, 3)), deviation), remembered))
    saved = divergences[0] - torch.minimum(*divergences)
    first, found = gathered(program)
    (sender,) = [one for one in found if one.layer.name == SENDER]
    (behind,) = [one for one in first if one.layer.name == DEPTHWISE]
    expected = float(saved.sum() / divergences[0].sum()) * behind.drift
    assert sender.drift_by_signs == pytest.approx(expected, rel=1e-4)


def test_only_depthwise_convolutions_that_drift_and_have_one_sender_are_asked(
    bottleneck: nn.Sequential,
) -> None:
    program = damaged(bottleneck, "signs")
    first, _ = gathered(program)
    assert depthwise_behind(first, program) == [Behind(SENDER, DEPTHWISE)]
    calm, _ = gathered(damaged(bottleneck, "none"))
    assert depthwise_behind(calm, program) == []
    only = [one for one in first if one.layer.name != SENDER]  # it was not scored
    assert depthwise_behind(only, program) == []
    residual = Program.capture(network("residual"), SIZE)
    images = torch.randn(8, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    evidence = gather_evidence(residual, [(images, torch.arange(8) % 2)], residual.layers, seed=0)
    assert any(one.drift_onset > 1 for one in evidence)
    assert depthwise_behind(evidence, residual) == []
