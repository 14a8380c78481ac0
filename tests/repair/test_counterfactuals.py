"""Counterfactual images: whose pixels they have, alike in every cache, and when they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from audit.images import ImageFolder, load_pixels
from audit.images.loading import ImageBatch
from audit.networks import Network
from audit.runs import Run
from repair.cache import DiskSpace, cross_tensors, crossing_bytes
from repair.config import RepairConfig
from repair.counterfactuals import Counterfactuals, draw_donors, without_object
from repair.crossing import Room, cache_line, cross_splits, further_versions
from repair.defaults import settle
from repair.guidance import Guidance, outside_cells, share_right
from repair.image_masks import ImageMasks
from repair.layer import RepairRequest, repair_layer
from repair.material import RepairImages, make_counterfactuals
from repair.sources import open_scanned_network

from .conftest import DAMAGED, SIDE

MakeRun = Callable[..., Run]
CONFIG = RepairConfig(epochs=2, learning_rate=0.02, controls=("ce", "originals"))
CELLS = [[0.0, 0.0, 0.5, 0.5]]
AUTO = frozenset({"loss", "counterfactuals"})


@pytest.fixture
def corner(folder: ImageFolder) -> ImageMasks:
    """All pixels but the upper left quarter's, for every image."""
    images = len(folder.records)
    return ImageMasks.shared(outside_cells(CELLS, (SIDE, SIDE)), range(images), images)


@pytest.fixture
def grouped(make_run: MakeRun) -> Run:
    run = make_run()
    group = {"id": "group-1", "region": "a corner", "cells": CELLS, "paths": [], "examples": []}
    run.write_groups({"groups": [group]}, {}, [])
    return run


def made(
    network: Network, folder: ImageFolder, allowed: ImageMasks, **more: Any
) -> Counterfactuals:
    donors = draw_donors(folder.positions("train"), allowed, seed=3)
    given = {"donors": donors, "hide_objects": False, **more}
    return Counterfactuals(
        folder=folder, preprocessing=network.card.preprocessing, allowed=allowed, **given
    )


def without(masks: ImageMasks, positions: list[int]) -> ImageMasks:
    rows = masks.row_of.clone()
    rows[positions] = -1
    return replace(masks, row_of=rows)


def test_an_image_keeps_its_allowed_pixels_and_takes_the_others_from_its_donor(
    network: Network, folder: ImageFolder, corner: ImageMasks
) -> None:
    counterfactuals = made(network, folder, corner)
    chosen = list(folder.positions("train"))[:5]
    found = counterfactuals(load_pixels(folder, chosen, network.card.preprocessing))
    assert found.indices.tolist() == chosen
    for row, position in enumerate(chosen):
        donor = counterfactuals.donors[position]
        own, lent = (
            np.asarray(Image.open(folder.root / folder.records[one].path))
            for one in (position, donor)
        )
        expected = own.copy()
        expected[: SIDE // 2, : SIDE // 2] = lent[: SIDE // 2, : SIDE // 2]
        assert np.array_equal(found.pixels[row].permute(1, 2, 0).numpy(), expected)


def test_images_without_a_mask_or_a_readable_donor_stay_as_they_are(
    network: Network, folder: ImageFolder, corner: ImageMasks
) -> None:
    train = list(folder.positions("train"))
    allowed = without(corner, train[:1])
    donors = draw_donors(train, allowed, seed=0)
    assert train[0] not in donors and set(donors) == set(train[1:])
    gone = replace(folder.records[donors[train[1]]], path="gone.png")
    records = [
        gone if r.path == folder.records[donors[train[1]]].path else r for r in folder.records
    ]
    counterfactuals = made(network, replace(folder, records=tuple(records)), allowed, donors=donors)
    batch = load_pixels(folder, train[:2], network.card.preprocessing)
    assert torch.equal(counterfactuals(batch).pixels, batch.pixels)


def test_donors_are_other_images_drawn_evenly_and_alike_in_every_process(
    folder: ImageFolder, corner: ImageMasks
) -> None:
    train = folder.positions("train")
    donors = draw_donors(train, corner, seed=5)
    assert donors == draw_donors(train, corner, seed=5)
    assert donors != draw_donors(train, corner, seed=6)
    assert all(donor != position and donor in train for position, donor in donors.items())
    few = list(train)[:4]
    counts = {(p, d): 0 for p in few for d in few if p != d}
    for seed in range(600):
        for pair in draw_donors(few, corner, seed=seed).items():
            counts[pair] += 1
    assert min(counts.values()) > 150 and max(counts.values()) < 250  # 200 expected, sd 11.5


def test_only_masked_images_lend_where_objects_are_hidden(
    network: Network, folder: ImageFolder, corner: ImageMasks
) -> None:
    train = list(folder.positions("train"))
    allowed = without(corner, train[::2])
    donors = draw_donors(train, allowed, seed=0, lenders=allowed.among(train))
    assert set(donors) == set(train[1::2]) and set(donors.values()) <= set(train[1::2])
    assert draw_donors(train[:2], allowed, seed=0, lenders=allowed.among(train[:2])) == {}
    images = RepairImages(
        folder=folder,
        positions={"train": tuple(train), "val": (), "test": ()},
        changed=(),
        additions=None,
    )
    config = replace(CONFIG, counterfactuals=True)
    for source, lenders in (("masks", set(train[1::2])), ("group-1", set(train))):
        guidance = Guidance(masks=allowed, source=source, sentence="", images=len(train))
        lent = make_counterfactuals(network, images, config, guidance)["train"][0]
        assert set(lent.donors) == set(train[1::2])
        assert set(lent.donors.values()) <= lenders
        assert (set(lent.donors.values()) <= set(train[1::2])) is (source == "masks")
        assert lent.hide_objects is (source == "masks")


def test_training_images_have_several_donors_and_validation_images_one(
    grouped: Run, network: Network, corner: ImageMasks
) -> None:
    images = RepairImages.open(grouped, network)
    splits = images.positions
    config = replace(CONFIG, counterfactuals=True, donors=40, epochs=40, seed=6)
    guidance = Guidance(
        masks=corner, source="group-1", sentence="", images=len(images.folder.records)
    )
    found = make_counterfactuals(network, images, config, guidance)
    assert (len(found["train"]), len(found["val"])) == (40, 1)
    short = replace(config, epochs=3)
    assert len(make_counterfactuals(network, images, short, guidance)["train"]) == 3
    assert found["train"][0].donors == draw_donors(splits["train"], corner, seed=12)
    assert found["val"][0].donors == draw_donors(splits["val"], corner, seed=13)
    others = len(splits["train"]) - 1
    expected = others * (1 - (1 - 1 / others) ** 40)  # distinct ones of forty drawn evenly
    for position in splits["train"][:5]:
        drawn = [version.donors[position] for version in found["train"]]
        assert position not in drawn
        assert len(set(drawn)) == pytest.approx(expected, abs=8)


def test_every_version_of_the_images_crosses_the_cut(
    network: Network, folder: ImageFolder, corner: ImageMasks
) -> None:
    train = tuple(folder.positions("train"))
    versions = [
        made(network, folder, corner, donors=draw_donors(train, corner, seed=3, version=number))
        for number in range(3)
    ]
    split = network.program.split(DAMAGED)
    positions = {"train": train, "test": tuple(folder.positions("test"))}
    one = crossing_bytes(split, len(train))
    room = Room(memory_bytes=2 * one + crossing_bytes(split, len(positions["test"])))
    found = cross_splits(
        network, split, folder, positions, room, counterfactuals={"train": versions}
    )
    assert list(found) == ["train", "test", "train-2", "train-3"]
    assert [one.kind for one in found.values()] == ["memory", "memory", "memory", "recompute"]
    told = cache_line("x", found)
    assert "kept in memory for train, test, 1 further version (" in told
    assert "computed again for each batch for 1 further version (" in told
    rows = torch.arange(20)
    for crossing, version in zip(
        (found["train"], *further_versions(found, "train")), versions, strict=True
    ):
        expected = cross_tensors(
            network, split, folder, train, budget_bytes=2**30, counterfactuals=version
        ).batch(rows)
        assert torch.equal(crossing.batch(rows).crossing[0], expected.crossing[0])
        assert torch.equal(crossing.batch(rows).positions, expected.positions)
    assert further_versions(found, "test") == ()


def test_a_hidden_object_is_painted_in_the_mean_color_of_the_rest() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (3, 4, 5)))
    mask = torch.zeros(4, 5, dtype=torch.float64)
    mask[1:3, 2:] = 1
    found = without_object(pixels, mask)
    for channel in range(3):
        rest = [float(pixels[channel, y, x]) for y in range(4) for x in range(5) if not mask[y, x]]
        assert found[channel, 2, 3] == pytest.approx(sum(rest) / len(rest))
        assert found[channel, 0, 0] == pixels[channel, 0, 0]


def test_an_object_of_the_donor_does_not_show(network: Network, folder: ImageFolder) -> None:
    train = list(folder.positions("train"))
    objects = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    objects[0, :8], objects[1, 12:] = True, True  # above and below
    allowed = ImageMasks.each(objects, train[:2], len(folder.records))
    donors = {train[0]: train[1]}
    counterfactuals = made(network, folder, allowed, donors=donors, hide_objects=True)
    batch = load_pixels(folder, train[:2], network.card.preprocessing)
    found = counterfactuals(batch).pixels
    assert torch.equal(found[0, :, :8], batch.pixels[0, :, :8])
    assert torch.equal(found[0, :, 8:12], batch.pixels[1, :, 8:12])
    below = found[0, :, 12:].flatten(1)
    assert torch.equal(below, below[:, :1].expand_as(below))
    assert torch.equal(found[1], batch.pixels[1])


def test_every_kind_of_cache_holds_the_same_bits(
    network: Network, folder: ImageFolder, corner: ImageMasks, tmp_path: Path
) -> None:
    counterfactuals = made(network, folder, corner)
    train = folder.positions("train")
    split = network.program.split(DAMAGED)
    space = DiskSpace(folder=tmp_path / "cache", budget_bytes=2**30)

    def crossed(kind: Any, changed: Counterfactuals | None = counterfactuals) -> torch.Tensor:
        cache = cross_tensors(
            network,
            split,
            folder,
            train,
            budget_bytes=2**30,
            disk=space,
            kind=kind,
            counterfactuals=changed,
        )
        return cache.batch(torch.arange(20)).crossing[0].clone()

    in_memory = crossed("memory")
    assert torch.equal(crossed("disk"), in_memory)
    assert torch.equal(crossed("recompute"), in_memory)
    as_they_are = crossed("memory", None)
    assert not torch.equal(as_they_are, in_memory)
    assert torch.equal(crossed("disk", None), as_they_are)  # the other files are not taken over
    pixels = counterfactuals(load_pixels(folder, train[:20], network.card.preprocessing)).pixels
    expected = split.prefix(network.normalize(pixels))[0]
    assert torch.allclose(in_memory, expected, atol=1e-6)


def test_a_known_region_decides_what_a_repair_does_by_default(
    grouped: Run, make_run: MakeRun, folder: ImageFolder
) -> None:
    info = repair_layer(grouped, CONFIG, RepairRequest(choose=AUTO)).info
    assert info["config"]["loss"] == "energy" and info["config"]["counterfactuals"] is True
    counts = {name: len(folder.positions(name)) for name in ("train", "val")}  # type: ignore[arg-type]
    assert info["counterfactuals"] == counts
    assert [one["name"] for one in info["controls"]] == ["ce", "originals"]
    assert info["frozen"]["identical"] == info["frozen"]["tensors"]
    assert any("training on the images as they are" in s for s in info["penalty"]["sentences"])
    unguided = repair_layer(make_run(), CONFIG, RepairRequest(choose=AUTO)).info
    assert unguided["config"]["loss"] == "trust"
    assert unguided["config"]["counterfactuals"] is False and unguided["counterfactuals"] == {}
    assert [one["name"] for one in unguided["controls"]] == ["ce"]


@pytest.mark.parametrize(
    ("wrong", "compared_share", "expected"),
    [(20, 0.5, False), (20, 1.0, False), (1, 1.0, True), (1, 0.5, True)],
)
def test_images_with_enough_counterexamples_are_learned_from_as_they_are(
    grouped: Run, wrong: int, compared_share: float, expected: bool
) -> None:
    seen = grouped.images[grouped.images["split"] != "test"]
    by_class = seen["right"].groupby(seen["predicted"]).sum()
    predicted, right = int(by_class.idxmax()), int(by_class.max())
    group = {**grouped.groups["groups"][0], "predicted": predicted, "size": wrong}
    group["compared_share"] = compared_share
    document = {"groups": [group], "errors": 40, "errors_looked_at": 20}
    grouped.write_groups(document, {}, [])
    looking = {True: right * compared_share, False: 2 * wrong}  # half of the errors were looked at
    agreeing = looking[True] / (looking[True] + looking[False])
    assert share_right(grouped, group) == pytest.approx(agreeing)
    assert (agreeing > 0.75) is expected
    network_layer = open_scanned_network(grouped).layer(DAMAGED)
    settled, sentence = settle(grouped, network_layer, CONFIG, AUTO)
    assert settled.counterfactuals is expected
    assert settled.loss == ("energy" if expected else "trust")
    assert sentence is not None and ("counterfactual" in sentence) is expected


def test_the_control_of_the_images_as_they_are_is_the_repair_without_counterfactuals(
    grouped: Run,
) -> None:
    guided = replace(CONFIG, loss="energy", counterfactuals=True)
    control = repair_layer(grouped, guided, RepairRequest()).info["controls"][1]
    alone = repair_layer(grouped, replace(CONFIG, loss="energy"), RepairRequest()).info
    assert control["name"] == "originals"
    assert control["after"] == alone["after"]


def test_held_out_images_are_also_judged_with_other_pixels_where_a_region_misleads(
    grouped: Run, network: Network, corner: ImageMasks
) -> None:
    config = replace(CONFIG, loss="energy", counterfactuals=True, controls=())
    repaired = repair_layer(grouped, config, RepairRequest())
    told = repaired.info["counterfactual_test"]
    images = RepairImages.open(grouped, network)
    test = list(images.positions["test"])
    donors = draw_donors(test, corner, seed=2)
    pixels = []
    for position in test:
        own, lent = (
            np.asarray(Image.open(images.folder.root / images.folder.records[one].path)).copy()
            for one in (position, donors[position])
        )
        own[: SIDE // 2, : SIDE // 2] = lent[: SIDE // 2, : SIDE // 2]
        pixels.append(torch.from_numpy(own).permute(2, 0, 1))
    labels = torch.tensor([images.folder.records[position].label for position in test])
    after = network.with_state(load_file(repaired.weights))
    for when, judged in (("before", network), ("after", after)):
        said = judged.program.logits(judged.normalize(torch.stack(pixels))).argmax(dim=1)
        right = float((said == labels).double().mean())
        assert told[when]["accuracy"]["value"] == pytest.approx(right)
        assert any(f"{100 * right:.1f} %" in one for one in repaired.info["reasons"])
    assert told["images"] == len(test)
    assert told["before"] != repaired.info["before"]  # as they are the images say something else
    plain = repair_layer(grouped, replace(CONFIG, controls=()), RepairRequest())
    assert plain.info["counterfactual_test"] is None
    assert not any("other images' pixels" in one for one in plain.info["reasons"])


def test_a_layer_without_maps_is_repaired_by_cross_entropy_on_counterfactuals(
    grouped: Run,
) -> None:
    request = RepairRequest(layer="predictions", choose=AUTO)
    info = repair_layer(grouped, replace(CONFIG, controls=()), request).info
    assert info["config"]["loss"] == "ce" and info["config"]["counterfactuals"] is True


def test_what_the_user_states_is_kept(grouped: Run) -> None:
    request = RepairRequest(choose=frozenset({"counterfactuals"}))
    info = repair_layer(grouped, replace(CONFIG, controls=()), request).info
    assert info["config"]["loss"] == "trust" and info["config"]["counterfactuals"] is False


def test_a_batch_of_none_is_a_batch_of_none(
    network: Network, folder: ImageFolder, corner: ImageMasks
) -> None:
    empty = ImageBatch(
        pixels=torch.empty((0, 3, SIDE, SIDE), dtype=torch.uint8),
        indices=torch.empty(0, dtype=torch.int64),
    )
    assert made(network, folder, corner)(empty).pixels.shape == (0, 3, SIDE, SIDE)
