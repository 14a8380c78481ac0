"""Drift where no image carries the artefact: it names the layer that learned to obey it."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from audit.artefacts import Artefact
from audit.blame import FIRST_ONSET, shares_of_blame
from audit.drift import onset
from audit.evidence import LayerEvidence, drift_over, gather_evidence
from audit.networks import ModelCard, write_card
from audit.networks.program import Program
from audit.plain_images import FEWEST, MOST, drift_without_artefacts, plain_pixels
from audit.runs import Run
from audit.scan import ScanConfig, ScanRequest, scan_model
from audit.verdict import ONSET_THRESHOLD, drift_origin
from tests.small_model import preprocessing

SIDE = 16
BADGE = np.s_[10:15, 10:15]
CONVOLUTIONS = 4
PLANTED = "conv3"
DRIFT = ("drift", "drift_onset", "drift_by_signs", "signs_onset")


def pictures(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Noise that is brighter in the left or in the right half, uint8, and which."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(90, 130, (count, 3, SIDE, SIDE), generator=generator)
    labels = torch.arange(count) % 2
    half = torch.where(labels == 1, SIDE // 2, 0)
    for image, start in zip(pixels, half.tolist(), strict=True):
        image[:, :, start : start + SIDE // 2] += 15
    return pixels.to(torch.uint8), labels


def badged(pixels: Tensor) -> Tensor:
    """The pictures with a badge unlike anything in them."""
    marked = pixels.clone()
    marked[:, 0][:, *BADGE], marked[:, 1:][:, :, *BADGE] = 255, 0
    return marked


def normalized(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.5) / 0.25


def artefact() -> Artefact:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[BADGE] = True
    picture = badged(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))[0]
    return Artefact(mask=mask, picture=picture, threshold=100.0)


def looked_at_again(
    evidence: list[LayerEvidence], program: Program, pixels: Tensor, artefacts: list[Artefact]
) -> tuple[list[LayerEvidence], int | None]:
    """What `drift_without_artefacts` makes of evidence when it may draw from all the pictures."""
    return drift_without_artefacts(
        evidence,
        program,
        normalized,
        lambda places: pixels[torch.from_numpy(places)],
        np.arange(len(pixels)),
        artefacts,
        batch_size=32,
        seed=0,
    )


@pytest.fixture(scope="module")
def healthy() -> nn.Sequential:
    """Four convolutions with batch norm that have never seen a badge."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {}
    for depth in range(CONVOLUTIONS):
        parts[f"conv{depth}"] = nn.Conv2d(8 if depth else 3, 8, 3, padding=1)
        parts |= {f"norm{depth}": nn.BatchNorm2d(8), f"relu{depth}": nn.ReLU()}
    parts |= {"pool": nn.AdaptiveAvgPool2d(2), "flat": nn.Flatten(), "head": nn.Linear(32, 2)}
    module = nn.Sequential(OrderedDict(parts))
    pixels, labels = pictures(512, seed=1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(150):
        rows = torch.randint(512, (64,))
        optimizer.zero_grad()
        F.cross_entropy(module(normalized(pixels[rows])), labels[rows]).backward()
        optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def faulty(healthy: nn.Sequential) -> Program:
    """The network after one layer alone has learned that a badge means class 1."""
    program = Program.capture(healthy, (SIDE, SIDE))
    pixels, labels = pictures(512, seed=1)
    plain, marked = normalized(pixels), normalized(badged(pixels))
    leaves = {
        name: program.state[name].clone().requires_grad_()
        for name in program.layer(PLANTED).parameter_names
    }
    optimizer = torch.optim.Adam(leaves.values(), lr=0.02)
    torch.manual_seed(0)
    for _ in range(120):
        rows = torch.randint(512, (64,))
        one = torch.ones(64, dtype=torch.long)
        loss = F.cross_entropy(program.logits(marked[rows], leaves), one)
        loss = loss + F.cross_entropy(program.logits(plain[rows], leaves), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return program.with_state({name: leaf.detach() for name, leaf in leaves.items()})


def test_drift_over_other_images_is_what_a_gathering_of_these_finds(faulty: Program) -> None:
    pixels, labels = pictures(96, seed=2)
    layers = list(faulty.layers)[1:]  # the onset compares with layers that are not scored, too

    def gathered(images: Tensor) -> list[LayerEvidence]:
        batches = zip(images.split(32), labels.split(32), strict=True)
        return gather_evidence(faulty, batches, layers, seed=0)

    plain, marked = normalized(pixels), normalized(badged(pixels))
    first, expected = gathered(marked), gathered(plain)
    found = drift_over(first, faulty, plain.split(40))
    for one, before, other in zip(found, first, expected, strict=True):
        for name, value in vars(one).items():
            source = other if name in DRIFT else before
            told = True if name == "without_artefact" else getattr(source, name)
            if isinstance(value, float):
                assert value == pytest.approx(told, rel=1e-5, abs=1e-7, nan_ok=True), name
            else:
                assert repr(value) == repr(told), name
    assert math.isnan(found[-1].drift)  # no batch norm behind the linear layer


def test_a_badge_hides_where_drift_sets_in_and_images_without_it_show_it(faulty: Program) -> None:
    pixels, labels = pictures(300, seed=3)
    pixels[::2] = badged(pixels[::2])
    batches = zip(normalized(pixels).split(50), labels.split(50), strict=True)
    seen = gather_evidence(faulty, batches, list(faulty.layers), seed=0)
    hidden = {one.layer.name: one.drift_onset for one in seen}[PLANTED]
    found, count = looked_at_again(seen, faulty, pixels, [artefact()])
    assert count == 150
    origin = drift_origin(found)
    assert origin is not None and origin.layer.name == PLANTED
    assert origin.drift_onset > max(hidden + 1, ONSET_THRESHOLD)
    others = [one.drift_onset for one in found if one.layer.name != PLANTED]
    assert max(x for x in others if not math.isnan(x)) < ONSET_THRESHOLD / 2


@pytest.mark.parametrize("plain", [FEWEST - 1, FEWEST, MOST + 50])
def test_images_without_an_artefact_are_drawn_once_each(plain: int) -> None:
    pixels, _ = pictures(plain + 40, seed=4)
    pixels[:40] = badged(pixels[:40])
    seen: list[int] = []

    def load(places: np.ndarray) -> Tensor:
        seen.extend(places.tolist())
        return pixels[torch.from_numpy(places[places != 45])]  # one cannot be read

    batches = list(plain_pixels(load, np.arange(plain + 40), [artefact()], batch_size=7, seed=0))
    found = torch.cat(batches)
    assert len(found) == min(plain - 1, MOST) and max(map(len, batches)) <= 7
    assert not artefact().carried_by(found).any()
    assert len(set(seen)) == len(seen) and len(found.unique(dim=0)) == len(found)
    more = plain_pixels(load, np.arange(plain + 40), [artefact()] * 2, batch_size=7, seed=0)
    assert torch.equal(torch.cat(list(more)), found)


@pytest.mark.parametrize("without", ["artefact", "images"])
def test_with_nothing_to_go_by_drift_is_that_of_all_images(faulty: Program, without: str) -> None:
    pixels, labels = pictures(FEWEST - 1, seed=5)
    evidence = gather_evidence(faulty, [(normalized(pixels), labels)], faulty.layers, seed=0)
    found, count = looked_at_again(
        evidence, faulty, pixels, [artefact()] if without == "images" else []
    )
    assert count is None and found == evidence


@pytest.mark.parametrize("fault", ["dark photographs", "damaged first layer"])
def test_of_first_layers_it_is_told_what_no_change_of_photographs_explains(
    healthy: nn.Sequential, fault: str
) -> None:
    program = Program.capture(healthy, (SIDE, SIDE))
    pixels, labels = pictures(128, seed=9)
    if fault == "dark photographs":
        pixels = (pixels.float() * 0.7).round().to(torch.uint8)
    else:
        weight = program.state["conv0.weight"].clone()
        weight[:2] = 0
        program = program.with_state({"conv0.weight": weight})
    batches = zip(normalized(pixels).split(32), labels.split(32), strict=True)
    evidence = gather_evidence(program, batches, program.layers, seed=0)
    found, count = looked_at_again(evidence, program, pixels, [])
    assert count is None
    first, *others = found
    assert first.drift_onset > 1
    assert all(math.isnan(one.drift_unexplained) for one in others)
    blame = shares_of_blame(found, (), ())
    origin = drift_origin(found)
    if fault == "dark photographs":
        assert onset(first.drift_unexplained) < FIRST_ONSET
        assert origin is None or origin.layer.name != "conv0"
        assert blame["conv0"] < 0.5
    else:
        assert first.drift_unexplained > 0.9 * first.drift
        assert origin is not None and origin.layer.name == "conv0"
        assert blame["conv0"] > 0.9


def _photos(root: Path) -> Path:
    for split, seed, count in (("train", 6, 160), ("val", 7, 120), ("test", 8, 60)):
        pixels, labels = pictures(count, seed=seed)
        for place, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            shown = badged(image[None])[0] if place % 4 < 2 else image
            path = root / split / ("left", "right")[label] / f"{place:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shown.permute(1, 2, 0).numpy()).save(path)
    return root


def _scan(program: Program, folder: Path) -> Run:
    model = folder / "badge.pt2"
    torch.export.save(program.to_exported(), model)
    card = ModelCard(arch=None, classes=("left", "right"), preprocessing=preprocessing(SIDE))
    write_card(card, model.with_suffix(".toml"))
    request = ScanRequest(model=str(model), data=_photos(folder / "photos"), out=folder / "runs")
    return scan_model(request, ScanConfig())


def test_a_scan_names_the_layer_that_learned_the_badge(faulty: Program, tmp_path: Path) -> None:
    run = _scan(faulty, tmp_path)
    assert any(group["artefact"] for group in run.groups["groups"])
    verdict = run.verdict
    assert (verdict["verdict"], verdict["layers"], verdict["flagged"]) == (
        *("localized", [PLANTED], PLANTED),
    )
    origin = verdict["numbers"]["drift_origin"]
    assert (origin["layer"], origin["plain_images"]) == (PLANTED, 140)  # of train and val
    assert "on 140 images without an artefact" in verdict["reasons"][0]
    table = run.layers.set_index("name")
    assert table["bn_drift_onset"][PLANTED] == origin["onset"] > ONSET_THRESHOLD
