"""Where maps may lie: objects' masks, an error group's region, and repairs that are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from audit.errors import RunError, UsageError
from audit.images import ImageFolder
from audit.networks import Network
from audit.regions import REGIONS
from audit.report import material_sentences
from audit.runs import Run
from repair.config import RepairConfig
from repair.defaults import MASK_DONORS, settle
from repair.guidance import find_guidance, object_masks_at, outside_cells
from repair.layer import RepairRequest, repair_layer
from repair.material import CHANGED
from repair.sources import open_scanned_network

from .conftest import DAMAGED, SIDE

MakeRun = Callable[..., Run]
CONFIG = RepairConfig(epochs=2, learning_rate=0.02, controls=("ce",))
CORNER = {
    "id": "group-2",
    "region": "the upper left corner",
    "cells": [[0.0, 0.0, 1 / 3, 1 / 3]],
    "paths": [],
    "examples": [],
}
CONFUSION = {"id": "group-1", "region": None, "cells": [], "paths": [], "examples": []}


@pytest.fixture
def masks(tmp_path: Path, folder: ImageFolder) -> Path:
    """Masks of the left half for all images but every fourth."""
    root = tmp_path / "masks"
    for number, record in enumerate(folder.records):
        if number % 4:
            path = root / record.path
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
            pixels[:, : SIDE // 2] = 255
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def grouped(make_run: MakeRun) -> Run:
    run = make_run()
    run.write_groups({"groups": [CONFUSION, CORNER]}, {}, [])
    return run


@pytest.mark.parametrize("size", [(3, 3), (7, 5), (24, 24), (1, 1)])
def test_what_lies_outside_a_region_is_what_its_area_leaves(size: tuple[int, int]) -> None:
    for region in REGIONS:
        outside = outside_cells(region.cell_boxes, size)
        assert outside.shape == size
        assert float(outside.mean()) == pytest.approx(1 - region.area, abs=2e-3)


def test_the_corner_of_a_three_by_three_map_is_one_place() -> None:
    outside = outside_cells(CORNER["cells"], (3, 3))
    expected = torch.ones(3, 3)
    expected[0, 0] = 0
    assert torch.equal(outside, expected)


def test_masks_are_read_at_the_size_of_the_maps(
    network: Network, folder: ImageFolder, masks: Path
) -> None:
    wanted = folder.positions("train")
    found = object_masks_at(folder, wanted, masks, network.card.preprocessing, (6, 6))
    every = found.at(torch.arange(len(folder.records)))
    assert every.shape == (len(folder.records), 6, 6)
    for position in range(len(folder.records)):
        if position in wanted and position % 4:
            assert every[position, :, :3].eq(1).all() and every[position, :, 3:].eq(0).all()
        else:
            assert every[position].isnan().all()


def test_guidance_comes_from_what_is_named_else_from_the_scan(
    network: Network, folder: ImageFolder, grouped: Run, masks: Path
) -> None:
    train = folder.positions("train")
    given = (folder, train, network.card.preprocessing, (6, 6))
    by_masks = find_guidance(grouped, *given, masks=masks)
    assert by_masks.source == "masks"
    assert by_masks.images == sum(position % 4 > 0 for position in train)
    assert f"{by_masks.images} of {len(train)}" in by_masks.sentence
    by_group = find_guidance(grouped, *given, group="group-2")
    assert torch.equal(by_group.masks.one(train[0]), outside_cells(CORNER["cells"], (6, 6)))
    assert by_group.images == len(train) and CORNER["region"] in by_group.sentence
    assert by_group.masks.one(folder.positions("test")[0]).isnan().all()
    assert find_guidance(grouped, *given).source == "group-2"  # the first that has a region
    grouped.write_info(cases={"masks": {"path": str(masks)}})
    assert find_guidance(grouped, *given).source == "masks"


def test_what_cannot_guide_is_said(
    network: Network, folder: ImageFolder, grouped: Run, masks: Path, make_run: MakeRun
) -> None:
    given = (folder, folder.positions("train"), network.card.preprocessing, (6, 6))
    with pytest.raises(UsageError, match="exclude each other"):
        find_guidance(grouped, *given, masks=masks, group="group-2")
    with pytest.raises(UsageError, match="no error group 'group-9'; it has group-1, group-2"):
        find_guidance(grouped, *given, group="group-9")
    with pytest.raises(UsageError, match="group-1 has no region"):
        find_guidance(grouped, *given, group="group-1")
    grouped.write_groups({"groups": []}, {}, [])
    with pytest.raises(RunError, match="--masks DIR"):
        find_guidance(grouped, *given)


@pytest.mark.parametrize("loss", ["energy", "rrr", "trust-masks"])
def test_a_repair_is_guided_by_a_group_and_changes_the_layer_alone(grouped: Run, loss: str) -> None:
    repaired = repair_layer(grouped, replace(CONFIG, loss=loss), RepairRequest())
    info = repaired.info
    assert info["guidance"]["source"] == "group-2"
    assert info["frozen"]["identical"] == info["frozen"]["tensors"]
    assert {name.rsplit(".", 1)[0] for name in info["frozen"]["changed"]} == {DAMAGED}
    rows = repaired.history
    charged = rows[(rows["role"] == "repair") & (rows["epoch"] > 0)]["saliency_mean"]
    assert charged.between(0, 1).all() and charged.gt(0).all()


def test_where_there_are_masks_several_images_lend_each_its_background(
    grouped: Run, masks: Path
) -> None:
    layer = open_scanned_network(grouped).layer(DAMAGED)
    choose = frozenset({"loss", "counterfactuals", "donors", "distill", "temperature"})
    settled, _ = settle(grouped, layer, CONFIG, choose, masks=masks)
    assert (settled.loss, settled.counterfactuals, settled.temperature) == ("ce", True, "auto")
    stated, _ = settle(grouped, layer, CONFIG, choose - {"temperature"}, masks=masks)
    assert stated.temperature == 1
    assert settled.donors == MASK_DONORS > 1
    kept = replace(CONFIG, donors=3)
    assert settle(grouped, layer, kept, choose - {"donors"}, masks=masks)[0].donors == 3
    by_region, _ = settle(grouped, layer, CONFIG, choose, group="group-2")
    assert (by_region.loss, by_region.counterfactuals, by_region.donors) == ("energy", True, 1)
    assert by_region.temperature == 1
    request = RepairRequest(choose=choose, masks=masks)
    config = replace(CONFIG, epochs=MASK_DONORS + 1, controls=("originals",))
    repaired = repair_layer(grouped, config, request)
    info = repaired.info
    assert info["config"]["donors"] == MASK_DONORS
    assert set(info["cache"]["splits"]) == {
        *("train", "val", "test", CHANGED),
        *(f"train-{number}" for number in range(2, MASK_DONORS + 1)),
    }
    assert info["frozen"]["identical"] == info["frozen"]["tensors"]
    assert f"taken from {MASK_DONORS} others each, in turn" in " ".join(material_sentences(info))


def test_input_gradients_repair_a_layer_without_maps(grouped: Run) -> None:
    config = replace(CONFIG, loss="rrr", saliency="gradients", controls=("ce", "next-layer"))
    info = repair_layer(grouped, config, RepairRequest(layer="predictions")).info
    assert info["frozen"]["identical"] == info["frozen"]["tensors"]
    assert {name.rsplit(".", 1)[0] for name in info["frozen"]["changed"]} <= {"predictions"}
    assert info["penalty"]["earned"] is not None


def test_a_repair_by_guided_grad_cam_changes_the_layer_alone(grouped: Run) -> None:
    config = replace(CONFIG, saliency="guided-gradcam", epochs=1, controls=("ce", "shuffled"))
    info = repair_layer(grouped, config, RepairRequest()).info
    assert info["frozen"]["identical"] == info["frozen"]["tensors"]
    assert {name.rsplit(".", 1)[0] for name in info["frozen"]["changed"]} == {DAMAGED}


def test_a_repair_without_guidance_is_refused_before_a_folder_is_made(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(RunError, match="must know where a map may lie"):
        repair_layer(run, replace(CONFIG, loss="energy"), RepairRequest())
    assert run.repairs == []


def test_every_seed_is_told_and_all_of_them_decide(make_run: MakeRun) -> None:
    run = make_run()
    config = replace(CONFIG, seeds=3, controls=("ce", "shuffled"))
    repaired = repair_layer(run, config, RepairRequest())
    seeds = repaired.info["seeds"]
    assert seeds["seeds"] == [0, 1, 2]
    rows = {(row["name"], row["seed"]): row for row in seeds["rows"]}
    assert set(rows) == {(n, s) for n in ("repair", "ce", "shuffled") for s in range(3)}
    for seed in (1, 2):
        alone = repair_layer(run, replace(CONFIG, seed=seed), RepairRequest()).info
        assert rows["repair", seed]["accuracy"] == alone["after"]["accuracy"]["value"]
        assert rows["repair", seed]["cross_entropy"] == alone["after"]["cross_entropy"]["value"]
        control = alone["controls"][0]["after"]["accuracy"]["value"]
        assert rows["ce", seed]["accuracy"] == control
    for pooled in seeds["pooled"]:
        ours = np.mean([rows["repair", s]["accuracy"] for s in range(3)])
        theirs = np.mean([rows[pooled["name"], s]["accuracy"] for s in range(3)])
        assert pooled["difference"]["value"] == pytest.approx(ours - theirs)
        assert pooled["beaten"] == (pooled["p_value"] < 0.05 and ours > theirs)
    first = repaired.info["penalty"]["sentences"][0]
    assert first.startswith("Over 3 seeds: the penalty ")
    assert repaired.info["penalty"]["sentence"] == first


def test_what_is_logged_is_the_history(make_run: MakeRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    repaired = repair_layer(make_run(), CONFIG, RepairRequest(tensorboard=True))
    for role in ("repair", "ce"):
        log = EventAccumulator(str(repaired.path / "tensorboard" / role))
        log.Reload()
        rows = repaired.history
        rows = rows[(rows["role"] == role) & (rows["epoch"] > 0)]
        for name in ("loss", "val_ce", "val_accuracy"):
            logged = [(event.step, event.value) for event in log.Scalars(name)]
            assert [step for step, _ in logged] == list(rows["epoch"])
            assert [value for _, value in logged] == pytest.approx(list(rows[name]), rel=1e-5)
