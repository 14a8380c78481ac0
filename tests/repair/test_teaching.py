"""The network's own answers where an artefact is hidden, and a layer that learns from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from audit.artefacts import Artefact
from audit.errors import RunError, UsageError
from audit.files import write_json
from audit.images import ImageFolder, load_pixels, open_image_folder
from audit.networks import Network
from audit.report import material_sentences
from audit.runs import Run, open_run
from repair.cli import app
from repair.config import RepairConfig
from repair.counterfactuals import without_object
from repair.defaults import settle
from repair.guidance import Guidance, find_guidance
from repair.image_masks import ImageMasks
from repair.layer import RepairRequest, repair_layer
from repair.material import RepairImages, find_targets, hidden_pixels
from repair.sources import open_scanned_network
from repair.teaching import check_can_hide, mixed_targets, own_answers

from .conftest import CLASSES, DAMAGED, SIDE

MakeRun = Callable[..., Run]
CONFIG = RepairConfig(epochs=2, learning_rate=0.02, controls=("ce", "originals", "labels"))
AUTO = frozenset({"loss", "counterfactuals", "distill"})
BADGE = np.s_[2:7, 2:7]


@pytest.fixture(scope="session")
def badged(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """The photos with a badge on every third."""
    root = tmp_path_factory.mktemp("badged")
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        pixels = np.asarray(Image.open(path)).copy()
        if number % 3 == 0:
            pixels[BADGE] = (255, 0, 160)
        copy = root / path.relative_to(photos)
        copy.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(copy)
    return open_image_folder(root, CLASSES)


def artefact() -> Artefact:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[BADGE] = True
    picture = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    picture[:, mask] = torch.tensor([[255], [0], [160]], dtype=torch.uint8)
    return Artefact(mask=mask, picture=picture, threshold=100.0)


def away_from_badge(folder: ImageFolder) -> Guidance:
    found, images = artefact(), len(folder.records)
    masks = ImageMasks.shared((~found.reach).float(), range(images), images)
    return Guidance(masks=masks, source="group-1", sentence="", images=images, artefact=found)


def pixels_of(folder: ImageFolder, network: Network, position: int) -> Tensor:
    return load_pixels(folder, [position], network.card.preprocessing).pixels[0].float()


def log_p(network: Network, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = network.program.logits(network.normalize(pixels.round().to(torch.uint8)[None]))
    return logits[0].double().log_softmax(dim=0)


def carries(folder: ImageFolder, position: int) -> bool:
    pixels = np.asarray(Image.open(folder.root / folder.records[position].path))
    return bool((pixels[BADGE] == (255, 0, 160)).all())


def test_an_image_without_the_artefact_keeps_the_answer_it_had(
    network: Network, badged: ImageFolder
) -> None:
    train = badged.positions("train")
    answers = own_answers(network, badged, train, away_from_badge(badged))
    assert answers.shape == (len(badged.records), len(CLASSES))
    plain = [position for position in train if not carries(badged, position)]
    assert 0 < len(plain) < len(train)
    for position in plain[:10]:
        expected = log_p(network, pixels_of(badged, network, position)).exp()
        torch.testing.assert_close(answers[position].double(), expected, rtol=1e-4, atol=1e-6)
    assert answers[list(badged.positions("test"))].isnan().all()


def test_where_the_artefact_is_an_image_without_it_lends_its_pixels(
    network: Network, badged: ImageFolder
) -> None:
    """With one such image, all lenders are that one: the answers are exact."""
    train = badged.positions("train")
    marked = [position for position in train if carries(badged, position)][:8]
    lender = next(position for position in train if not carries(badged, position))
    answers = own_answers(network, badged, [*marked, lender], away_from_badge(badged))
    hidden, lent = artefact().reach, pixels_of(badged, network, lender)
    for position in marked:
        shown = torch.where(hidden, lent, pixels_of(badged, network, position))
        expected = log_p(network, shown).exp()
        torch.testing.assert_close(answers[position].double(), expected, rtol=1e-4, atol=1e-6)


def test_answers_are_means_of_logarithms_over_the_lenders(
    network: Network, badged: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over so many copies that both of two lenders come up equally often, nearly."""
    monkeypatch.setattr("repair.teaching.COPIES", 400)
    train = badged.positions("train")
    marked = next(position for position in train if carries(badged, position))
    lenders = [position for position in train if not carries(badged, position)][:2]
    answers = own_answers(network, badged, [marked, *lenders], away_from_badge(badged))
    hidden, own = artefact().reach, pixels_of(badged, network, marked)
    said = [
        log_p(network, torch.where(hidden, pixels_of(badged, network, one), own)) for one in lenders
    ]
    # log p is linear in how often the first lender came up: a half, four standard errors at most
    apart = said[0] - said[1]
    place = int(apart.abs().argmax())
    ratio = answers[marked].double().log()
    mean = torch.stack(said).mean(dim=0).log_softmax(dim=0)
    assert float((ratio - mean)[place].abs()) <= 4 * 0.5 / 400**0.5 * float(apart.abs().max()) * 2


def test_lenders_are_alike_in_every_process_and_differ_by_seed(
    network: Network, badged: ImageFolder
) -> None:
    train, guidance = list(badged.positions("train")), away_from_badge(badged)
    every = own_answers(network, badged, train, guidance)
    for own in (train[::2], train[1::2]):
        part = own_answers(network, badged, train, guidance, own=own, batch_size=7)
        torch.testing.assert_close(part[own], every[own], rtol=1e-4, atol=1e-6)
        others = [position for position in train if position not in own]
        assert part[others].isnan().all()
    assert not torch.equal(
        own_answers(network, badged, train, guidance, seed=1)[train], every[train]
    )


def test_around_objects_other_backgrounds_are_lent(network: Network, folder: ImageFolder) -> None:
    """With one other image, all lenders are that one: the answers are exact."""
    first, second = list(folder.positions("train"))[:2]
    masks = torch.zeros(2, SIDE, SIDE)
    masks[0, :, : SIDE // 2], masks[1, 6:18, 6:18] = 1, 1
    guidance = Guidance(
        masks=ImageMasks.each(masks, [first, second], len(folder.records)),
        source="masks",
        sentence="",
        images=2,
    )
    answers = own_answers(network, folder, [first, second], guidance)
    for position, lender, own, theirs in ((first, second, *masks), (second, first, *masks.flip(0))):
        ground = without_object(pixels_of(folder, network, lender), theirs)
        shown = own * pixels_of(folder, network, position) + (1 - own) * ground
        expected = log_p(network, shown).exp()
        torch.testing.assert_close(answers[position].double(), expected, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_hidden_is_said(network: Network, badged: ImageFolder) -> None:
    guidance = away_from_badge(badged)
    marked = [p for p in badged.positions("train") if carries(badged, p)]
    with pytest.raises(RunError, match=rf"all {len(marked)} training images .* --train DIR"):
        own_answers(network, badged, marked, guidance)
    with pytest.raises(UsageError, match=r"share a region and no artefact.*--distill 0"):
        check_can_hide(replace(guidance, artefact=None))
    check_can_hide(guidance)
    check_can_hide(replace(guidance, artefact=None, source="masks"))


def test_targets_are_answers_and_labels_by_share() -> None:
    answers = torch.tensor([[0.2, 0.3, 0.5], [torch.nan] * 3])
    mixed = mixed_targets(answers, [1, 0], 0.6)
    assert mixed[0].tolist() == pytest.approx([0.12, 0.58, 0.3])
    assert mixed[1].isnan().all()
    assert torch.equal(mixed_targets(answers[:1], [1], 1.0), answers[:1])


# ------------------------------------------------------------------------ in a repair


@pytest.fixture
def grouped(make_run: MakeRun) -> Run:
    """A run of the photos as they are, whose second group shares the badge's pixels."""
    run = make_run()
    found = artefact()
    shared = {
        "sentence": "9 of 9 of its images look alike in one place.",
        "share_of_image": found.share,
        "box": list(found.box),
        "threshold": found.threshold,
    }
    plain: dict[str, Any] = {"region": None, "cells": [], "paths": [], "examples": []}
    cells = [[0.5, 0.5, 1.0, 1.0]]
    region = {**plain, "id": "group-1", "region": "the lower right quarter", "cells": cells}
    groups = [region, {**plain, "id": "group-2", "artefact": shared}]
    masks = np.stack([np.zeros((SIDE, SIDE), dtype=np.bool_), found.mask.numpy()])
    pictures = np.stack([np.zeros((SIDE, SIDE, 3), np.uint8)] * 2)
    pictures[1] = found.picture.permute(1, 2, 0).numpy()
    artefacts = {"masks": masks, "pictures": pictures}
    run.write_groups({"groups": groups}, {}, [], artefacts)
    return run


def test_the_first_group_that_shares_an_artefact_guides(
    network: Network, folder: ImageFolder, grouped: Run
) -> None:
    train = folder.positions("train")
    given = (folder, train, network.card.preprocessing)
    found = find_guidance(grouped, *given, (SIDE, SIDE))
    assert found.source == "group-2" and "look alike, 4.3\N{NO-BREAK SPACE}%" in found.sentence
    assert found.artefact is not None
    assert torch.equal(found.artefact.picture, artefact().picture)
    assert torch.equal(found.masks.one(train[0]) == 0, artefact().reach)
    coarse = find_guidance(grouped, *given, (6, 6)).masks.one(train[0])
    # The badge and one pixel around it are 7 of 24 pixels along each side, from the second on.
    assert coarse[0].tolist() == pytest.approx([7 / 16, 1 / 4, 1, 1, 1, 1])
    assert find_guidance(grouped, *given, (6, 6), group="group-1").artefact is None
    larger = replace(network.card.preprocessing, input_size=(SIDE, 2 * SIDE))
    with pytest.raises(RunError, match=r"artefact of group-2 .* scan again"):
        find_guidance(grouped, folder, train, larger, (6, 6))


def test_a_run_left_to_itself_learns_from_its_own_answers(grouped: Run) -> None:
    repaired = repair_layer(grouped, CONFIG, RepairRequest(choose=AUTO))
    info = repaired.info
    assert info["config"]["loss"] == "ce" and info["config"]["counterfactuals"] is True
    assert info["config"]["distill"] > 0 and info["config"]["group"] is None
    assert info["frozen"]["identical"] == info["frozen"]["tensors"]
    assert [one["name"] for one in info["controls"]] == ["originals", "labels"]
    assert any("labels alone" in sentence for sentence in info["penalty"]["sentences"])
    assert any("own answers" in sentence for sentence in material_sentences(info))
    for control, more in zip(info["controls"], ({}, {"counterfactuals": True}), strict=True):
        alone = replace(CONFIG, loss="ce", controls=(), **more)
        plain = repair_layer(grouped, alone, RepairRequest()).info
        assert control["after"] == plain["after"] != info["after"]


def test_a_region_alone_is_repaired_as_before(grouped: Run) -> None:
    layer = open_scanned_network(grouped).layer(DAMAGED)
    settled, sentence = settle(grouped, layer, CONFIG, AUTO, group="group-1")
    assert settled.loss == "energy" and settled.distill == 0
    assert sentence is not None and "answers" not in sentence
    settled, sentence = settle(grouped, layer, CONFIG, AUTO)
    assert settled.loss == "ce" and settled.distill > 0
    assert sentence is not None and "own answers" in sentence
    stated, _ = settle(grouped, layer, CONFIG, AUTO - {"distill"})
    assert stated.distill == 0
    with pytest.raises(UsageError, match="--distill 0"):
        repair_layer(grouped, replace(CONFIG, distill=0.5), RepairRequest(group="group-1"))


@pytest.mark.parametrize(
    ("agreeing", "made"), [(None, True), (0.95, True), (0.76, True), (0.75, False), (0.5, False)]
)
def test_images_in_which_an_artefact_is_wrong_often_enough_are_learned_from_as_they_are(
    grouped: Run, agreeing: float | None, made: bool
) -> None:
    document = grouped.groups
    document["groups"][1]["artefact"]["agreeing"] = agreeing
    write_json(grouped.path / "groups.json", document)
    run = open_run(grouped.path)
    layer = open_scanned_network(run).layer(DAMAGED)
    settled, sentence = settle(run, layer, CONFIG, AUTO)
    assert settled.loss == ("ce" if made else "trust")
    assert settled.counterfactuals is made and (settled.distill > 0) is made
    assert sentence is not None and ("counterfactual" in sentence) is made


def test_a_run_whose_artefact_is_often_wrong_is_repaired_by_the_papers_loss(grouped: Run) -> None:
    document = grouped.groups
    document["groups"][1]["artefact"]["agreeing"] = 0.5
    write_json(grouped.path / "groups.json", document)
    run = open_run(grouped.path)
    info = repair_layer(run, replace(CONFIG, controls=()), RepairRequest(choose=AUTO)).info
    assert (info["config"]["loss"], info["config"]["counterfactuals"]) == ("trust", False)
    stated = replace(CONFIG, loss="trust", controls=())
    told = repair_layer(run, stated, RepairRequest()).info
    assert info["after"] == told["after"]


def test_targets_hold_the_answers_of_the_training_images(grouped: Run, network: Network) -> None:
    images = RepairImages.open(grouped, network)
    config = replace(CONFIG, distill=0.5)
    guidance = hidden_pixels(grouped, network, images, config)
    train = images.positions["train"]
    targets = find_targets(network, images, config, guidance, train)
    assert targets is not None and guidance is not None
    answers = own_answers(network, images.folder, train, guidance)
    for position in train:
        expected = 0.5 * answers[position]
        expected[images.folder.records[position].label] += 0.5
        torch.testing.assert_close(targets[position], expected)
    assert hidden_pixels(grouped, network, images, CONFIG) is None
    assert find_targets(network, images, CONFIG, None, train) is None


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    result = CliRunner().invoke(app, ["layer", "--distill", share])
    assert isinstance(result.exception, UsageError)
    assert "--distill" in str(result.exception)
