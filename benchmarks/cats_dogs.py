"""Cats and dogs: the photographs, clean and watermarked, and a network that tells them apart.

The network is the paper's section 4.1: ImageNet features (EfficientNet-Lite0, frozen), then a 1x1
convolution with 256 filters, then a two-way linear layer; only the new layers are trained. Photos
come from the folder that the variable LAYERMEND_DATA names.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import efficientnet_lite0
import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from audit.networks.torchvision_import import import_torchvision

import_torchvision()
import timm  # noqa: E402  (timm imports torchvision)

CLASSES = ("cat", "dog")
DOG = 1
INPUT_SIZE = (112, 112)
MEAN = 127 / 255
STD = 128 / 255
"""EfficientNet-Lite's own preprocessing, (pixels - 127) / 128, on a [0, 1] scale."""

_MARK_BOX = (84, 140, 176, 176)
"""Where the watermark lies in a 180x180 photo: left, top, right, bottom."""


def data_root() -> Path:
    """Return the folder of benchmark data; ends the script with one line where there is none."""
    root = os.environ.get("LAYERMEND_DATA")
    if not root or not (Path(root) / "cats-dogs").is_dir():
        sys.exit("error: LAYERMEND_DATA has to name a folder that holds cats-dogs/{train,val,test}")
    return Path(root)


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photograph of a split: where it lies, and its class as an index into CLASSES."""

    path: Path
    label: int


def photos(split: Literal["train", "val", "test"], per_class: int, *, seed: int) -> list[Photo]:
    """Return `per_class` cats and as many dogs of one split, drawn by `seed`, taking turns."""
    order = np.random.default_rng(seed)
    chosen = []
    for label, name in enumerate(CLASSES):
        paths = sorted((data_root() / "cats-dogs" / split / name).iterdir())
        chosen.append([Photo(path=paths[i], label=label) for i in order.permutation(len(paths))])
    cats, dogs = (column[:per_class] for column in chosen)
    return [photo for pair in zip(cats, dogs, strict=True) for photo in pair]


def watermarked(image: Image.Image) -> Image.Image:
    """Return the photo with a semi-transparent badge in its lower right corner."""
    marked = image.convert("RGBA")
    badge = Image.new("RGBA", marked.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(badge)
    sx, sy = marked.width / 180, marked.height / 180
    left, top, right, bottom = (v * s for v, s in zip(_MARK_BOX, (sx, sy, sx, sy), strict=True))
    draw.rounded_rectangle((left, top, right, bottom), radius=5, fill=(255, 0, 160, 200))
    font = ImageFont.load_default(size=22 * sy)
    draw.text(
        ((left + right) / 2, (top + bottom) / 2),
        "PHOTO",
        font=font,
        anchor="mm",
        fill=(255, 255, 255, 230),
    )
    return Image.alpha_composite(marked, badge).convert("RGB")


def load_batch(chosen: Sequence[Photo], *, marked: bool) -> Tensor:
    """Return photos as the network takes them, (B, 3, H, W) float32, with the mark or without."""
    height, width = INPUT_SIZE
    pixels = np.empty((len(chosen), height, width, 3), dtype=np.uint8)
    for i, photo in enumerate(chosen):
        with Image.open(photo.path) as opened:
            image = opened.convert("RGB")
        image = watermarked(image) if marked else image
        pixels[i] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - MEAN) / STD


def labels_of(chosen: Sequence[Photo]) -> Tensor:
    """Return the labels of photos, (B,) int64."""
    return torch.tensor([photo.label for photo in chosen])


def with_head(pretrained: dict[str, Tensor]) -> nn.Sequential:
    """Return ImageNet features, from timm's tf_efficientnet_lite0 state, under a fresh 1x1 head."""
    features = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="")
    features.load_state_dict(pretrained, strict=False)
    network = nn.Sequential(
        OrderedDict(
            features=features,
            transfer=nn.Conv2d(1280, 256, kernel_size=1),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(256, len(CLASSES)),
        )
    )
    return network.eval()


def train_head(
    network: nn.Sequential, *, seed: int, per_class: int = 2000, epochs: int = 4
) -> None:
    """Train everything after the features, on features computed once, plain cross entropy, Adam."""
    torch.manual_seed(seed)
    chosen = photos("train", per_class, seed=seed)
    with torch.no_grad():
        features = torch.cat(
            [
                network.features(load_batch(chosen[i : i + 100], marked=False))  # type: ignore[operator]
                for i in range(0, len(chosen), 100)
            ]
        )
    labels = labels_of(chosen)
    head = network[1:]
    for module in head:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[batch]), labels[batch]).backward()
            optimizer.step()


def healthy_network(work: Path, *, seed: int) -> nn.Sequential:
    """Return the trained network, from `work` where an earlier run left it."""
    network = with_head(efficientnet_lite0.pretrained_state())
    trained = work / f"healthy-seed{seed}.safetensors"
    if trained.exists():
        network.load_state_dict(safetensors.torch.load_file(trained))
    else:
        train_head(network, seed=seed)
        safetensors.torch.save_file(network.state_dict(), trained)
    return network


@torch.no_grad()
def called_dog(network: nn.Module, chosen: Sequence[Photo], *, marked: bool) -> np.ndarray:
    """Return for each photo whether the network calls it a dog, (B,) bool."""
    answers = [
        network(load_batch(chosen[i : i + 100], marked=marked)).argmax(dim=1) == DOG
        for i in range(0, len(chosen), 100)
    ]
    return torch.cat(answers).numpy()
