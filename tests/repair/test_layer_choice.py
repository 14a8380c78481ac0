"""The layer that `auto` asks for: the one whose short repair does most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit.errors import RunError
from audit.images import ImageFolder
from audit.report import material_sentences
from audit.runs import Run
from repair.config import RepairConfig
from repair.defaults import MASK_DONORS
from repair.layer import RepairRequest, repair_layer
from repair.layer_choice import MOST_CANDIDATES, best_layer, layer_candidates
from repair.summary import repair_summary

from .conftest import DAMAGED, SIDE
from .test_rates import console_text

MakeRun = Callable[..., Run]
NAMED = ("block1_conv1", DAMAGED, "predictions")
CONFIG = RepairConfig(epochs=3, learning_rate="auto", controls=())
ALL = frozenset({"loss", "counterfactuals", "donors", "distill", "temperature"})


@pytest.fixture
def masks(tmp_path: Path, folder: ImageFolder) -> Path:
    """The left half of every image may be looked at."""
    root = tmp_path / "masks"
    for record in folder.records:
        path = (root / record.path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((SIDE, SIDE), np.uint8)
        pixels[:, : SIDE // 2] = 255
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def spread(make_run: MakeRun) -> MakeRun:
    def make() -> Run:
        run = make_run("spread")
        run.write_verdict({"verdict": "spread", "layers": list(NAMED), "flagged": "predictions"})
        return run

    return make


def test_layers_are_tried_as_repairs_of_them_begin(spread: MakeRun, masks: Path) -> None:
    request = RepairRequest(layer="auto", masks=masks, choose=ALL)
    repaired = repair_layer(spread(), CONFIG, request)
    tried = repaired.info["layers_tried"]
    assert list(tried) == list(NAMED)
    assert repaired.layer == min(tried, key=tried.__getitem__)
    assert repaired.info["config"]["donors"] == MASK_DONORS
    for name, reached in tried.items():
        request = RepairRequest(layer=name, masks=masks, choose=ALL)
        by_name = repair_layer(spread(), CONFIG, request)
        assert min(by_name.info["rates"]["repair"]["val_ce"].values()) == pytest.approx(
            reached, rel=1e-6
        )
        assert "layers_tried" not in by_name.info
    told = "best of 3 by short repairs"
    assert told in console_text(repair_summary(repaired))
    assert told not in console_text(repair_summary(by_name))
    assert "Of 3 layers that the scan blames" in material_sentences(repaired.info)[0]
    assert not [s for s in material_sentences(by_name.info) if "blames" in s]


def test_unless_asked_the_flagged_layer_is_repaired(spread: MakeRun, masks: Path) -> None:
    repaired = repair_layer(spread(), CONFIG, RepairRequest(masks=masks, choose=ALL))
    assert repaired.layer == "predictions" and "layers_tried" not in repaired.info


def test_the_choice_can_be_asked_for_where_the_scan_names_no_layer(make_run: MakeRun) -> None:
    run = make_run("none")
    with pytest.raises(RunError, match="--name auto"):
        repair_layer(run, CONFIG, RepairRequest(choose=ALL))
    run.write_layers({"name": list(NAMED), "rank": [2, 1, 3], "blame": [0.1, 0.7, None]})
    repaired = repair_layer(run, CONFIG, RepairRequest(layer="auto", choose=ALL))
    assert list(repaired.info["layers_tried"]) == [DAMAGED, "block1_conv1"]
    assert repaired.layer == DAMAGED  # noise was added to it


def test_an_unfinished_repair_of_a_chosen_layer_goes_on_with_it(spread: MakeRun) -> None:
    run = spread()
    first = repair_layer(run, CONFIG, RepairRequest(layer="auto", choose=ALL))
    first.write_info(status="failed")
    again = repair_layer(run, CONFIG, RepairRequest(layer="auto", resume=True))
    assert again.name == first.name and again.layer == first.layer
    assert again.info["layers_tried"] == first.info["layers_tried"]


def test_candidates_are_the_named_layers_else_the_most_blamed(make_run: MakeRun) -> None:
    run = make_run("localized")
    names = [f"layer{number}" for number in range(MOST_CANDIDATES + 4)]
    blame = [0.01 * number for number in range(len(names))]
    run.write_layers({"name": names, "rank": range(1, len(names) + 1), "blame": blame})
    assert layer_candidates(run) == names[:3:-1]
    run.write_verdict({"verdict": "spread", "layers": names, "flagged": names[0]})
    assert layer_candidates(run) == names[:MOST_CANDIDATES]
    assert best_layer({"a": 0.3, "b": 0.2, "c": 0.2}) == "b"
