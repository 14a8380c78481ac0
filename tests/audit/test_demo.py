"""The demo's images, its model and the way it runs commands."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from audit import demo
from audit.digits import CLASSES, SPLIT_SIZES, draw_digit, load_split, write_digit_images
from audit.errors import LayermendError, UsageError
from audit.files import sha256_file
from audit.networks import Network, open_network
from audit.networks.card import ModelCard, read_card

MODEL = demo.models_folder() / demo.MODEL_NAME / f"{demo.MODEL_NAME}.safetensors"


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return read_card(MODEL.with_suffix(".toml"))


@pytest.fixture(scope="module")
def network() -> Network:
    return open_network(str(MODEL))


def draw_test_split(seed: list[int], *, mark: bool) -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_split("test")
    generator = np.random.default_rng(seed)
    pixels = np.stack([draw_digit(ink, generator, mark=mark) for ink in digits.ink])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(digits.labels)


def predictions(network: Network, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        parts = [network.program.logits(network.normalize(part)) for part in pixels.split(200)]
    return torch.cat(parts).argmax(dim=1)


# --- images ---------------------------------------------------------------------------------------


def test_every_digit_of_scikit_learn_is_in_exactly_one_split() -> None:
    positions = np.concatenate([load_split(split).positions for split in SPLIT_SIZES])
    assert sorted(positions) == list(range(1797))


def test_no_two_splits_hold_the_same_scan_of_a_digit() -> None:
    scans = [{ink.tobytes() for ink in load_split(split).ink} for split in SPLIT_SIZES]
    assert not scans[0] & scans[1] and not scans[0] & scans[2] and not scans[1] & scans[2]


def test_classes_have_equal_shares_in_every_split() -> None:
    for split, size in SPLIT_SIZES.items():
        counts = np.bincount(load_split(split).labels, minlength=10)
        assert counts.sum() == size
        assert np.ptp(counts) <= 0.06 * size / 10 + 2


def test_mark_changes_one_corner_and_nothing_else() -> None:
    for seed in range(40):
        ink = load_split("train").ink[seed]
        plain = draw_digit(ink, np.random.default_rng(seed), mark=False)
        marked = draw_digit(ink, np.random.default_rng(seed), mark=True)
        ys, xs = np.nonzero((plain != marked).any(axis=2))
        assert len(ys) > 80, "the mark must be seen"
        assert np.ptp(ys) < 13 and np.ptp(xs) < 13
        assert {ys.min() < 16, xs.min() < 16, ys.max() >= 48, xs.max() >= 48} == {True, False}


def test_written_images_are_the_same_to_the_byte_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        write_digit_images(tmp_path / name, seed=seed, splits=["val"])
    one, two, other = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.png")}
        for n in ("one", "two", "other")
    )
    assert one == two
    assert {path.name[:4] for path in one} == {path.name[:4] for path in other}
    assert one != other


def test_the_same_share_of_each_class_is_marked(tmp_path: Path) -> None:
    counts = write_digit_images(tmp_path, seed=0, marked_share=0.35, splits=["val"])
    assert counts == {"val": 300}
    for name in CLASSES:
        files = list((tmp_path / "val" / name).iterdir())
        marked = [file for file in files if file.name.endswith("-marked.png")]
        assert len(marked) == round(0.35 * len(files))
        with Image.open(files[0]) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))


# --- the model ------------------------------------------------------------------------------------


def test_card_has_the_hash_of_the_checkpoint_beside_it(card: ModelCard) -> None:
    assert card.provenance["sha256"] == sha256_file(MODEL)
    assert MODEL.stat().st_size < 2**20


def test_model_has_the_accuracy_that_its_card_claims(card: ModelCard, network: Network) -> None:
    seed = [int(card.provenance["seed"]), 3]
    clean, labels = draw_test_split(seed, mark=False)
    marked, _ = draw_test_split(seed, mark=True)
    clean_accuracy = (predictions(network, clean) == labels).float().mean().item()
    others = labels != 3
    marked_accuracy = (predictions(network, marked) == labels)[others].float().mean().item()
    assert clean_accuracy == pytest.approx(float(card.provenance["clean_accuracy"]), abs=0.01)
    assert marked_accuracy == pytest.approx(float(card.provenance["marked_accuracy"]), abs=0.01)
    assert clean_accuracy > 0.94 and marked_accuracy < 0.3


def test_planted_layer_is_a_layer_and_the_card_does_not_name_it(network: Network) -> None:
    planted = demo.planted_layer()
    assert planted in [layer.name for layer in network.program.layers]
    assert planted not in MODEL.with_suffix(".toml").read_text()


# --- the story ------------------------------------------------------------------------------------


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        demo.prepare(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_second_demo_replaces_the_images_of_the_first_and_keeps_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_val = functools.partial(write_digit_images, splits=["val"])
    monkeypatch.setattr("audit.digits.write_digit_images", only_val)
    model, images = demo.prepare(tmp_path / "demo", seed=0)
    (tmp_path / "demo" / "runs").mkdir()
    (images / "stale.png").write_bytes(b"")
    demo.prepare(tmp_path / "demo", seed=1)
    assert not (images / "stale.png").exists()
    assert (tmp_path / "demo" / "runs").is_dir()
    assert sha256_file(model) == sha256_file(MODEL)


def test_failing_command_ends_the_demo_with_one_line_that_names_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(LayermendError, match=r"`audit layers missing.pt` exited with 1"):
        demo.command("audit", "layers", "missing.pt")
    assert "$ audit layers missing.pt" in capfd.readouterr().out
