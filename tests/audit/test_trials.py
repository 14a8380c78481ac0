"""Trial repairs equal a plain training loop, change nothing, and find a layer that was damaged."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.networks.program import Program
from audit.trials import (
    TrialConfig,
    TrialRepair,
    _assess,
    _Judged,
    error_share_removed,
    trial_repairs,
)
from audit.verdict import Verdict, judge
from tests.audit.example_networks import NETWORKS, SIZE, images, labels, network
from tests.shapes import DAMAGED, SIDE, damage, draw, normalized, trained_network

LEARNING, HELD_OUT = 9, 13


def example_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, targets = images(LEARNING + HELD_OUT, torch.float64), labels(LEARNING + HELD_OUT)
    return given[:LEARNING], targets[:LEARNING], given[LEARNING:], targets[LEARNING:]


def tried(program: Program, config: TrialConfig, *, seed: int = 0) -> dict[str, TrialRepair]:
    found = trial_repairs(program, *example_images(), program.layers, config, seed=seed)
    assert [trial.layer for trial in found] == list(program.layers)
    return {trial.layer.name: trial for trial in found}


def plainly_trained(
    module: nn.Module, parameter_names: tuple[str, ...], steps: int, size: float
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out cross entropies and correctness after training those parameters of a copy."""
    trained = copy.deepcopy(module)
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(name in parameter_names)
    learned = dict(trained.named_parameters())
    scale = float(learned[parameter_names[0]].detach().square().mean().sqrt())
    optimizer = torch.optim.Adam([learned[name] for name in parameter_names], lr=size * scale)
    given, targets, held_out, held_out_targets = example_images()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(trained(given), targets).backward()
        optimizer.step()
    with torch.no_grad():
        logits = trained(held_out)
    entropies = F.cross_entropy(logits, held_out_targets, reduction="none")
    return entropies.numpy(), (logits.argmax(dim=1) == held_out_targets).numpy()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_trials_equal_a_plain_training_loop_of_that_layer_alone(name: str) -> None:
    module = network(name, torch.float64)
    # Batches smaller than the image set: the steps use all images whatever the batch.
    config = TrialConfig(steps=4, step_sizes=(0.05,), batch_size=4)
    before, right_before = plainly_trained(module, _any_layer(module), 0, 0.05)
    for layer, trial in tried(Program.capture(module, SIZE), config).items():
        own = trial.layer.parameter_names
        first, _ = plainly_trained(module, own, 1, 0.05)
        last, right = plainly_trained(module, own, 4, 0.05)
        np.testing.assert_allclose(trial.cross_entropies_before, before, rtol=1e-9)
        np.testing.assert_allclose(trial.cross_entropies_after, last, rtol=1e-7, err_msg=layer)
        assert np.abs(last - before).max() > 1e-3
        assert trial.gain.value == pytest.approx(1 - last.sum() / before.sum(), abs=1e-7)
        assert trial.gain_one_step.value == pytest.approx(1 - first.sum() / before.sum(), abs=1e-7)
        broken = (right_before & ~right).sum() / max(right_before.sum(), 1)
        assert trial.broken == pytest.approx(broken)
        assert trial.step_size == 0.05


def _any_layer(module: nn.Module) -> tuple[str, ...]:
    return (next(name for name, _ in module.named_parameters()),)


def test_a_trial_of_one_step_gains_what_its_one_step_gains() -> None:
    module = network("plain", torch.float64)
    config = TrialConfig(steps=1, step_sizes=(0.05,))
    for trial in tried(Program.capture(module, SIZE), config).values():
        assert trial.gain == trial.gain_one_step
        first, _ = plainly_trained(module, trial.layer.parameter_names, 1, 0.05)
        np.testing.assert_allclose(trial.cross_entropies_after, first, rtol=1e-7)


def test_broken_is_the_share_of_right_images_that_turn_wrong() -> None:
    module = network("plain", torch.float64)
    program = Program.capture(module, SIZE)
    given, targets, held_out, _ = example_images()
    said = program.logits(held_out).argmax(dim=1)
    mixed = torch.where(torch.arange(HELD_OUT) < 10, said, (said + 1) % 5)  # ten right, three wrong
    config = TrialConfig(steps=4, step_sizes=(0.3,))
    (trial,) = trial_repairs(
        program, given, targets, held_out, mixed, [program.layer("conv2")], config, seed=0
    )
    trained = copy.deepcopy(module)
    trained.requires_grad_(False)
    trained.conv2.requires_grad_(True)
    scale = float(trained.conv2.weight.detach().square().mean().sqrt())
    optimizer = torch.optim.Adam(trained.conv2.parameters(), lr=0.3 * scale)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(trained(given), targets).backward()
        optimizer.step()
    after = trained(held_out).argmax(dim=1)
    broken = sum(int(after[i] != mixed[i]) for i in range(10))
    assert broken > 0
    assert trial.broken == pytest.approx(broken / 10)


def test_the_program_is_the_same_to_the_bit_afterwards() -> None:
    program = Program.capture(network("residual"), SIZE)
    before = {name: value.clone() for name, value in program.state.items()}
    given, targets = images(8), labels(8)
    logits = program.logits(given)
    trial_repairs(program, given, targets, given, targets, program.layers, TrialConfig(), seed=0)
    assert set(program.state) == set(before)
    assert all(torch.equal(program.state[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in program.state.values())
    assert torch.equal(program.logits(given), logits)


def test_trials_of_some_layers_in_any_order_are_those_of_all() -> None:
    program = Program.capture(network("residual", torch.float64), SIZE)
    everything = tried(program, TrialConfig())
    chosen = [program.layer("fc"), program.layer("stem")]
    told: list[str] = []
    some = trial_repairs(
        program,
        *example_images(),
        chosen,
        TrialConfig(),
        seed=0,
        on_layer=lambda layer: told.append(layer.name),
    )
    assert [trial.layer.name for trial in some] == ["fc", "stem"]
    assert sorted(told) == ["fc", "stem"]
    for trial in some:
        assert trial.gain == everything[trial.layer.name].gain


# -------------------------------------------------------------------- which step size


class _ConstructedTrial:
    """Stands in for a layer's trial; its outcome for each step size is given."""

    def __init__(self, layer: object, first: dict[float, list[float]]) -> None:
        self.layer = layer
        self.config = TrialConfig(steps=2, step_sizes=tuple(first))
        self.first = first

    def first_step(self, size: float) -> _Judged:
        return self._judged(self.first[size])

    def last_step(self, size: float) -> _Judged:
        return self._judged([value / 2 for value in self.first[size]])

    def _judged(self, values: list[float]) -> _Judged:
        found = np.array(values)
        return _Judged(found, found < 1.0)


def test_the_step_size_that_judges_a_half_is_chosen_by_the_other_half() -> None:
    """Each size suits one half. Chosen on the images that judge, both halves would look good."""
    halves = np.array([0, 1, 0, 1])
    first = {0.01: [0.2, 4.0, 0.2, 4.0], 0.1: [4.0, 0.2, 4.0, 0.2]}
    layer = Program.capture(network("plain"), SIZE).layers[0]
    before = _Judged(np.full(4, 2.0), np.array([True, True, False, False]))
    trial = _assess(_ConstructedTrial(layer, first), before, halves, seed=0)  # type: ignore[arg-type]
    np.testing.assert_allclose(trial.cross_entropies_after, [2.0] * 4)
    assert trial.gain_one_step.value == pytest.approx(1 - 16 / 8)
    assert trial.gain.value == pytest.approx(0)
    assert trial.broken == 1  # both images that were right
    assert trial.step_size == 0.01


def test_every_held_out_image_is_judged_by_a_size_that_other_images_chose() -> None:
    module = network("plain", torch.float64)
    program = Program.capture(module, SIZE)
    sizes = (0.02, 0.3)
    mixed = 0
    for name in ("conv1", "conv2", "fc"):
        own = program.layer(name).parameter_names
        first = {size: plainly_trained(module, own, 1, size)[0] for size in sizes}
        last = {size: plainly_trained(module, own, 4, size)[0] for size in sizes}
        for seed in range(4):
            (trial,) = trial_repairs(
                program,
                *example_images(),
                [program.layer(name)],
                TrialConfig(step_sizes=sizes),
                seed=seed,
            )
            used = np.array(
                [
                    min(sizes, key=lambda size: abs(last[size][i] - after))
                    for i, after in enumerate(trial.cross_entropies_after)
                ]
            )
            for i, size in enumerate(used):
                assert trial.cross_entropies_after[i] == pytest.approx(last[size][i], rel=1e-7)
            assert trial.step_size == used.min()
            for half in (used == sizes[0], used == sizes[1]):
                if half.all() or not half.any():
                    continue
                mixed += 1
                chosen = used[half][0]
                other = sizes[1] if chosen == sizes[0] else sizes[0]
                assert first[chosen][~half].sum() <= first[other][~half].sum()
                assert half.sum() in (HELD_OUT // 2, HELD_OUT - HELD_OUT // 2)
    assert mixed > 0, "no trial whose halves chose differently: nothing was tested"


def test_a_single_held_out_image_can_judge() -> None:
    program = Program.capture(network("plain"), SIZE)
    (trial,) = trial_repairs(
        program,
        images(4),
        labels(4),
        images(1),
        labels(1),
        [program.layer("fc")],
        TrialConfig(),
        seed=0,
    )
    assert trial.cross_entropies_after.shape == (1,)
    assert math.isfinite(trial.gain.value)


def test_a_trial_that_overflows_counts_as_harm_and_breaks_every_image() -> None:
    module = network("plain")
    program = Program.capture(module, SIZE)
    given = images(12)
    said = program.logits(given).argmax(dim=1)
    assert (said == 0).any()  # the class that argmax names where everything is NaN
    (trial,) = trial_repairs(
        program,
        given,
        said,
        given,
        said,
        [program.layer("conv2")],
        TrialConfig(step_sizes=(1e38,)),
        seed=0,
    )
    assert np.isfinite(trial.cross_entropies_after).all()
    assert (trial.cross_entropies_after == 1e3).all()
    assert trial.gain.value < -100 and math.isfinite(trial.gain.low)
    assert trial.broken == 1
    (careful,) = trial_repairs(
        program,
        given,
        said,
        given,
        said,
        [program.layer("conv2")],
        TrialConfig(step_sizes=(1e-3, 1e38)),
        seed=0,
    )
    assert careful.step_size == 1e-3 and careful.gain.value > -1


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"step_sizes": ()}, {"step_sizes": (0.1, 0.0)}], ids=str
)
def test_a_trial_without_steps_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least one step and positive step sizes"):
        TrialConfig(**settings)  # type: ignore[arg-type]


# -------------------------------------------------------------------- the share of error removed


def test_the_share_of_error_removed_equals_a_slow_bootstrap() -> None:
    generator = np.random.default_rng(8)
    before = generator.gamma(0.5, 2.0, 60)
    after = before * generator.uniform(0.2, 1.3, 60)
    found = error_share_removed(before, after, seed=0)
    assert found.value == pytest.approx(1 - sum(after) / sum(before))
    drawn = np.random.default_rng(1234)
    shares = []
    for _ in range(4000):
        rows = [int(drawn.integers(60)) for _ in range(60)]
        shares.append(1 - sum(after[i] for i in rows) / sum(before[i] for i in rows))
    low, high = np.quantile(shares, [0.025, 0.975])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.08 * width)
    assert found.high == pytest.approx(high, abs=0.08 * width)


def test_the_share_of_error_removed_is_the_same_for_the_same_seed_and_finite_without_error() -> (
    None
):
    before, after = np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 1.0])
    assert error_share_removed(before, after, seed=3) == error_share_removed(before, after, seed=3)
    nothing = error_share_removed(np.zeros(5), np.zeros(5), seed=0)
    assert math.isfinite(nothing.value) and math.isfinite(nothing.low)


# -------------------------------------------------------------------- a planted fault


def judged(module: nn.Module) -> tuple[Verdict, dict[str, TrialRepair]]:
    program = Program.capture(module, (SIDE, SIDE))
    pixels, targets = draw(22, seed=0)
    held_out, held_out_targets = draw(24, seed=1)
    trials = trial_repairs(
        program,
        normalized(pixels),
        torch.from_numpy(targets),
        normalized(held_out),
        torch.from_numpy(held_out_targets),
        program.layers,
        TrialConfig(),
        seed=0,
    )
    said = program.logits(normalized(held_out)).argmax(dim=1).numpy()
    wrong = int((said != held_out_targets).sum())
    verdict = judge(trials, steps=4, wrong=wrong, images=len(held_out), seed=0)
    return verdict, {trial.layer.name: trial for trial in trials}


def test_a_damaged_layer_gains_most_and_a_healthy_network_is_left_alone() -> None:
    module = trained_network()
    verdict, _ = judged(module)
    assert verdict.verdict == "none"
    damage(module)
    verdict, trials = judged(module)
    assert verdict.verdict == "localized" and verdict.layers == (DAMAGED,)
    gains = {name: trial.gain.value for name, trial in trials.items()}
    assert gains.pop(DAMAGED) > 0.8
    assert max(gains.values()) < 0.7


def test_negated_channels_are_found_in_the_layer_that_has_them() -> None:
    module = trained_network()
    with torch.no_grad():
        module.get_submodule("block3_conv1").weight[::3] *= -1
    verdict, _ = judged(module)
    assert verdict.layers[0] == "block3_conv1"
