"""Batches arrive in order, alike for any number of workers, without the images that fail."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from audit.errors import ImageError
from audit.images import (
    ImageBatch,
    ImageFolder,
    iterate_batches,
    load_pixels,
    loading,
    open_image_folder,
)
from audit.images.decoding import decode, preprocess
from audit.networks.card import Preprocessing

WritePhotos = Callable[..., list[Path]]
CARD = Preprocessing(
    input_size=(16, 24),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bilinear",
    crop=0.875,
)


@pytest.fixture
def folder(tmp_path: Path, write_photos: WritePhotos) -> ImageFolder:
    """Twelve images; numbers 3 and 8 turn out truncated."""
    paths = write_photos(tmp_path / "cat", 12)
    for broken in (3, 8):
        paths[broken].write_bytes(paths[broken].read_bytes()[:-60])
    return open_image_folder(tmp_path, ["cat"])


def loaded(
    folder: ImageFolder, indices: list[int], **options: int
) -> tuple[list[ImageBatch], dict[int, str]]:
    skipped: dict[int, str] = {}
    batches = iterate_batches(folder, indices, CARD, on_skip=skipped.__setitem__, **options)
    return list(batches), skipped


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_keep_the_asked_order_and_leave_out_what_fails(
    folder: ImageFolder, workers: int
) -> None:
    indices = [11, 3, 0, 5, 8, 8, 7, 1]
    batches, skipped = loaded(folder, indices, batch_size=2, workers=workers)
    assert [batch.indices.tolist() for batch in batches] == [[11], [0, 5], [7, 1]]
    assert skipped.keys() == {3, 8}
    assert all("damaged image" in reason for reason in skipped.values())
    for batch in batches:
        assert batch.pixels.dtype == torch.uint8
        assert batch.indices.dtype == torch.int64
        for index, pixels in zip(batch.indices, batch.pixels, strict=True):
            image = decode(folder.root / folder.records[int(index)].path)
            assert np.array_equal(pixels, preprocess(image, CARD))


def test_loading_works_where_processes_are_spawned(
    folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loading.DataLoader
    monkeypatch.setattr(
        loading,
        "DataLoader",
        lambda *a, **k: made(*a, multiprocessing_context="spawn", **k),
    )
    there = load_pixels(folder, range(12), CARD, workers=1, batch_size=6)
    monkeypatch.undo()
    here = load_pixels(folder, range(12), CARD)
    assert torch.equal(there.pixels, here.pixels)
    assert torch.equal(there.indices, here.indices)


def test_all_at_once_is_the_batches_joined(folder: ImageFolder) -> None:
    whole = load_pixels(folder, range(12), CARD, batch_size=5)
    assert whole.pixels.shape == (10, 3, 16, 24)
    assert whole.indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    for nothing in ([], [3, 8]):
        empty = load_pixels(folder, nothing, CARD)
        assert empty.pixels.shape == (0, 3, 16, 24)
        assert empty.indices.shape == (0,)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(folder: ImageFolder, workers: int) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    load_pixels(folder, range(12), CARD, batch_size=3, workers=workers)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_file_that_vanished_or_changed_is_a_skip(folder: ImageFolder) -> None:
    (folder.root / folder.records[0].path).unlink()
    (folder.root / folder.records[1].path).write_text("no longer an image")
    _, skipped = loaded(folder, [0, 1, 2], batch_size=3)
    assert skipped[0] == "missing file or broken symbolic link"
    assert skipped[1].startswith("not an image")


def test_asking_for_too_many_workers_or_pinned_memory_never_warns(folder: ImageFolder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = load_pixels(folder, range(12), CARD, batch_size=1, workers=64, pin_memory=True)
    assert len(batch.indices) == 10


def test_pillow_never_warns_out_of_loading(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    large = Image.new("1", (10_000, 9_000))  # beyond Pillow's warning, below its error
    large.save(tmp_path / "cat" / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = open_image_folder(tmp_path, ["cat"])
        assert len(load_pixels(folder, [0], CARD).indices) == 1


def test_a_dead_worker_is_one_clear_error(
    folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(loading, "decode", die)
    with pytest.raises(ImageError, match="fewer workers"):
        load_pixels(folder, range(4), CARD, batch_size=2, workers=1)


def test_batches_may_be_left_early(folder: ImageFolder) -> None:
    batches = iterate_batches(folder, range(12), CARD, batch_size=1, workers=2)
    assert next(batches).indices.tolist() == [0]
    batches.close()  # type: ignore[attr-defined]
