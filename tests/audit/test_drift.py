"""Drift equals torch's own divergence, and its onset names the layer that was changed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from audit.drift import (
    ONSET_FLOOR,
    ChannelSums,
    drift,
    drift_by_signs,
    onsets,
    signs_onsets,
    silent_channels,
)
from audit.evidence import gather_evidence
from audit.networks.program import BatchNorm, Program
from audit.verdict import ONSET_THRESHOLD, SIGNS_THRESHOLD, drift_origin
from tests.audit.example_networks import SIZE, network


def outputs(images: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(images, 4, 5, 6, generator=generator, dtype=torch.float64) * 2 + 7


@pytest.mark.parametrize("sizes", [[10], [7, 2, 1], [1] * 10])
def test_sums_over_batches_equal_torch_over_all_images(sizes: list[int]) -> None:
    sums = ChannelSums.empty(4, torch.device("cpu"))
    for part in outputs().split(sizes):
        sums.add(part)
    torch.testing.assert_close(sums.mean, outputs().mean(dim=(0, 2, 3)))
    expected = outputs().var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(sums.variance, expected)


def test_drift_equals_the_divergence_of_torch_distributions() -> None:
    sums = ChannelSums.empty(4, torch.device("cpu"))
    sums.add(outputs())
    mean, variance = torch.tensor([7.0, 6.0, 7.5, 9.0]), torch.tensor([4.0, 1.0, 9.0, 4.0])
    eps = 0.01
    expected = kl_divergence(
        Normal(outputs().mean((0, 2, 3)), (outputs().var((0, 2, 3), correction=0) + eps).sqrt()),
        Normal(mean.double(), (variance.double() + eps).sqrt()),
    ).mean()
    found = drift(sums, BatchNorm(mean=mean, variance=variance, eps=eps))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_drift_by_signs_is_what_the_better_sign_of_each_channel_saves() -> None:
    sums = ChannelSums.empty(4, torch.device("cpu"))
    sums.add(outputs())
    mean, variance = torch.tensor([-7.0, 6.0, -0.5, 9.0]), torch.tensor([4.0, 1.0, 9.0, 4.0])
    remembered = Normal(mean.double(), variance.double().sqrt())
    means, deviations = outputs().mean((0, 2, 3)), outputs().var((0, 2, 3), correction=0).sqrt()
    one, other = (kl_divergence(Normal(of, deviations), remembered) for of in (means, -means))
    assert (one - torch.minimum(one, other) > 0).tolist() == [True, False, True, False]
    found = drift_by_signs(sums, BatchNorm(mean=mean, variance=variance, eps=0.0))
    assert found == pytest.approx(float((one - torch.minimum(one, other)).mean()), rel=1e-9)


def test_onsets_of_signs_count_where_they_are_most_of_a_drift_that_has_not_come_from_before() -> (
    None
):
    feeding = {"stem": set(), "turned": {"stem"}, "noisy": {"stem"}, "end": {"stem", "turned"}}
    drifts = {"stem": 0.5, "turned": 0.4, "noisy": 0.4, "end": 0.3}
    by_signs = {"stem": 0.4, "turned": 0.83, "noisy": 0.19, "end": 0.25}
    assert signs_onsets(by_signs, drifts, feeding) == {
        "stem": 0.0,  # the photographs may have turned its means
        "turned": pytest.approx(math.log((0.83 + ONSET_FLOOR) / (0.4 + ONSET_FLOOR))),
        "noisy": 0.0,
        "end": pytest.approx(math.log((0.25 + ONSET_FLOOR) / (0.83 + ONSET_FLOOR))),
    }


def test_a_dead_channel_has_a_finite_drift() -> None:
    sums = ChannelSums.empty(2, torch.device("cpu"))
    sums.add(torch.zeros(3, 2, 4, 4))
    norm = BatchNorm(mean=torch.zeros(2), variance=torch.tensor([1.0, 0.0]), eps=1e-5)
    expected = 0.5 * (1e-5 / (1 + 1e-5) - 1 - math.log(1e-5 / (1 + 1e-5))) / 2  # by hand
    assert drift(sums, norm) == pytest.approx(expected, rel=1e-5)


def test_channels_that_were_silent_in_training_are_not_counted() -> None:
    sums = ChannelSums.empty(4, torch.device("cpu"))
    activations = outputs()
    activations[:, 1:3] = 2.0
    sums.add(activations)
    assert silent_channels(sums) == 0.5
    for variance, share in (([4.0, 1.0, 9.0, 4.0], 0.5), ([4.0, 0.0, 9.0, 4.0], 0.25)):
        norm = BatchNorm(mean=torch.zeros(4), variance=torch.tensor(variance), eps=1e-5)
        assert silent_channels(sums, norm) == share
    norm = BatchNorm(mean=torch.zeros(4), variance=torch.tensor([0.0, 0, 0, 1]), eps=1e-5)
    assert silent_channels(sums, norm) == 0  # one that has come alive is not silent


@pytest.mark.parametrize("when", ["in training", "after it"])
def test_evidence_counts_channels_that_fell_silent_after_training(when: str) -> None:
    module, images, labels = chain()
    with torch.no_grad():
        module[6].weight[:2] = 0
        if when == "in training":
            module[7].running_var[:2] = 0
            module[7].running_mean[:2] = module[6].bias[:2]
    program = Program.capture(module, (12, 12))
    evidence = gather_evidence(program, [(images, labels)], list(program.layers), seed=0)
    silent = {scores.layer.name: scores.silent_channels for scores in evidence}
    assert silent["6"] == (0.25 if when == "after it" else 0)
    assert silent["3"] == silent["9"] == 0


def test_onsets_compare_with_what_feeds_a_layer_and_with_nothing_else() -> None:
    drifts = {"stem": 0.01, "left": 0.97, "right": 0.05, "end": 0.97}
    feeding = {"stem": set(), "left": {"stem"}, "right": {"stem"}, "end": {"stem", "left", "right"}}
    found = onsets(drifts, feeding)
    assert found["left"] == pytest.approx(math.log(1.0 / 0.04))
    assert found["right"] == pytest.approx(math.log(0.08 / 0.04))  # its sibling does not count
    assert found["end"] == pytest.approx(0)
    assert found["stem"] == pytest.approx(math.log((0.01 + ONSET_FLOOR) / ONSET_FLOOR))


def test_a_layer_is_fed_by_all_that_reach_it_and_normalized_by_what_takes_its_output() -> None:
    module = network("residual")
    program = Program.capture(module, SIZE)
    names = [layer.name for layer in program.layers]
    assert program.feeding(names[0]) == frozenset()
    assert program.feeding(names[-1]) == frozenset(names[:-1])
    norms = [norm for name in names if (norm := program.batch_norm_after(name)) is not None]
    modules = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == len(modules) > 0
    for norm, part in zip(norms, modules, strict=True):
        torch.testing.assert_close(norm.mean, part.running_mean)
        torch.testing.assert_close(norm.variance, part.running_var)
        assert norm.eps == part.eps
    assert program.batch_norm_after(names[-1]) is None  # the linear layer


def test_siblings_do_not_feed_each_other() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            stem = self.stem(images)
            return self.head((self.left(stem) + self.right(stem)).mean(dim=(2, 3)))

    program = Program.capture(Branches(), (8, 8))
    assert program.feeding("right") == {"stem"}
    assert program.feeding("head") == {"stem", "left", "right"}


def chain() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Six convolutions with batch norm whose statistics are those of the images."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for depth in range(6):
        parts += [nn.Conv2d(8 if depth else 3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    module = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    images = torch.randn(256, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(200):  # the running statistics converge to those of these images
            module.train()(images[torch.randint(256, (64,))])
    return module.eval(), images[:96], torch.arange(96) % 3


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_drift_sets_in_where_a_layer_was_changed(depth: int) -> None:
    module, images, labels = chain()
    healthy = Program.capture(module, (12, 12))
    name = str(3 * depth)
    weight = healthy.state[f"{name}.weight"]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(depth))
    faulty = healthy.with_state({f"{name}.weight": weight + 2 * weight.std() * noise})
    for program, expected in ((healthy, None), (faulty, name)):
        batches = list(zip(images.split(32), labels.split(32), strict=True))
        evidence = gather_evidence(program, batches, list(program.layers), seed=0)
        origin = drift_origin(evidence)
        assert (origin and origin.layer.name) == expected
        one = gather_evidence(program, batches, [program.layer(name)], seed=0)
        full = {scores.layer.name: scores for scores in evidence}[name]
        assert one[0].drift_onset == full.drift_onset  # whichever layers are scored
        if expected:
            assert full.drift_onset > ONSET_THRESHOLD


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("damage", ["signs", "noise", "none"])
def test_signs_that_were_changed_are_told_from_other_damage(depth: int, damage: str) -> None:
    module, images, labels = chain()
    healthy = Program.capture(module, (12, 12))
    name = str(3 * depth)
    changed = {f"{name}.{of}": healthy.state[f"{name}.{of}"].clone() for of in ("weight", "bias")}
    if damage == "signs":
        for value in changed.values():
            value[:3] = -value[:3]
    elif damage == "noise":
        weight = changed[f"{name}.weight"]
        draw = torch.Generator().manual_seed(depth)
        weight += 2 * weight.std() * torch.randn(weight.shape, generator=draw)
    faulty = healthy.with_state(changed)
    found = gather_evidence(faulty, [(images, labels)], list(faulty.layers), seed=0)
    told = {one.layer.name for one in found if one.signs_onset >= SIGNS_THRESHOLD}
    assert told == ({name} if damage == "signs" else set())


def test_images_unlike_those_of_training_blame_no_layer() -> None:
    module, images, labels = chain()
    program = Program.capture(module, (12, 12))
    batches = [(3 * images + 2, labels)]
    evidence = gather_evidence(program, batches, list(program.layers), seed=0)
    assert evidence[0].first_in_line
    assert evidence[0].drift_onset > ONSET_THRESHOLD  # the images' own doing
    assert drift_origin(evidence) is None
    assert not any(one.signs_onset >= SIGNS_THRESHOLD for one in evidence)


def test_without_batch_norm_there_is_no_drift() -> None:
    program = Program.capture(
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 2)), (8, 8)
    )
    evidence = gather_evidence(
        program,
        [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))],
        list(program.layers),
        seed=0,
    )
    assert all(math.isnan(x.drift) and math.isnan(x.drift_onset) for x in evidence)
    assert all(math.isnan(x.drift_by_signs) and math.isnan(x.signs_onset) for x in evidence)
    assert drift_origin(evidence) is None
