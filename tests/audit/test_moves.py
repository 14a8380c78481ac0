"""Channel moves equal a plain search by brute force, change nothing, and find mixed-up channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.checkpoints import Checkpoint, Checkpoints
from audit.moves import ChannelMove, Move, MoveConfig, channel_moves, first_order, moved
from audit.networks.program import Program
from tests.audit.example_networks import NETWORKS, SIZE, images, labels, network
from tests.shapes import SIDE, trained_network, trial_images

LEARNING, HELD_OUT = 9, 13
EVERY = 10_000  # candidates: all that there are


def example_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, targets = images(LEARNING + HELD_OUT, torch.float64), labels(LEARNING + HELD_OUT)
    return given[:LEARNING], targets[:LEARNING], given[LEARNING:], targets[LEARNING:]


def every_move(channels: int) -> Iterator[Move]:
    yield from (Move("sign", one, one) for one in range(channels))
    yield from (Move("exchange", one, other) for one, other in combinations(range(channels), 2))


def after(module: nn.Module, names: tuple[str, ...], move: Move, *, way: float = 1.0) -> nn.Module:
    """A copy whose parameters of these names have gone part of the way to a move."""
    changed = copy.deepcopy(module)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name in names:
            value = parameters[name]
            goal = value.clone()
            if move.kind == "sign":
                goal[move.channel] = -value[move.channel]
            else:
                goal[move.channel], goal[move.other] = value[move.other], value[move.channel]
            value.copy_((1 - way) * value + way * goal)
    return changed


def entropies(module: nn.Module, given: Tensor, targets: Tensor) -> np.ndarray:
    with torch.no_grad():
        return F.cross_entropy(module(given), targets, reduction="none").numpy()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_first_order_is_the_slope_of_the_loss_on_the_way_to_a_move(name: str) -> None:
    module = network(name, torch.float64)
    given, targets, *_ = example_images()
    parameters = dict(module.named_parameters())
    loss = F.cross_entropy(module(given), targets, reduction="sum")
    gradient = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
    )
    for layer in Program.capture(module, SIZE).layers:
        own = {n: parameters[n].detach() for n in layer.parameter_names}
        exchanges, signs = first_order(own, gradient)
        for move in every_move(len(signs)):
            step = 1e-6
            ahead, back = (
                entropies(after(module, layer.parameter_names, move, way=way), given, targets).sum()
                for way in (step, -step)
            )
            slope = (ahead - back) / (2 * step)
            told = (
                signs[move.channel] if move.kind == "sign" else exchanges[move.channel, move.other]
            )
            assert float(told) == pytest.approx(slope, abs=1e-4 * max(1, abs(slope))), move


@pytest.mark.parametrize("name", ["residual", "depthwise", "plain"])
def test_a_move_is_the_one_of_a_search_by_brute_force(name: str) -> None:
    module = network(name, torch.float64)
    given, targets, held_out, held_out_targets = example_images()
    program = Program.capture(module, SIZE)
    config = MoveConfig(candidates=EVERY, batch_size=4)
    found = channel_moves(program, *example_images(), program.layers, config, seed=0)
    before = entropies(module, held_out, held_out_targets)
    nothing = entropies(module, given, targets).sum()
    made = 0
    for one in found:
        names = one.layer.parameter_names
        sums = {
            move: float(entropies(after(module, names, move), given, targets).sum())
            for move in every_move(one.layer.shape[0])
            if (move.kind == "exchange" and one.layer.shape[0] <= 8)
            or slope(module, names, move, given, targets) < -1e-9
        }
        best = min(sums, key=lambda move: sums[move], default=None)
        if best is not None and sums[best] > 0.99 * nothing:
            best = None
        assert one.move == best, one.layer.name
        if best is not None:
            left = entropies(after(module, names, best), held_out, held_out_targets)
            assert one.gain.value == pytest.approx(1 - left.sum() / before.sum(), abs=1e-7)
            made += 1
    assert made > 0


def slope(
    module: nn.Module, names: tuple[str, ...], move: Move, given: Tensor, targets: Tensor
) -> float:
    ahead, back = (
        entropies(after(module, names, move, way=way), given, targets).sum()
        for way in (1e-6, -1e-6)
    )
    return float(ahead - back) / 2e-6


def moves_of(module: nn.Module, config: MoveConfig | None = None) -> list[ChannelMove]:
    """What moves do in the network of the shapes, most gained first."""
    program = Program.capture(module, (SIDE, SIDE))
    found = channel_moves(
        program,
        *trial_images(),
        program.layers,
        config or MoveConfig(),
        seed=0,
    )
    return sorted(found, key=lambda one: one.gain.value, reverse=True)


@pytest.mark.parametrize("move", [Move("exchange", 0, 11), Move("sign", 11, 11)], ids=str)
def test_channels_that_were_moved_are_found_and_moved_back(move: Move) -> None:
    damaged = after(trained_network(), ("block2_conv1.weight", "block2_conv1.bias"), move)
    first, second, *_ = moves_of(damaged)
    assert first.layer.name == "block2_conv1"
    assert first.move == move
    assert 1 - first.gain.value < 0.5 * (1 - second.gain.value)  # error left


def test_in_a_network_as_it_was_trained_no_moves_help_other_images() -> None:
    assert all(one.gain.low <= 0 for one in moves_of(trained_network()))


def test_the_program_is_the_same_to_the_bit_afterwards() -> None:
    program = Program.capture(network("residual"), SIZE)
    before = {name: value.clone() for name, value in program.state.items()}
    given, targets = images(8), labels(8)
    channel_moves(program, given, targets, given, targets, program.layers, MoveConfig(), seed=0)
    assert all(torch.equal(program.state[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in program.state.values())


def test_a_transposed_convolution_is_passed_by() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
            self.conv = nn.Conv2d(4, 6, 3)
            self.fc = nn.Linear(6, 5)

        def forward(self, given: Tensor) -> Tensor:
            hidden = torch.relu(self.conv(torch.relu(self.up(given))))
            logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
            return logits

    torch.manual_seed(0)
    program = Program.capture(Transposed().eval(), SIZE)
    given, targets = images(8), labels(8)
    found = channel_moves(
        program, given, targets, given, targets, program.layers, MoveConfig(), seed=0
    )
    assert {one.layer.name for one in found} <= {"conv", "fc"}


def test_the_sign_of_a_channel_under_weight_norm_changes_with_its_magnitude_alone() -> None:
    plain = network("plain", torch.float64)
    normed = copy.deepcopy(plain)
    nn.utils.parametrizations.weight_norm(normed.conv2)  # type: ignore[arg-type]
    program = Program.capture(normed.eval(), SIZE)
    parameters = program.split("conv2").parameters
    held_out = example_images()[2]
    for move in (Move("sign", 2, 2), Move("exchange", 1, 5)):
        expected = after(plain, ("conv2.weight", "conv2.bias"), move)(held_out)
        found = program.with_state(moved(parameters, move)).logits(held_out)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found, plain(held_out))


def test_a_small_budget_buys_the_most_promising_move_of_the_most_promising_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("audit.moves.time.perf_counter", lambda: 60.0 * next(clock))
    program = Program.capture(network("residual", torch.float64), SIZE)
    # Each look at the clock takes a minute: a move costs ten seconds, half of 61 buys three.
    found = channel_moves(
        program, *example_images(), program.layers, MoveConfig(budget_s=61.0), seed=0
    )
    given, targets, *_ = example_images()
    module = network("residual", torch.float64)
    slopes = sorted(
        min(
            (slope(module, layer.parameter_names, move, given, targets), layer.name)
            for move in every_move(layer.shape[0])
        )
        for layer in program.layers
    )
    assert {one.layer.name for one in found} == {name for _, name in slopes[:3]}
    assert len(slopes) > 3
    assert not any(one.move for one in found)  # the time is over before the first


def test_moves_that_are_interrupted_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda *_: True)
    program = Program.capture(network("residual", torch.float64), SIZE)
    config = MoveConfig(candidates=3)
    whole = channel_moves(program, *example_images(), program.layers, config, seed=0)

    class KilledError(Exception):
        pass

    for layers_done in (1, 3):
        folder = tmp_path / str(layers_done)
        done = 0

        def stop() -> None:
            nonlocal done
            done += 1
            if done > layers_done:  # noqa: B023
                raise KilledError

        def step() -> Checkpoint:
            return Checkpoints(folder).step("moves")  # noqa: B023

        with pytest.raises(KilledError):
            channel_moves(
                program,
                *example_images(),
                program.layers,
                config,
                seed=0,
                on_layer=stop,
                checkpoint=step(),
            )
        told = 0

        def count() -> None:
            nonlocal told
            told += 1

        resumed = channel_moves(
            program,
            *example_images(),
            program.layers,
            config,
            seed=0,
            on_layer=count,
            checkpoint=step(),
        )
        assert resumed == whole
        assert told == len(whole) - layers_done


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidates": 0}, "at least one candidate"),
        ({"budget_s": 0.0}, "positive number of seconds"),
    ],
    ids=str,
)
def test_moves_that_cannot_be_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MoveConfig(**settings)  # type: ignore[arg-type]
