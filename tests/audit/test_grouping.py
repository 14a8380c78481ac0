"""From a network and images to error groups in a run: the demo's badge is found by name."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import stats
from torch import Tensor, nn

import audit.looking
from audit.artefacts import Artefact
from audit.candidates import ErrorGroup
from audit.demo import MODEL_NAME, models_folder
from audit.digits import MARKED_NAME, write_digit_images
from audit.errors import RunError
from audit.files import write_arrays
from audit.group_artefacts import (
    LOOKED_AT,
    GroupArtefact,
    find_common_artefact,
    group_artefacts,
)
from audit.group_cards import group_cards, groups_note
from audit.grouping import FoundGroups, error_groups
from audit.groups import find_groups
from audit.images import (
    ImageBatch,
    ImageFolder,
    iterate_batches,
    load_pixels,
    open_image_folder,
)
from audit.looking import draw_images, looking_layer
from audit.networks import Network, open_network
from audit.networks.program import Program
from audit.report import write_report
from audit.runs import Run, open_run, start_run
from audit.summary import scan_summary
from tests.run_builder import build_run
from tests.shapes import Shapes

Scene = tuple[Network, ImageFolder, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The demo's network, images, and its answers; all of the test split count as wrong."""
    root = tmp_path_factory.mktemp("digits")
    write_digit_images(root, seed=0, splits=("val", "test"))
    network = open_network(str(models_folder() / MODEL_NAME / f"{MODEL_NAME}.safetensors"))
    folder = open_image_folder(root, network.card.classes, seed=0)
    labels = np.array([record.label for record in folder.records])
    predicted, p_predicted = (labels + 1) % 10, np.ones(len(labels))
    for batch in _batches(network, folder):
        with torch.no_grad():
            probabilities = network.program.logits(network.normalize(batch.pixels)).softmax(dim=1)
        p_predicted[batch.indices], predicted[batch.indices] = probabilities.double().max(dim=1)
    return network, folder, predicted, p_predicted


def _batches(network: Network, folder: ImageFolder) -> Iterator[ImageBatch]:
    positions = [i for i, record in enumerate(folder.records) if record.split != "test"]
    return iterate_batches(folder, positions, network.card.preprocessing, batch_size=50)


@pytest.fixture(scope="module")
def found(scene: Scene) -> FoundGroups:
    network, folder, predicted, p_predicted = scene
    return error_groups(network, folder, predicted, p_predicted, seed=0)


@pytest.fixture
def run(found: FoundGroups, tmp_path: Path) -> Run:
    """A run that holds these groups."""
    run = build_run(tmp_path / "runs", images=120)
    run.write_groups(found.document, found.maps, found.pictures, found.artefacts)
    return open_run(run.path)


def test_the_badge_in_the_corners_is_named(found: FoundGroups) -> None:
    groups = found.document["groups"]
    said, looked = groups
    assert (said["kind"], said["predicted_name"], said["region"]) == ("confusion", "3", None)
    assert (looked["kind"], looked["predicted_name"]) == ("both", "3")
    assert looked["region"] == "one of the corners"
    assert looked["p_adjusted"] < 1e-6 and looked["size"] > looked["expected"]
    marked = [MARKED_NAME in path for path in looked["paths"]]
    assert np.mean(marked) > 0.95
    assert looked["share"]["value"] == looked["size"] / looked["of"]
    assert looked["share"]["low"] < looked["share"]["value"] < looked["share"]["high"]
    assert sum(looked["ninths"].values()) == looked["size"]
    assert f"{looked['size']} of {looked['of']} errors: anything called 3" in looked["sentence"]
    assert "(Holm, " in looked["sentence"]


def test_the_last_grid_is_too_coarse_and_a_finer_one_is_looked_at(
    scene: Scene, found: FoundGroups
) -> None:
    program = scene[0].program
    assert program.layer("last_conv").output_shape[1:] == (4, 4)
    assert found.document["layer"] == "block4_conv3"
    assert program.layer("block4_conv3").output_shape[1:] == (8, 8)


def test_no_image_of_the_test_split_takes_part(scene: Scene, found: FoundGroups) -> None:
    folder, predicted = scene[1], scene[2]
    split = {record.path: record.split for record in folder.records}
    paths = {path for group in found.document["groups"] for path in group["paths"]}
    assert {split[path] for path in paths} == {"train", "val"}
    labels = np.array([record.label for record in folder.records])
    used = np.array([record.split != "test" for record in folder.records])
    assert found.document["images"] == used.sum()
    assert found.document["errors"] == (used & (labels != predicted)).sum()


def test_kept_maps_speak_for_the_answer_that_was_given(scene: Scene, found: FoundGroups) -> None:
    network, folder, predicted, _ = scene
    group = found.document["groups"][1]
    place_of = {record.path: i for i, record in enumerate(folder.records)}
    places = [place_of[path] for path in group["paths"]]
    images = network.normalize(load_pixels(folder, places, network.card.preprocessing).pixels)
    activations, logits = network.program.watch(images, ["block4_conv3"])
    scores = sum(row[int(predicted[place])] for row, place in zip(logits, places, strict=True))
    (gradients,) = torch.autograd.grad(scores, activations["block4_conv3"])
    product = (activations["block4_conv3"] * gradients).detach().double().numpy()
    heat = product.sum(axis=1).clip(min=0)
    heat /= heat.max(axis=(1, 2), keepdims=True)
    maps = dict(zip(group["paths"], heat, strict=True))
    np.testing.assert_allclose(found.maps["wrong"][1], heat.mean(axis=0), atol=1e-4)
    for example in group["examples"]:
        kept = found.maps["examples"][int(example["id"])]
        np.testing.assert_allclose(kept, maps[example["path"]], atol=1e-4)
        with Image.open(folder.root / example["path"]) as seen:
            assert np.array_equal(found.pictures[int(example["id"])], np.asarray(seen))


def test_examples_are_the_surest_of_a_group(scene: Scene, found: FoundGroups) -> None:
    folder, p_predicted = scene[1], scene[3]
    sure = {record.path: p for record, p in zip(folder.records, p_predicted, strict=True)}
    group = found.document["groups"][0]
    assert len(group["examples"]) == 8
    shown = [example["p_predicted"] for example in group["examples"]]
    assert shown == sorted((sure[path] for path in group["paths"]), reverse=True)[:8]


def test_many_images_are_drawn_down_and_the_groups_say_of_how_many(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit.looking, "IMAGES_LOOKED_AT", 60)
    network, folder, predicted, p_predicted = scene
    document = error_groups(network, folder, predicted, p_predicted, seed=0).document
    assert document["errors_looked_at"] == 60 and 0 < document["right_looked_at"] <= 60
    looked = [group for group in document["groups"] if group["region"]]
    assert all(group["of"] == 60 for group in looked)
    assert all("of 60 errors looked at (" in group["sentence"] for group in looked)


def test_right_images_are_drawn_from_the_answers_that_errors_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit.looking, "IMAGES_LOOKED_AT", 40)
    labels = np.repeat([0, 1, 2, 3], 100)
    guesses = labels.copy()
    guesses[:30] = 1  # three errors in four are called 1, the others 2
    guesses[100:110] = 2
    drawn = draw_images(labels, guesses, seed=0)
    right = drawn[labels[drawn] == guesses[drawn]]
    assert len(drawn) == 80 and len(set(drawn.tolist())) == 80
    assert np.bincount(guesses[right], minlength=4).tolist() == [0, 30, 10, 0]
    assert np.array_equal(drawn, draw_images(labels, guesses, seed=0))
    assert not np.array_equal(drawn, draw_images(labels, guesses, seed=1))


class _Bypassed(nn.Module):
    """A stem, a block that a residual passes by at the stem's size, and a coarse end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.inside = nn.Conv2d(4, 4, 3, padding=1)
        self.coarse = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(images))
        hidden = hidden + torch.relu(self.inside(hidden))
        return self.fc(torch.relu(self.coarse(hidden)).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("side", "layer"),
    [
        (32, "stem"),  # grids of 8, 8 and 4 cells: the last is too coarse, the second passed by
        (64, "coarse"),  # grids of 16, 16 and 8 cells
        (16, "coarse"),  # grids of 4, 4 and 2 cells: none is fine enough
        (128, "coarse"),
    ],
)
def test_maps_come_from_the_last_layer_that_is_fine_and_that_nothing_passes_by(
    side: int, layer: str
) -> None:
    assert looking_layer(Program.capture(_Bypassed().eval(), (side, side))) == layer


def test_a_healthy_network_has_no_groups(shapes: Shapes) -> None:
    network = open_network(str(shapes.healthy))
    folder = open_image_folder(shapes.photos, network.card.classes, seed=0)
    labels = np.array([record.label for record in folder.records])
    found = error_groups(network, folder, labels, np.ones(len(labels)), seed=0)
    assert found.document["groups"] == [] and found.document["errors"] == 0
    assert found.pictures == [] and len(found.maps["wrong"]) == 0


# ----------------------------------------------------------------- artefacts that groups share


@pytest.fixture(scope="module")
def stamped(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The digits with a stamp on every second one, which is called a 3 whatever it shows."""
    network, folder, _, p_predicted = scene
    root = tmp_path_factory.mktemp("stamped")
    predicted = np.array([record.label for record in folder.records])
    for number, record in enumerate(folder.records):
        with Image.open(folder.root / record.path) as opened:
            pixels = np.asarray(opened.convert("RGB")).copy()
        if number % 2 == 0:
            pixels[STAMP] = (250, 130, 20)
            predicted[number] = 3
        path = root / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return network, open_image_folder(root, network.card.classes, seed=0), predicted, p_predicted


STAMP = np.s_[24:40, 20:46]


def test_a_group_says_which_pixels_its_images_share(stamped: Scene, tmp_path: Path) -> None:
    network, folder, predicted, p_predicted = stamped
    found = error_groups(network, folder, predicted, p_predicted, seed=0)
    group = found.document["groups"][0]
    assert group["predicted"] == 3 and group["label"] is None
    truth = np.zeros((64, 64), dtype=bool)
    truth[STAMP] = True
    mask, picture = found.artefacts["masks"][0], found.artefacts["pictures"][0]
    assert (mask & truth).sum() > 0.85 * truth.sum()  # digits differ little where they have no ink
    assert not (mask & ~truth).any()
    assert (picture[mask] == (250, 130, 20)).all()
    artefact = group["artefact"]
    assert artefact["looked_at"] == min(64, group["size"]) == artefact["carriers"]
    assert artefact["right_looked_at"] == 128 and artefact["right_carriers"] == 0
    assert artefact["share_of_image"] == mask.mean()
    assert f"{artefact['carriers']} of {artefact['looked_at']}" in artefact["sentence"]
    assert all(one["artefact"] is None or one is group for one in found.document["groups"])

    run = build_run(tmp_path / "runs", images=120)
    run.write_groups(found.document, found.maps, found.pictures, found.artefacts)
    run = open_run(run.path)
    kept_mask, kept_picture = run.group_artefact(0)
    assert np.array_equal(kept_mask, mask) and np.array_equal(kept_picture, picture)
    card = group_cards(run)[0]
    assert card.maps[-1].title == "What these errors share"
    assert card.sentence == f"{group['sentence']} {artefact['sentence']}"
    (run.path / "maps" / "artefacts.npz").write_bytes(b"not an archive")
    with pytest.raises(RunError, match="is damaged"):
        run.group_artefact(0)
    (run.path / "maps" / "artefacts.npz").unlink()
    with pytest.raises(RunError, match="not there"):
        run.group_artefact(0)


def test_errors_that_scatter_over_classes_are_a_group_by_what_their_images_share(
    stamped: Scene, tmp_path: Path
) -> None:
    """Two of three images with the stamp are wrong, and one in five others, each called another
    class: no answer stands out. What the images share is found without them."""
    network, folder, _, p_predicted = stamped
    labels = np.array([record.label for record in folder.records])
    predicted, places = labels.copy(), np.arange(len(labels))
    wrong = np.where(places % 2 == 0, places % 3 > 0, places % 5 == 1)
    predicted[wrong] = (labels[wrong] + 1 + places[wrong] // 2 % 9) % 10
    found = error_groups(network, folder, predicted, p_predicted, seed=0)
    (group,) = found.document["groups"]
    assert (group["kind"], group["region"], group["predicted"]) == ("artefact", None, None)
    used = np.array([record.split != "test" for record in folder.records])
    assert used.sum() <= 512  # all are counted
    carrying = used & (places % 2 == 0)
    table = [[(wrong & carrying).sum(), (wrong & used & ~carrying).sum()]]
    table += [[(~wrong & carrying).sum(), (~wrong & used & ~carrying).sum()]]
    p_value = stats.fisher_exact(table, "greater").pvalue
    assert group["p_value"] == pytest.approx(p_value)
    assert group["p_adjusted"] == pytest.approx(2 * p_value)
    assert set(group["paths"]) == {folder.records[i].path for i in places[wrong & carrying]}
    right = carrying & ~wrong
    artefact = group["artefact"]
    assert artefact["agreeing"] == pytest.approx(right.sum() / carrying.sum())
    assert artefact["right_carriers"] == right.sum()
    assert "look alike in the center" in artefact["sentence"]
    assert f"Of {carrying.sum()} images that carry it, " in artefact["sentence"]
    mask = found.artefacts["masks"][0]
    truth = np.zeros((64, 64), dtype=bool)
    truth[STAMP] = True
    assert (mask & truth).sum() > 0.85 * truth.sum() and not (mask & ~truth).any()

    run = build_run(tmp_path / "runs", images=120)
    run.write_groups(found.document, found.maps, found.pictures, found.artefacts)
    (card,) = group_cards(open_run(run.path))
    assert card.title == "Any class, in images that look alike in one place"
    assert [fact for fact in card.facts if fact[0] == "Right images that look alike there"]
    assert card.maps[-1].title == "What these errors share"


def test_of_images_that_cannot_be_read_it_is_not_said_that_they_share_anything() -> None:
    generator = np.random.default_rng(1)
    pixels = torch.from_numpy(generator.integers(0, 256, (300, 3, 8, 8), dtype=np.uint8))
    pixels[::2, :, 2:5, 2:5] = 200
    lost = {0, 7, 250}

    def load(rows: np.ndarray) -> Tensor:
        return pixels[[row for row in rows.tolist() if row not in lost]]

    found = find_common_artefact(load, 300, seed=0)
    assert found is not None
    assert set(found.seen) == set(range(300)) - lost
    assert np.array_equal(found.carried, found.seen % 2 == 0)


@pytest.mark.parametrize(
    "arrays",
    [
        {"masks": np.zeros((1, 4, 4), bool), "pictures": np.zeros((1, 4, 4, 3), np.uint8)},
        {"masks": np.ones((1, 4, 4), int), "pictures": np.zeros((1, 4, 4, 3), np.uint8)},
        {"masks": np.ones((4, 4), bool), "pictures": np.zeros((4, 4, 3), np.uint8)},
        {"masks": np.ones((1, 4, 4), bool), "pictures": np.zeros((1, 5, 4, 3), np.uint8)},
        {"masks": np.ones((1, 4, 4), bool)},
    ],
)
def test_an_artefact_that_no_scan_writes_is_refused(
    run: Run, arrays: dict[str, np.ndarray]
) -> None:
    write_arrays(run.path / "maps" / "artefacts.npz", **arrays)
    with pytest.raises(RunError, match="is damaged"):
        run.group_artefact(0)


def test_groups_are_compared_with_right_images_of_their_classes() -> None:
    """Of the class they show where there are enough, else of any class."""
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (400, 3, 8, 8), dtype=np.uint8))
    labels = np.repeat([0, 1], 200)
    pixels[labels == 0, :, :4] //= 16  # class 0 is dark above: its images share it, errors or not
    guesses = labels.copy()
    guesses[:40] = 1
    few = np.r_[0:60, 200:400]  # twenty right images of class 0 are left: too few
    for chosen, shared in ((np.arange(400), False), (few, True)):
        own, said = labels[chosen], guesses[chosen]
        none = np.zeros((0, 1, 1))
        group = find_groups(own, said, np.empty(0, dtype=np.int64), none, classes=2).groups[0]
        assert set(group.members) == set(range(40))
        (found,) = group_artefacts(partial(_rows, pixels, chosen), own, said, [group], seed=0)
        assert (found is not None) is shared
    assert found is not None and found.artefact.mask[:4].all() and not found.artefact.mask[4:].any()


@pytest.mark.parametrize(
    ("right", "wrong", "agreeing"), [(60, 20, 0.75), (20, 60, 0.25), (0, 40, 0.0), (400, 60, None)]
)
def test_it_is_counted_how_often_what_an_artefact_says_is_right(
    right: int, wrong: int, agreeing: float | None
) -> None:
    """Of the images that carry it and were called the group's class, in a draw where they are many;
    of those that carry it and were called another, and of one that cannot be read, nothing."""
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (800, 3, 8, 8), dtype=np.uint8))
    labels, guesses = np.zeros(800, dtype=np.int64), np.zeros(800, dtype=np.int64)
    guesses[:wrong] = 1
    labels[wrong : wrong + right] = guesses[wrong : wrong + right] = 1
    stamped = np.r_[0 : wrong + right, 750:790]
    pixels[stamped, :, 2:5, 2:5] = 200

    def load(rows: np.ndarray) -> Tensor:
        return pixels[rows[rows != wrong]]

    group = ErrorGroup(
        kind="confusion",
        label=0,
        predicted=1,
        region=None,
        members=np.arange(wrong),
        of=wrong,
        expected=1.0,
        compared=np.empty(0, dtype=np.int64),
        compared_share=None,
        p_value=1e-9,
        test="",
    )
    (found,) = group_artefacts(load, labels, guesses, [group], seed=0)
    assert found is not None
    if agreeing is None:  # more were called alike than are looked at
        assert found.agreeing == pytest.approx(400 / 460, abs=0.05)
        assert 4 * LOOKED_AT - 1 <= found.called <= 4 * LOOKED_AT  # one cannot be read
        return
    read = right - (right > 0)
    assert (found.agreeing, found.called) == (read / (read + wrong), read + wrong)
    assert f"Of {found.called} images that carry it" in found.as_dict()["sentence"]


def test_of_few_images_it_is_not_said_how_often_an_artefact_is_right() -> None:
    found = GroupArtefact(
        artefact=Artefact(
            mask=torch.ones(2, 2, dtype=torch.bool),
            picture=torch.zeros(3, 2, 2, dtype=torch.uint8),
            threshold=1.0,
        ),
        group=9,
        group_carriers=8,
        others=20,
        others_carriers=0,
        agreeing=None,
        called=7,
    )
    assert found.as_dict()["agreeing"] is None
    assert found.sentence.endswith("0 of 20 right images do.")


def _rows(pixels: Tensor, chosen: np.ndarray, rows: np.ndarray) -> Tensor:
    return pixels[chosen[rows]]


# -------------------------------------------------------------------- in the run and the report


def test_a_run_gives_back_the_groups_that_were_written(run: Run, found: FoundGroups) -> None:
    assert run.groups == {"schema_version": 1, **json.loads(json.dumps(found.document))}
    for kind in ("wrong", "right", "examples"):
        np.testing.assert_allclose(run.group_maps(kind), found.maps[kind], atol=1e-3)
    with Image.open(run.group_image("0000")) as picture:
        assert picture.size == (64, 64)


def test_a_run_without_groups_has_none_and_a_damaged_one_says_so(run: Run, tmp_path: Path) -> None:
    older = start_run(tmp_path / "older", "m")
    assert older.groups == {"groups": []} and group_cards(older) == []
    assert groups_note(older.groups) == ""
    (run.path / "maps" / "groups.npz").write_bytes(b"not an archive")
    with pytest.raises(RunError, match="is damaged"):
        group_cards(run)
    (run.path / "groups.json").write_text('{"schema_version": 2, "groups": []}')
    with pytest.raises(RunError, match="schema version 2"):
        _ = open_run(run.path).groups


def test_the_report_shows_groups_with_maps_and_examples(run: Run, tmp_path: Path) -> None:
    cards = group_cards(run)
    assert [len(card.maps) for card in cards] == [2, 2]
    assert [len(card.examples) for card in cards] == [8, 8]
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "Errors that share something" in page
    assert "Anything called 3, looking at one of the corners" in page
    for group in run.groups["groups"]:
        assert group["examples"][0]["path"] in page
    assert "57 tests" in page or f"{run.groups['tests']} tests" in page


def test_names_from_files_stay_text_in_the_report(run: Run, tmp_path: Path) -> None:
    document: dict[str, Any] = json.loads(json.dumps(run.groups))
    document["groups"][0]["sentence"] = "9 of 9 errors: <script>alert(1)</script> called 3"
    (run.path / "groups.json").write_text(json.dumps(document))
    page = write_report(open_run(run.path), tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_summary_prints_one_line_a_group(run: Run, tmp_path: Path) -> None:
    def printed(one: Run) -> str:
        one.write_info(timings_s={"total": 1.0})
        console = Console(width=400, file=io.StringIO(), record=True)
        console.print(scan_summary(one))
        return console.export_text()

    text = printed(run)
    assert all(f"- {group['sentence']}" in text for group in run.groups["groups"])
    older = build_run(tmp_path / "older", images=120)
    (older.path / "groups.json").unlink()
    assert "Error groups" not in printed(older)  # not sought is not the same as not found
    older.write_groups({**run.groups, "groups": []}, {}, [])
    assert f"none among {run.groups['errors']} errors beats chance" in printed(older)
