"""How often a network is right without the masked objects, and what a repair makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from audit.images import ImageFolder
from audit.networks import Network
from audit.runs import Run
from repair.config import RepairConfig
from repair.defaults import settle
from repair.layer import RepairRequest, repair_layer
from repair.sources import open_scanned_network
from repair.surroundings import ASKED, FEWEST, share_right_without_objects

from .conftest import DAMAGED, SIDE

MakeRun = Callable[..., Run]
CONFIG = RepairConfig(epochs=2, learning_rate=0.02, controls=())
AUTO = frozenset({"loss", "counterfactuals", "distill"})


def write_masks(root: Path, folder: ImageFolder, positions: Sequence[int], *, seed: int) -> Path:
    """Boxes anywhere, a quarter of the image wide."""
    generator = np.random.default_rng(seed)
    for position in positions:
        mask = np.zeros((SIDE, SIDE), np.uint8)
        left, top = generator.integers(0, SIDE - 6, size=2)
        mask[top : top + 6, left : left + 6] = 255
        path = root / Path(folder.records[position].path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return root


def by_hand(network: Network, folder: ImageFolder, positions: Sequence[int], masks: Path) -> float:
    """One image at a time, in double precision."""
    right = []
    for position in positions:
        record = folder.records[position]
        pixels = np.asarray(Image.open(folder.root / record.path)).astype(np.float64)
        mask = np.asarray(Image.open(masks / record.path)) > 0
        pixels[mask] = pixels[~mask].mean(axis=0)
        image = torch.from_numpy(pixels.round().astype(np.uint8)).permute(2, 0, 1)[None]
        with torch.no_grad():
            said = int(network.program.logits(network.normalize(image)).argmax())
        right.append(said == record.label)
    return float(np.mean(right))


def test_it_is_asked_of_each_image_with_its_object_in_the_mean_color_of_the_rest(
    network: Network, folder: ImageFolder, tmp_path: Path
) -> None:
    everything = list(range(len(folder.records)))
    assert len(everything) < ASKED
    masks = write_masks(tmp_path / "masks", folder, everything, seed=0)
    expected = by_hand(network, folder, everything, masks)
    assert 0.1 < expected < 0.9
    assert share_right_without_objects(network, folder, everything, masks) == expected
    some = everything[::3]
    assert share_right_without_objects(network, folder, some, masks, batch_size=7) == by_hand(
        network, folder, some, masks
    )


def test_images_without_a_mask_are_not_asked_and_too_few_say_nothing(
    network: Network, folder: ImageFolder, tmp_path: Path
) -> None:
    everything = list(range(len(folder.records)))
    chosen = everything[:: len(everything) // FEWEST][:FEWEST]
    masks = write_masks(tmp_path / "masks", folder, chosen, seed=1)
    found = share_right_without_objects(network, folder, everything, masks)
    assert found == by_hand(network, folder, chosen, masks)
    assert share_right_without_objects(network, folder, everything[1:], masks) is None


@pytest.mark.parametrize(
    ("right", "made"), [(None, True), (0.95, True), (0.67, True), (0.66, False), (0.5, False)]
)
def test_images_whose_surroundings_are_wrong_often_enough_are_learned_from_as_they_are(
    make_run: MakeRun, tmp_path: Path, right: float | None, made: bool
) -> None:
    run, asked = make_run(), []

    def around(masks: Path) -> float | None:
        asked.append(masks)
        return right

    layer = open_scanned_network(run).layer(DAMAGED)
    settled, sentence = settle(run, layer, CONFIG, AUTO, masks=tmp_path, around=around)
    assert asked == [tmp_path]
    assert (settled.loss, settled.distill) == ("energy", 0)
    assert settled.counterfactuals is made
    assert sentence is not None and ("counterfactual" in sentence) is made


def test_a_repair_with_masks_goes_by_it(
    make_run: MakeRun,
    network: Network,
    folder: ImageFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = [p for p, record in enumerate(folder.records) if record.split != "test"]
    share, made = {}, {}
    for name, hidden in (("all but a rim", slice(1, -1)), ("a pixel", slice(1))):
        masks = write_masks(tmp_path / name, folder, known, seed=2)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[hidden, hidden] = 255
        for path in masks.rglob("*.png"):
            Image.fromarray(mask).save(path)
        share[name] = by_hand(network, folder, known, masks)
    wrong = {name: 1 - right for name, right in share.items()}
    assert wrong["all but a rim"] < wrong["a pixel"] - 0.05  # the layer is damaged
    monkeypatch.setattr("repair.defaults.ENOUGH_WRONG_AROUND", wrong["a pixel"] - 0.01)
    for name in share:
        request = RepairRequest(masks=tmp_path / name, choose=AUTO)
        config = repair_layer(make_run(), CONFIG, request).info["config"]
        assert config["loss"] == "energy"
        made[name] = config["counterfactuals"]
    assert made == {"all but a rim": True, "a pixel": False}


def test_it_is_not_asked_where_the_user_says_what_to_do(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    layer = open_scanned_network(run).layer(DAMAGED)

    def never(masks: Path) -> float | None:
        raise AssertionError

    stated = replace(CONFIG, loss="energy")
    settled = settle(run, layer, stated, AUTO - {"loss"}, masks=tmp_path, around=never)
    assert settled == (stated, None)
    settled = settle(run, layer, CONFIG, AUTO, around=never)
    assert settled[0].loss == "trust"
