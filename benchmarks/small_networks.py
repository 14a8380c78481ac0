"""Two small networks that tell cats from dogs, trained from nothing: what faults are planted in.

`resnet`: ResNet-18 (He et al. 2015) at a quarter of its width, with batch norm. `vgg`: thirteen
convolutions in VGG-16's blocks, without batch norm. Both take 64-pixel photographs of
LAYERMEND_DATA/cats-dogs and train on its train split alone, in minutes on one core.

    LAYERMEND_DATA=... python benchmarks/small_networks.py [--work local/localize] [--seeds 0 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from cats_dogs import CLASSES, MEAN, STD, Photo, labels_of, photos
from PIL import Image
from torch import Tensor, nn

from audit.networks.small_vgg import SmallVGG
from audit.networks.torchvision_import import import_torchvision

import_torchvision()
import timm  # noqa: E402  (timm imports torchvision)

SIZE = 64
_LOADED = 72  # training crops 64 of these

NetworkName = Literal["resnet", "vgg"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
EPOCHS = {"resnet": 24, "vgg": 40}


def build(name: NetworkName) -> nn.Module:
    """Return the untrained network."""
    if name == "resnet":
        return timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock,
            [2, 2, 2, 2],
            num_classes=len(CLASSES),
            channels=(16, 32, 64, 128),
        )
    return SmallVGG(classes=len(CLASSES), widths=(8, 16, 32, 64, 96))


def load_photos(chosen: Sequence[Photo], size: int = SIZE) -> Tensor:
    """Return normalized photographs, (N, 3, size, size) float32."""
    pixels = np.empty((len(chosen), size, size, 3), dtype=np.uint8)
    for at, photo in enumerate(chosen):
        with Image.open(photo.path) as opened:
            image = opened.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        pixels[at] = np.asarray(image)
    return normalized(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)


def normalized(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1] as the networks take them; channels last is faster on a CPU."""
    return ((pixels - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def trained(name: NetworkName, work: Path, *, seed: int) -> nn.Module:
    """Return the trained network in eval mode, from `work` where an earlier run left it."""
    network = build(name)
    path = work / "networks" / f"{name}-seed{seed}.safetensors"
    if path.exists():
        network.load_state_dict(safetensors.torch.load_file(path))
    else:
        torch.manual_seed(seed)
        network = build(name)
        _train(network, name, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in network.state_dict().items()}
        safetensors.torch.save_file(state, path)
    return network.eval()


def _train(network: nn.Module, name: NetworkName, *, seed: int) -> None:
    """AdamW under a one-cycle schedule, random crops and flips."""
    chosen = photos("train", 2000, seed=seed)
    # Channels last: 1.5 times as fast on a CPU.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = load_photos(chosen, _LOADED), labels_of(chosen)
    batch = 64
    steps = EPOCHS[name] * (len(labels) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    network.train()
    draw = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        order = torch.randperm(len(labels), generator=draw)
        for rows in order.split(batch)[: len(labels) // batch]:
            left, top = torch.randint(_LOADED - SIZE + 1, (2,), generator=draw).tolist()
            views = images[rows, :, top : top + SIZE, left : left + SIZE]
            if torch.rand((), generator=draw) < 0.5:
                views = views.flip(3)
            optimizer.zero_grad()
            F.cross_entropy(network(views), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
            done += 1
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the network gets right."""
    answers = torch.cat([network(part).argmax(dim=1) for part in images.split(100)])
    return float((answers == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("local/localize"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--names", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    options = parser.parse_args()
    held_out = photos("test", 500, seed=0)
    images, labels = load_photos(held_out), labels_of(held_out)
    for name in options.names:
        for seed in options.seeds:
            started = time.perf_counter()
            network = trained(name, options.work, seed=seed)
            right = accuracy(network, images, labels)
            print(
                f"{name} seed {seed}: {right:.1%} of 1,000 test photos, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
