"""Trial repairs equal a plain training loop, change nothing, and find a layer that was damaged."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit import trials
from audit.checkpoints import Checkpoint, Checkpoints
from audit.networks.program import Program
from audit.trials import (
    CHANNEL_TRIAL,
    TrialConfig,
    TrialRepair,
    error_share_removed,
    planned_steps,
    ranking,
    trial_repairs,
)
from tests.audit.example_networks import NETWORKS, SIZE, images, labels, network
from tests.shapes import DAMAGED, SIDE, damage, trained_network, trial_images

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
    config = TrialConfig(rounds=(1, 4), keep=1.0, step_sizes=(0.05,), batch_size=4)
    before, right_before = plainly_trained(module, _any_layer(module), 0, 0.05)
    for layer, trial in tried(Program.capture(module, SIZE), config).items():
        own = trial.layer.parameter_names
        first, _ = plainly_trained(module, own, 1, 0.05)
        last, right = plainly_trained(module, own, 4, 0.05)
        np.testing.assert_allclose(trial.cross_entropies_before, before, rtol=1e-9)
        np.testing.assert_allclose(trial.cross_entropies_after, last, rtol=1e-7, err_msg=layer)
        assert np.abs(last - before).max() > 1e-3
        assert trial.gain.value == pytest.approx(1 - last.sum() / before.sum(), abs=1e-7)
        gains = [1 - after.sum() / before.sum() for after in (first, last)]
        assert trial.gains == pytest.approx(gains, abs=1e-7)
        assert trial.steps == 4
        broken = (right_before & ~right).sum() / max(right_before.sum(), 1)
        assert trial.broken == pytest.approx(broken)
        assert trial.step_size == 0.05


def _any_layer(module: nn.Module) -> tuple[str, ...]:
    return (next(name for name, _ in module.named_parameters()),)


def test_a_trial_of_one_step_gains_what_its_one_step_gains() -> None:
    module = network("plain", torch.float64)
    config = TrialConfig(rounds=(1,), step_sizes=(0.05,))
    for trial in tried(Program.capture(module, SIZE), config).values():
        assert trial.gains == (trial.gain.value,)
        first, _ = plainly_trained(module, trial.layer.parameter_names, 1, 0.05)
        np.testing.assert_allclose(trial.cross_entropies_after, first, rtol=1e-7)


def test_broken_is_the_share_of_right_images_that_turn_wrong() -> None:
    module = network("plain", torch.float64)
    program = Program.capture(module, SIZE)
    given, targets, held_out, _ = example_images()
    said = program.logits(held_out).argmax(dim=1)
    mixed = torch.where(torch.arange(HELD_OUT) < 10, said, (said + 1) % 5)  # ten right, three wrong
    config = TrialConfig(rounds=(4,), step_sizes=(0.3,))
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
    everything = tried(program, TrialConfig(keep=1.0))
    chosen = [program.layer("fc"), program.layer("stem")]
    told: list[int] = []
    some = trial_repairs(
        program,
        *example_images(),
        chosen,
        TrialConfig(keep=1.0),
        seed=0,
        on_steps=told.append,
    )
    assert [trial.layer.name for trial in some] == ["fc", "stem"]
    assert sorted(told) == [4, 4, 12, 12]
    for trial in some:
        assert trial.gain == everything[trial.layer.name].gain


# -------------------------------------------------------------------- which step size


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
                TrialConfig(rounds=(1, 4), step_sizes=sizes),
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
    ("settings", "said"),
    [
        ({"rounds": ()}, "at least one step"),
        ({"rounds": (0,)}, "at least one step"),
        ({"rounds": (4, 4)}, "at least one step that grow"),
        ({"step_sizes": ()}, "positive step sizes"),
        ({"step_sizes": (0.1, 0.0)}, "positive step sizes"),
        ({"keep": 0.0}, "share to keep"),
        ({"budget_s": 0.0}, "positive number of seconds"),
    ],
    ids=str,
)
def test_a_trial_that_cannot_be_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
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


def gains_of(module: nn.Module) -> dict[str, float]:
    program = Program.capture(module, (SIDE, SIDE))
    trials = trial_repairs(
        program,
        *trial_images(),
        program.layers,
        TrialConfig(keep=1.0),
        seed=0,
    )
    return {trial.layer.name: trial.gain.value for trial in ranking(trials)}


def test_a_damaged_layer_gains_most() -> None:
    module = trained_network()
    damage(module)
    gains = gains_of(module)
    assert next(iter(gains)) == DAMAGED
    assert gains[DAMAGED] > 0.8


def test_negated_channels_are_found_in_the_layer_that_has_them() -> None:
    module = trained_network()
    with torch.no_grad():
        module.get_submodule("block3_conv1").weight[::3] *= -1
    assert next(iter(gains_of(module))) == "block3_conv1"


# -------------------------------------------------------------------- channels


@pytest.mark.parametrize("name", list(NETWORKS))
def test_channel_trials_equal_a_plain_loop_over_factors_and_shifts(name: str) -> None:
    module = network(name, torch.float64)
    config = TrialConfig(kind="channels", rounds=(2, 5), keep=1.0, step_sizes=(0.07,), batch_size=4)
    given, targets, held_out, held_out_targets = example_images()
    program = Program.capture(module, SIZE)
    found = trial_repairs(
        program, given, targets, held_out, held_out_targets, program.layers, config, seed=0
    )
    assert max(abs(trial.gain.value) for trial in found) > 1e-3
    for trial in found:
        start = {
            name: dict(module.named_parameters())[name] for name in trial.layer.parameter_names
        }
        expected = _channels_trained(module, trial.layer.kind, start, (2, 5), 0.07)
        total = trial.cross_entropies_before.sum()
        gains = [1 - after.sum() / total for after in expected]
        assert trial.gains == pytest.approx(gains, abs=1e-7), trial.layer.name
        np.testing.assert_allclose(trial.cross_entropies_after, expected[-1], rtol=1e-6)


def _channels_trained(
    module: nn.Module, kind: str, start: dict[str, Tensor], ends: tuple[int, ...], size: float
) -> list[np.ndarray]:
    """Held-out cross entropies after Adam steps on 1 + factor and shift of each channel."""
    given, targets, held_out, held_out_targets = example_images()
    weight, *others = start  # of a weight norm its magnitude first
    channel = 1 if "transpose" in kind else 0
    channels = start[weight].shape[channel]
    bias = next((n for n in others if start[n].dim() == 1 and n.endswith("bias")), None)
    factor = torch.zeros(channels, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(channels, dtype=torch.float64, requires_grad=True)
    along = [1] * start[weight].dim()
    along[channel] = channels

    def logits(pixels: Tensor) -> Tensor:
        changed = {weight: start[weight].detach() * (1 + factor).reshape(along)}
        if bias is not None:
            value = start[bias].detach()
            unit = value.square().mean().sqrt() or start[weight].detach().square().mean().sqrt()
            changed[bias] = value * (1 + factor) + unit * shift
        return torch.func.functional_call(module, changed, (pixels,))

    optimizer = torch.optim.Adam([factor, shift] if bias is not None else [factor], lr=size)
    found = []
    for step in range(1, max(ends) + 1):
        optimizer.zero_grad()
        F.cross_entropy(logits(given), targets).backward()
        optimizer.step()
        if step in ends:
            with torch.no_grad():
                after = F.cross_entropy(logits(held_out), held_out_targets, reduction="none")
            found.append(after.numpy())
    return found


# -------------------------------------------------------------------- rounds and the budget


def test_only_the_better_half_of_a_round_goes_on_and_takes_the_steps_it_would_have_alone() -> None:
    program = Program.capture(network("residual", torch.float64), SIZE)
    halved = TrialConfig(rounds=(2, 6), keep=0.5, step_sizes=(0.05,))
    whole = tried(program, TrialConfig(rounds=(2, 6), keep=1.0, step_sizes=(0.05,)))
    told: list[int] = []
    found = trial_repairs(
        program, *example_images(), program.layers, halved, seed=0, on_steps=told.append
    )
    first = {name: trial.gains[0] for name, trial in whole.items()}
    expected = sorted(first, key=lambda name: -first[name])[: math.ceil(len(first) / 2)]
    assert {trial.layer.name for trial in found if trial.steps == 6} == set(expected)
    assert 0 < len(expected) < len(first)
    for trial in found:
        alone = whole[trial.layer.name]
        assert trial.gains == pytest.approx(alone.gains[: len(trial.gains)], abs=1e-12)
        assert trial.steps == (6 if trial.layer.name in expected else 2)
    assert sum(told) == planned_steps(len(first), halved)
    assert [trial.steps for trial in ranking(found)][: len(expected)] == [6] * len(expected)


def test_a_favored_layer_stays_in_however_little_it_gains() -> None:
    program = Program.capture(network("residual", torch.float64), SIZE)
    config = TrialConfig(rounds=(2, 6), step_sizes=(0.05,))
    plain = tried(program, config)
    dropped = min(plain.values(), key=lambda trial: (trial.steps, trial.gain.value)).layer.name
    found = trial_repairs(
        program, *example_images(), program.layers, config, seed=0, favored=[dropped]
    )
    (kept,) = (trial for trial in found if trial.layer.name == dropped)
    assert (plain[dropped].steps, kept.steps) == (2, 6)


def test_a_budget_that_is_over_ends_the_trials_but_not_the_one_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("audit.trials.time.perf_counter", lambda: 60.0 * next(clock))
    program = Program.capture(network("residual"), SIZE)
    found = trial_repairs(
        program,
        images(8),
        labels(8),
        images(8),
        labels(8),
        program.layers,
        TrialConfig(budget_s=500.0),  # each look at the clock takes a minute
        seed=0,
    )
    assert 1 <= len(found) < len(program.layers)
    assert {trial.steps for trial in found} == {4}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock by which computing gradients takes a second, and nothing else takes any. The guess
    of what a layer takes, before any is known, is much too high."""
    seconds, gradients = [0.0], trials._gradients

    def slow(*given: Any) -> Any:
        seconds[0] += 1
        return gradients(*given)

    monkeypatch.setattr("audit.trials._gradients", slow)
    monkeypatch.setattr("audit.trials.time.perf_counter", lambda: seconds[0])
    monkeypatch.setattr("audit.trials._first_round_s", lambda *_: 1e9)
    return seconds


BUDGETED = TrialConfig(step_sizes=(0.01,), budget_s=34.0)


def test_layers_enter_in_waves_until_half_of_the_budget_is_spent(clock: list[float]) -> None:
    program = Program.capture(network("residual", torch.float64), SIZE)
    promising = [layer.name for layer in reversed(program.layers)]
    found = trial_repairs(
        program, *example_images(), program.layers, BUDGETED, seed=0, promising=promising
    )
    # Two enter on a guess: a pass for all their first steps, then three steps each, 7 seconds. So
    # the 10 seconds left of 17 let two more in, again 7 seconds, and the last 3 none.
    assert len(promising) > 4
    assert {trial.layer.name for trial in found} == set(promising[:4])
    # Two of four would go on, 12 steps each, but the 20 seconds left are enough for one.
    assert sorted(trial.steps for trial in found) == [4, 4, 4, 16]
    assert clock[0] == 7 + 7 + 12
    whole = tried(program, TrialConfig(step_sizes=(0.01,), keep=1.0))
    for trial in found:
        alone = whole[trial.layer.name]
        assert trial.gains == pytest.approx(alone.gains[: len(trial.gains)], abs=1e-12)


def test_trials_that_are_interrupted_in_a_wave_go_on_in_it(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda *_: True)
    program = Program.capture(network("residual", torch.float64), SIZE)
    given = (program, *example_images(), program.layers, BUDGETED)
    whole = trial_repairs(*given, seed=0)

    class KilledError(Exception):
        pass

    done: list[int] = []

    def stop(steps: int) -> None:
        done.append(steps)
        if len(done) == 4:  # the second of the second wave, whose trial is not kept
            raise KilledError

    clock[0] = 0
    with pytest.raises(KilledError):
        trial_repairs(
            *given, seed=0, on_steps=stop, checkpoint=Checkpoints(tmp_path).step("trials")
        )
    told: list[int] = []
    resumed = trial_repairs(
        *given, seed=0, on_steps=told.append, checkpoint=Checkpoints(tmp_path).step("trials")
    )
    assert told == [4, 12]
    assert [(one.layer.name, one.steps, one.gains) for one in resumed] == [
        (one.layer.name, one.steps, one.gains) for one in whole
    ]


def test_channel_trials_keep_every_layer_to_the_end() -> None:
    program = Program.capture(network("plain"), SIZE)
    found = trial_repairs(
        program,
        images(8),
        labels(8),
        images(8),
        labels(8),
        program.layers,
        CHANNEL_TRIAL,
        seed=0,
    )
    assert {(trial.steps, len(trial.gains)) for trial in found} == {(24, 3)}
