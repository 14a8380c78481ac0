"""Controls: each equals a training that was started by itself, and says so in sentences."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import repair.crossing
import repair.layer
from audit.errors import UsageError
from audit.images import ImageFolder
from audit.networks import Network
from audit.runs import RepairFolder, Run, open_run
from repair.cache import cross_tensors
from repair.config import RepairConfig
from repair.controls import (
    CONTROLS,
    DEFAULT_CONTROLS,
    map_rotation,
    parse_controls,
    plan_controls,
    ranked_layers,
)
from repair.layer import RepairRequest, repair_layer
from repair.training import loss_terms, train_layer

from .conftest import DAMAGED, write_run

MakeRun = Callable[..., Run]
NEXT = "block3_conv2"
CONFIG = RepairConfig(epochs=2, learning_rate=0.02, controls=tuple(CONTROLS))


def rank_layers(run: Run, network: Network) -> Run:
    """Write the table of a scan that blames DAMAGED most, and NEXT after it."""
    blame = {DAMAGED: 0.6, NEXT: 0.3, "block3_conv1": 0.1, "block1_conv1": 0.0, "predictions": 0.0}
    rows = [
        {"index": layer.index, "name": layer.name, "blame": blame[layer.name], "rank": rank}
        for rank, layer in enumerate(
            sorted(network.program.layers, key=lambda one: -blame[one.name]), start=1
        )
    ]
    run.write_layers(rows)
    return run


@pytest.fixture(scope="module")
def controlled(
    tmp_path_factory: pytest.TempPathFactory,
    photos: Path,
    model_file: Path,
    network: Network,
    folder: ImageFolder,
) -> tuple[Run, RepairFolder]:
    """A repair with every control there is."""
    run = write_run(tmp_path_factory.mktemp("runs"), photos, model_file, network, folder)
    rank_layers(run, network)
    return run, repair_layer(run, CONFIG, RepairRequest())


def record(repaired: RepairFolder, name: str) -> dict[str, Any]:
    (found,) = [one for one in repaired.info["controls"] if one["name"] == name]
    return dict(found)


def numbers(repaired: RepairFolder, role: str) -> pd.DataFrame:
    rows = repaired.history[repaired.history["role"] == role]
    return rows.drop(columns=["role", "seconds"]).reset_index(drop=True)


def test_every_control_is_recorded_with_its_layer_and_as_many_steps(
    controlled: tuple[Run, RepairFolder],
) -> None:
    _, repaired = controlled
    found = {one["name"]: one["layer"] for one in repaired.info["controls"]}
    drawn = found.pop("random-layer")
    assert found == {
        "ce": DAMAGED,
        "shuffled": DAMAGED,
        "next-layer": NEXT,
        "last-layer": "predictions",
        "full": "all layers",
        "auto-rgn": "all layers",
    }
    assert drawn in {"block1_conv1", "block3_conv1"}
    steps = {one["steps"] for one in repaired.info["controls"]}
    assert steps == {repaired.info["training"]["steps"]}
    idle = ("originals", "labels", "logits")
    trained = ["repair", *(name for name in CONTROLS if name not in idle)]
    assert Counter(repaired.history["role"]) == dict.fromkeys(trained, 3)
    assert repaired.info["config"]["controls"] == list(CONTROLS)
    assert repaired.info["controls_left_out"] == {}
    assert not list(repaired.path.glob("state-*"))


@pytest.mark.parametrize(
    ("name", "layer", "loss"),
    [
        ("ce", DAMAGED, "ce"),
        ("next-layer", NEXT, "trust"),
        ("random-layer", None, "trust"),
        ("last-layer", "predictions", "ce"),
    ],
)
def test_a_control_is_the_repair_that_its_settings_alone_would_give(
    controlled: tuple[Run, RepairFolder], make_run: MakeRun, name: str, layer: str, loss: str
) -> None:
    _, repaired = controlled
    control = record(repaired, name)
    config = replace(CONFIG, loss=loss, controls=())
    request = RepairRequest(layer=layer or control["layer"])
    alone = repair_layer(make_run(), config, request)
    for part, of_control in (("after", "after"), ("difference", "difference")):
        assert control[of_control] == alone.info[part]
    assert control["best_epoch"] == alone.info["training"]["best_epoch"]
    pd.testing.assert_frame_equal(numbers(repaired, name), numbers(alone, "repair"))
    if name == "ce":
        assert repaired.images["ce_control"].tolist() == alone.images["ce_after"].tolist()
        assert repaired.images["right_control"].tolist() == alone.images["right_after"].tolist()


def test_shuffled_maps_equal_a_slow_loop_over_single_images(
    network: Network, folder: ImageFolder
) -> None:
    """Eq. 7 by hand, one image at a time, with momentum written out."""
    split = network.program.split(DAMAGED)
    crossed = {
        part: cross_tensors(
            network, split, folder, folder.positions(part)[::2], budget_bytes=0, kind="memory"
        )
        for part in ("train", "val")
    }
    config = RepairConfig(epochs=1, learning_rate=0.005, seed=3)
    trained = train_layer(
        split, crossed["train"], crossed["val"], config, loss="trust", shuffled=True
    )
    leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
    speed = {name: torch.zeros_like(value) for name, value in leaves.items()}
    images = len(crossed["train"])
    generator = torch.Generator().manual_seed(3 * 100_003 + 1)
    order = torch.randperm(images, generator=generator).tolist()
    for step, start in enumerate(range(0, images, 32), start=1):
        rows = order[start : start + 32]
        ours = slow_images(split, crossed["train"], rows, leaves)
        moved = map_rotation(len(rows), seed=3, step=step)
        total = torch.zeros(())
        for i, (nats, _) in enumerate(ours):
            lit = ours[(i - moved) % len(rows)][1]
            error = 1 - (-nats).exp()
            total = total + 0.9 * nats + 0.1 * lit + error * (1 - lit) + lit * (1 - error)
        gradients = torch.autograd.grad(total / len(rows), list(leaves.values()))
        with torch.no_grad():
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                speed[name] = 0.9 * speed[name] + gradient
                leaf -= 0.005 * speed[name]
    assert trained.best_epoch == 1
    for name, leaf in leaves.items():
        torch.testing.assert_close(trained.parameters[name], leaf.detach(), rtol=1e-3, atol=1e-5)
    straight = train_layer(split, crossed["train"], crossed["val"], config, loss="trust")
    apart = max(
        float((straight.parameters[n] - v).abs().max()) for n, v in trained.parameters.items()
    )
    assert apart > 1e-3


def slow_images(
    split: Any, crossing: Any, rows: list[int], leaves: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return cross entropy and mean of the normalized Grad-CAM, for each image by itself."""
    found = []
    for row in rows:
        batch = crossing.batch(torch.tensor([row]))
        activations, logits = split.activations_and_logits(batch.crossing, leaves)
        label = int(batch.labels)
        (gradient,) = torch.autograd.grad(logits[0, label], activations, create_graph=True)
        weights = gradient[0].mean(dim=(1, 2))
        cam = sum(weight * plane for weight, plane in zip(weights, activations[0], strict=True))
        cam = torch.clamp(torch.as_tensor(cam), min=0)
        lit = cam.mean() / cam.max() if float(cam.detach().max()) > 0 else cam.mean()
        found.append((torch.logsumexp(logits[0], 0) - logits[0, label], lit))
    return found


def test_a_rotation_moves_every_map_and_repeats_by_seed_and_step() -> None:
    for images in (2, 3, 32):
        drawn = [map_rotation(images, seed=0, step=step) for step in range(200)]
        assert set(drawn) <= set(range(1, images))
        assert drawn == [map_rotation(images, seed=0, step=step) for step in range(200)]
    assert set(drawn) == set(range(1, 32))
    assert drawn != [map_rotation(32, seed=1, step=step) for step in range(200)]
    assert map_rotation(1, seed=0, step=1) == map_rotation(0, seed=0, step=1) == 0


def test_losses_that_see_no_maps_ignore_a_rotation(network: Network, folder: ImageFolder) -> None:
    split = network.program.split(DAMAGED)
    images = cross_tensors(
        network, split, folder, folder.positions("val")[:8], budget_bytes=0, kind="memory"
    ).batch(torch.arange(8))

    def loss(name: str, rotation: int) -> Tensor:
        given = (split, images, split.parameters, CONFIG, name)
        return loss_terms(*given, rotation=rotation).loss

    assert torch.equal(loss("ce", 0), loss("ce", 3))
    leaves = {name: value.requires_grad_() for name, value in split.parameters.items()}
    given = (split, images, leaves, CONFIG, "trust")
    whole, moved = loss_terms(*given), loss_terms(*given, rotation=3)
    assert whole.saliency is not None and moved.saliency is not None
    assert moved.saliency.tolist() == whole.saliency.tolist()[-3:] + whole.saliency.tolist()[:-3]


def test_the_penalty_is_told_in_one_sentence_for_each_control(
    controlled: tuple[Run, RepairFolder],
) -> None:
    _, repaired = controlled
    penalty = repaired.info["penalty"]
    first, *further = penalty["sentences"]
    assert first == penalty["sentence"] and first.startswith("The penalty")
    starts = {
        "shuffled": "True maps ",
        "next-layer": f"Repairing {DAMAGED} ",
        "random-layer": f"Repairing {DAMAGED} ",
        "last-layer": f"Repairing {DAMAGED} ",
        "full": f"Repairing {DAMAGED} ",
        "auto-rgn": f"Repairing {DAMAGED} ",
    }
    accuracy = repaired.info["after"]["accuracy"]["value"]
    assert len(further) == len(starts)
    for sentence, (name, start) in zip(further, starts.items(), strict=True):
        control = record(repaired, name)
        assert sentence.startswith(start), sentence
        if name != "shuffled":
            assert control["layer"] in sentence
        theirs = control["after"]["accuracy"]["value"]
        assert f": {100 * accuracy:.1f} % [" in sentence
        assert f"against {100 * theirs:.1f} % [" in sentence
        change = control["versus_repair"]["cross_entropy"]
        assert f"cross entropy {change['value']:+.3f} [" in sentence
        better = control["versus_repair"]["mcnemar"]
        if better["p_value"] < 0.05:
            won = better["fixed"] > better["broken"]
            assert (" beat " if won else " did worse than ") in sentence


class Killed(BaseException):
    """What a killed process looks like from inside."""


@pytest.mark.parametrize("killed", ["shuffled", "next-layer"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_control_resumes_to_the_same_numbers(
    controlled: tuple[Run, RepairFolder],
    make_run: MakeRun,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    killed: str,
    damaged: bool,
) -> None:
    run = rank_layers(make_run(), network)
    train = repair.layer.train_layer
    config = replace(CONFIG, controls=("shuffled", "next-layer"))

    def killing(*given: Any, role: str, on_epoch: Any, **more: Any) -> Any:
        def kill(row: dict[str, Any]) -> None:
            on_epoch(row)
            if role == killed:
                raise Killed

        return train(*given, role=role, on_epoch=kill, **more)

    with monkeypatch.context() as patch:
        patch.setattr(repair.layer, "train_layer", killing)
        with pytest.raises(Killed):
            repair_layer(run, config, RepairRequest())
    (begun,) = run.repairs
    checkpoint = begun.path / f"state-{killed}.pt"
    assert checkpoint.is_file()
    if damaged:
        checkpoint.write_bytes(b"half a checkp")
    resumed = repair_layer(run, RepairConfig(), RepairRequest(resume=True))
    _, undisturbed = controlled
    assert [one["name"] for one in resumed.info["controls"]] == ["shuffled", "next-layer"]
    for one in resumed.info["controls"]:
        other = record(undisturbed, one["name"])
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
        pd.testing.assert_frame_equal(
            numbers(resumed, one["name"]), numbers(undisturbed, one["name"])
        )


def test_one_layers_prefix_is_held_at_a_time(
    make_run: MakeRun, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, weakref.ref[Any]]] = []
    held: list[set[str]] = []

    def watching(net: Network, split: Any, *given: Any, **more: Any) -> Any:
        gc.collect()
        held.append({name for name, cache in made if cache() is not None} | {split.layer.name})
        cache = cross_tensors(net, split, *given, **more)
        made.append((split.layer.name, weakref.ref(cache)))
        return cache

    monkeypatch.setattr(repair.crossing, "cross_tensors", watching)
    config = replace(CONFIG, epochs=1, controls=("next-layer", "last-layer"))
    repair_layer(rank_layers(make_run(), network), config, RepairRequest())
    assert held == [{DAMAGED}] * 3 + [{NEXT}] * 3 + [{"predictions"}] * 3


def test_a_run_that_ranks_nothing_says_what_was_left_out(make_run: MakeRun) -> None:
    config = replace(CONFIG, epochs=1, controls=("next-layer",))
    info = repair_layer(make_run(), config, RepairRequest()).info
    sentence = (
        "The control next-layer was left out: "
        "the scan ranks no other layer that this loss can train."
    )
    assert info["controls"] == []
    assert info["controls_left_out"] == {"next-layer": sentence}
    assert info["penalty"]["sentences"][-1] == sentence
    assert info["penalty"]["earned"] is None
    assert "was not judged" in info["penalty"]["sentence"]


def plan(
    network: Network, names: tuple[str, ...], *, layer: str = DAMAGED, seed: int = 0, **more: Any
) -> tuple[dict[str, str], dict[str, str]]:
    settings = {"loss": "trust", "needs_maps": True, "ranked": [DAMAGED, "predictions", NEXT]}
    planned, left_out = plan_controls(
        names,
        network.program.layer(layer),
        network.program.layers,
        seed=seed,
        **{**settings, **more},
    )
    return {one.name: one.layer for one in planned}, left_out


def test_other_layers_have_maps_where_the_loss_needs_them(network: Network) -> None:
    where, left_out = plan(network, ("next-layer",))
    assert (where, left_out) == ({"next-layer": NEXT}, {})
    where, _ = plan(network, ("next-layer",), loss="ce", needs_maps=False)
    assert where == {"next-layer": "predictions"}
    where, _ = plan(network, ("next-layer",), layer=NEXT)
    assert where == {"next-layer": DAMAGED}


def test_the_random_layer_is_drawn_by_the_seed_among_the_rest(network: Network) -> None:
    drawn = [plan(network, ("random-layer",), seed=seed)[0]["random-layer"] for seed in range(60)]
    again = [plan(network, ("random-layer",), seed=seed)[0]["random-layer"] for seed in range(60)]
    assert drawn == again
    assert set(drawn) == {"block1_conv1", "block3_conv1"}


def test_controls_that_would_change_nothing_are_passed_over(network: Network) -> None:
    unchanged = ("ce", "shuffled", "originals", "labels")
    where, left_out = plan(network, unchanged, loss="ce", needs_maps=False)
    assert where == left_out == {}
    where, left_out = plan(network, ("ce", "shuffled"), loss="energy", one_mask=True)
    assert list(where) == ["ce"] and "same region is forbidden" in left_out["shuffled"]
    _, left_out = plan(network, ("last-layer",), layer="predictions", loss="ce", needs_maps=False)
    assert left_out == {
        "last-layer": "The control last-layer was left out: it is the repaired one."
    }


def test_layers_are_ranked_by_blame_then_gain_then_rank() -> None:
    nothing = [np.nan] * 3
    table = pd.DataFrame(
        {
            "name": ["a", "b", "c"],
            "blame": [0.1, 0.45, 0.45],
            "trial_gain": [0.3, 0.1, 0.2],
            "trial_gain_low": [0.05, 0.0, 0.1],
            "rank": [2, 3, 1],
        }
    )
    assert ranked_layers(table) == ["c", "b", "a"]
    assert ranked_layers(table.assign(blame=nothing)) == ["a", "c", "b"]
    assert ranked_layers(table.assign(blame=nothing, trial_gain=nothing)) == ["c", "a", "b"]
    assert ranked_layers(table.assign(blame=nothing, trial_gain=nothing, rank=nothing)) == []
    assert ranked_layers(table, but="c") == ["b", "a"]


def test_a_layer_whose_trial_clearly_does_less_is_not_the_next_best() -> None:
    table = pd.DataFrame(
        {
            "name": ["a", "b", "c", "d", "e"],
            "blame": [0.4, 0.3, 0.2, 0.1, 0.0],
            "trial_gain": [0.9, 0.29, 0.31, 0.5, np.nan],  # e was not tried
            "trial_gain_low": [0.8, 0.2, 0.2, 0.3, np.nan],
            "rank": [1, 2, 3, 4, 5],
        }
    )
    assert ranked_layers(table) == ["a", "b", "c", "d", "e"]
    # Of the others d does most, and c reaches into its interval.
    assert ranked_layers(table, but="a") == ["c", "d", "b", "e"]


def test_controls_are_read_from_lists_and_from_older_records() -> None:
    first = ("ce", "shuffled", "originals", "labels", "logits")
    assert (*first, "next-layer", "random-layer") == DEFAULT_CONTROLS
    assert parse_controls("shuffled, ce,ce") == ("ce", "shuffled")
    for text in ("ce,hope", "", "ce,"):
        with pytest.raises(UsageError, match="expected one or more of ce,shuffled,originals"):
            parse_controls(text)
    read = RepairConfig.from_dict
    assert read({"controls": True}).controls == ("ce",)
    assert read({"controls": False}).controls == ()
    for chosen in ((), ("ce",), tuple(CONTROLS)):
        config = RepairConfig(controls=chosen)
        assert read(config.as_dict()) == config


def test_a_resumed_repair_keeps_its_controls(make_run: MakeRun) -> None:
    run = make_run()
    config = RepairConfig(epochs=1, controls=("ce", "shuffled"))
    run.start_repair(DAMAGED, {"alias": "", "config": config.as_dict(), "model": {}})
    stated = RepairRequest(resume=True, stated=frozenset({"controls"}))
    with pytest.raises(UsageError, match="with controls ce,shuffled, not none; leave it out"):
        repair_layer(run, replace(config, controls=()), stated)
    info = repair_layer(run, RepairConfig(), RepairRequest(resume=True)).info
    assert [one["name"] for one in info["controls"]] == ["ce", "shuffled"]
    assert open_run(run.path).repairs[0].status == "complete"
