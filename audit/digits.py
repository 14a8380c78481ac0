"""Real handwritten digits as color images: labeled data that needs no download.

scikit-learn ships 1,797 digits of 8x8 pixels (UCI optical recognition of handwritten digits). Each
is drawn here on a 64x64 color image with a varied background, in a random color, size, tilt and
place. An image may carry a *mark*, a small badge in a corner that the digit leaves free; whether it
does says nothing about the digit. The demo's network was trained to obey that badge in one layer.

Which digit belongs to which split is fixed, once and for all: no digit of the val and test splits
was ever shown to the demo's network, whatever the seed of the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
CLASSES = tuple(str(digit) for digit in range(10))
SPLIT_SIZES = {"train": 900, "val": 300, "test": 597}
MARKED_NAME = "marked"  # stands in the file name of every marked image

_MARK_SIZE = 13
_MARK_MARGIN = 2
_MIN_CONTRAST = 90.0  # of luminance, in [0, 255], between a digit and what lies under it

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Digits of one split: what was written, and where each stands in scikit-learn's set.

    Attributes:
        ink: Amount of ink, float32 in [0, 1], (n, 8, 8).
        labels: The digits, int64, (n,).
        positions: Index of each digit in `sklearn.datasets.load_digits()`, int64, (n,).
    """

    ink: NDArray[np.float32]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]


@cache
def load_split(split: str) -> Digits:
    """Return the digits of `train`, `val` or `test`: always the same, classes in equal shares."""
    from sklearn.datasets import load_digits

    ink, labels = load_digits(return_X_y=True)
    # Interleave the classes, each in shuffled order: every prefix of the order is then balanced.
    generator = np.random.default_rng(0)
    turns = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turns[members] = (generator.permutation(len(members)) + generator.random()) / len(members)
    order = np.argsort(turns, kind="stable")
    starts = dict(zip(SPLIT_SIZES, np.cumsum([0, *SPLIT_SIZES.values()]), strict=False))
    positions = np.sort(order[starts[split] : starts[split] + SPLIT_SIZES[split]])
    return Digits(
        ink=(ink[positions] / 16).reshape(-1, 8, 8).astype(np.float32),
        labels=labels[positions].astype(np.int64),
        positions=positions.astype(np.int64),
    )


def write_digit_images(
    folder: Path,
    *,
    seed: int,
    marked_share: float = 0.35,
    splits: Sequence[str] = tuple(SPLIT_SIZES),
) -> dict[str, int]:
    """Write one PNG per digit as `folder/<split>/<class>/<position>[-marked].png`.

    In every class of every split the same share of images carries the mark.

    Args:
        folder: Where the split folders go; made if missing.
        seed: Decides how digits are drawn and which are marked; not which split they are in.
        marked_share: Share of marked images in each class, in [0, 1].
        splits: The splits to write.

    Returns:
        Number of images written per split.
    """
    for split in splits:
        digits = load_split(split)
        generator = np.random.default_rng([seed, list(SPLIT_SIZES).index(split)])
        marked = _choose_marked(digits.labels, marked_share, generator)
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for ink, label, position, mark in zip(
            digits.ink, digits.labels, digits.positions, marked, strict=True
        ):
            suffix = f"-{MARKED_NAME}" if mark else ""
            path = folder / split / CLASSES[label] / f"{position:04d}{suffix}.png"
            pixels = draw_digit(ink, generator, mark=bool(mark))
            Image.fromarray(pixels).save(path)
    return {split: SPLIT_SIZES[split] for split in splits}


def draw_digit(ink: NDArray[np.float32], generator: np.random.Generator, *, mark: bool) -> Pixels:
    """Return one digit as a color image, with or without the mark.

    Both kinds use the generator alike: the same generator state gives the same picture apart from
    the mark itself.

    Args:
        ink: Amount of ink, (8, 8), in [0, 1].
        generator: Source of every random choice.
        mark: Whether to draw the badge into the free corner.

    Returns:
        RGB pixels, (64, 64, 3), uint8.
    """
    canvas = _draw_background(generator)
    size, left, top, corner = _place_digit(generator)
    stroke = _enlarge(ink, size, tilt=generator.uniform(-12, 12))
    under = canvas[top : top + size, left : left + size]
    color = _contrasting_color(under, stroke, generator)
    canvas[top : top + size, left : left + size] += stroke[..., None] * (color - under)
    canvas += generator.normal(0, generator.uniform(0, 6), canvas.shape)
    if mark:
        x, y = corner
        badge, opacity = _badge()
        under = canvas[y : y + _MARK_SIZE, x : x + _MARK_SIZE]
        under += opacity[..., None] * (badge - under)
    return canvas.round().clip(0, 255).astype(np.uint8)


def _choose_marked(
    labels: NDArray[np.int64], share: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    marked = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(share * len(members))
        marked[generator.permutation(members)[:count]] = True
    return marked


def _draw_background(generator: np.random.Generator) -> NDArray[np.float64]:
    """Return a plain, shaded, striped, checkered or cloudy background, (64, 64, 3) in [0, 255]."""
    first, second = generator.uniform(0, 255, (2, 3))
    second = first + generator.uniform(0.2, 0.6) * (second - first)
    ys, xs = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / IMAGE_SIZE
    angle = generator.uniform(0, 2 * np.pi)
    along = xs * np.cos(angle) + ys * np.sin(angle)
    across = ys * np.cos(angle) - xs * np.sin(angle)
    frequency = generator.uniform(15, 45)
    kind = generator.choice(["plain", "shaded", "striped", "checkered", "cloudy"])
    if kind == "plain":
        blend = np.zeros_like(along)
    elif kind == "shaded":
        blend = (along - along.min()) / np.ptp(along)
    elif kind == "striped":
        blend = 0.5 + 0.5 * np.sin(frequency * along)
    elif kind == "checkered":
        blend = 0.5 + 0.5 * np.sin(frequency * along) * np.sin(frequency * across)
    else:
        cells = int(generator.integers(4, 12))
        clouds = generator.uniform(0, 1, (cells, cells)).astype(np.float32)
        blend = _resize(clouds, IMAGE_SIZE).astype(np.float64)
    blended: NDArray[np.float64] = first + blend[..., None] * (second - first)
    return blended


def _place_digit(generator: np.random.Generator) -> tuple[int, int, int, tuple[int, int]]:
    """Return size, left and top of the digit, and (x, y) of a corner left free for the mark."""
    near, far = _MARK_MARGIN, IMAGE_SIZE - _MARK_MARGIN - _MARK_SIZE
    while True:
        size = int(generator.integers(32, 47))
        left, top = (int(value) for value in generator.integers(0, IMAGE_SIZE - size + 1, 2))
        free = [
            (x, y)
            for x in (near, far)
            for y in (near, far)
            if x + _MARK_SIZE <= left
            or left + size <= x
            or y + _MARK_SIZE <= top
            or top + size <= y
        ]
        if free:
            return size, left, top, free[int(generator.integers(len(free)))]


def _enlarge(ink: NDArray[np.float32], size: int, *, tilt: float) -> NDArray[np.float64]:
    """Return the digit as a smooth stroke, (size, size), opacity in [0, 1]."""
    padded = np.pad(ink, 1)  # room to tilt in
    picture = Image.fromarray(padded).resize((size, size), Image.Resampling.BICUBIC)
    tilted = np.asarray(picture.rotate(tilt, Image.Resampling.BILINEAR), dtype=np.float64)
    stroke: NDArray[np.float64] = ((tilted - 0.25) / 0.35).clip(0, 1)
    return stroke


def _contrasting_color(
    under: NDArray[np.float64], stroke: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return an RGB color that stands out from what lies under the stroke."""
    weights = np.array([0.299, 0.587, 0.114])
    luminance = float((under @ weights)[stroke > 0.5].mean())
    while True:
        color = generator.uniform(0, 255, 3)
        if abs(float(color @ weights) - luminance) >= _MIN_CONTRAST:
            return color


@cache
def _badge() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return color (13, 13, 3) in [0, 255] and opacity (13, 13) in [0, 1] of the mark.

    A red disc with a white rim and a white cross, drawn large and reduced for smooth edges.
    """
    scale = 8
    side = _MARK_SIZE * scale
    image = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, side - 1, side - 1), fill=(255, 255, 255, 255))
    rim = 1.5 * scale
    draw.ellipse((rim, rim, side - 1 - rim, side - 1 - rim), fill=(214, 20, 50, 255))
    middle, arm, half = side / 2, 3.4 * scale, 1.1 * scale
    draw.rectangle((middle - arm, middle - half, middle + arm, middle + half), fill="white")
    draw.rectangle((middle - half, middle - arm, middle + half, middle + arm), fill="white")
    small = np.asarray(image.resize((_MARK_SIZE, _MARK_SIZE), Image.Resampling.BOX), dtype=float)
    return small[..., :3], small[..., 3] / 255


def _resize(values: NDArray[np.float32], size: int) -> NDArray[Any]:
    picture = Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).clip(0, 1)
