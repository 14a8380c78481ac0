"""Small image folders with real files, every image different from every other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    """An RGB image of random blocks, told apart by its seed."""

    def make(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
        blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def write_photos(photo: Callable[..., Image.Image]) -> Callable[..., list[Path]]:
    """Write `count` different PNG photos into a folder; `first` seeds the first of them."""

    def write(folder: Path, count: int, *, first: int = 0) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{number:05}.png" for number in range(first, first + count)]
        for number, path in enumerate(paths, start=first):
            photo(number).save(path)
        return paths

    return write
