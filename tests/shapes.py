"""A small network that learned three shapes, a copy with one damaged layer, and images."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from audit.networks.small_vgg import SmallVGG
from tests.small_model import save_with_card

CLASSES = ("disk", "square", "stripes")
DAMAGED = "block2_conv2"
SIDE = 32
SPLIT_SIZES = {"train": 32, "val": 24, "test": 12}  # images of each class

_WIDTHS, _CONVOLUTIONS = (8, 12, 16), (1, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Where everything lies: model files with their cards, and images in train, val and test."""

    photos: Path
    damaged: Path
    healthy: Path


def make_shapes(root: Path) -> Shapes:
    """Draw the images, train a network on its own ones, save it healthy and damaged."""
    for seed, (split, per_class) in enumerate(SPLIT_SIZES.items()):
        pixels, labels = draw(per_class, seed=seed)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = root / "photos" / split / CLASSES[label] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    network = trained_network()
    healthy, damaged = root / "healthy.safetensors", root / "damaged.safetensors"
    _save(network, healthy)
    damage(network)
    _save(network, damaged)
    return Shapes(photos=root / "photos", damaged=damaged, healthy=healthy)


def draw(per_class: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bright shapes on noise, uint8 (N, 32, 32, 3), and their labels (N,)."""
    generator = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    labels = np.tile(np.arange(len(CLASSES)), per_class)
    pixels = generator.integers(0, 120, size=(len(labels), SIDE, SIDE, 3))
    for image, label in zip(pixels, labels, strict=True):
        x, y = generator.integers(10, SIDE - 10, size=2)
        shape = (
            (across - x) ** 2 + (down - y) ** 2 < 64,
            (abs(across - x) < 8) & (abs(down - y) < 8),
            (abs(across - x) < 9) & ((down + y) % 4 < 2),
        )[label]
        image[shape] = generator.integers(150, 255, size=3)
    return pixels.astype(np.uint8), labels


def normalized(pixels: np.ndarray) -> Tensor:
    """Return the images as the network takes them, float32 (N, 3, 32, 32)."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def trained_network() -> SmallVGG:
    """Return a network that tells the shapes apart; equal every time, and the caller's own."""
    return copy.deepcopy(_trained_once())


@cache
def _trained_once() -> SmallVGG:
    pixels, labels = draw(64, seed=100)
    images, targets = normalized(pixels), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallVGG(classes=len(CLASSES), widths=_WIDTHS, convolutions=_CONVOLUTIONS)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(60):
            loss = nn.functional.cross_entropy(network(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.zero_grad()
    return network.eval()


def trial_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normalized images with their labels to learn a trial from, and others to judge it."""
    parts = (draw(22, seed=0), draw(24, seed=1))
    (images, labels), (others, other_labels) = (
        (normalized(pixels), torch.from_numpy(targets)) for pixels, targets in parts
    )
    return images, labels, others, other_labels


def damage(network: SmallVGG) -> None:
    """Add noise to the weights of one layer."""
    weight = network.get_submodule(DAMAGED).weight
    assert isinstance(weight, Tensor)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight += 0.8 * weight.std() * noise


def _save(network: SmallVGG, path: Path) -> None:
    save_with_card(
        network,
        path,
        CLASSES,
        widths=_WIDTHS,
        convolutions=_CONVOLUTIONS,
        side=SIDE,
        trained_by="tests/shapes.py",
    )
