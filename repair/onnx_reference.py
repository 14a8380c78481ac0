"""What PyTorch said when a file was exported, kept small, so that the proof can be repeated later
on a machine that has neither the network nor, perhaps, the images.

Kept are the class of every held-out image beside the hash of its content, and the scores of seven
images of noise that anyone can draw again from the seed.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audit.errors import ExportError
from audit.images import ImageFolder
from audit.networks import Network
from repair.onnx_proof import Expected, expected_outputs
from repair.onnx_serving import Form

__all__ = ["KnownImage", "known_images", "noise_expected", "noise_pixels", "reference_record"]

NOISE_IMAGES = 7
NOISE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class KnownImage:
    """One held-out image: its content's hash, what PyTorch predicted, its label and its path."""

    sha256: str
    predicted: int
    label: int
    path: str


def reference_record(
    network: Network, form: Form, images: ImageFolder, predicted: Mapping[int, int]
) -> dict[str, Any]:
    """Return the reference, JSON-ready.

    Args:
        predicted: PyTorch's class by position in the folder's records.
    """
    records = [(images.records[i], predicted[i]) for i in sorted(predicted)]
    expected = expected_outputs(network, noise_pixels(network.card.preprocessing.input_size), form)
    return {
        "images": [f"{r.sha256} {found} {r.label} {r.path}" for r, found in records],
        "noise": {
            "seed": NOISE_SEED,
            "scores": _packed(expected.scores),
            "maps": None if expected.maps is None else _packed(expected.maps),
        },
    }


def known_images(reference: Mapping[str, Any]) -> list[KnownImage]:
    """Return the held-out images of a reference."""
    found = []
    for line in reference["images"]:
        sha256, predicted, label, path = line.split(" ", 3)
        found.append(
            KnownImage(sha256=sha256, predicted=int(predicted), label=int(label), path=path)
        )
    return found


def noise_pixels(size: tuple[int, int], seed: int = NOISE_SEED) -> torch.Tensor:
    """Return the images of noise, uint8 (7, 3, H, W)."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(
        generator.integers(0, 256, size=(NOISE_IMAGES, 3, *size), dtype=np.uint8)
    )


def noise_expected(reference: Mapping[str, Any], inputs: np.ndarray) -> Expected:
    """Return what PyTorch said of the noise.

    Raises:
        ExportError: The reference is damaged.
    """
    noise = reference["noise"]
    try:
        maps = None if noise["maps"] is None else _unpacked(noise["maps"])
        return Expected(inputs=inputs, scores=_unpacked(noise["scores"]), maps=maps)
    except (KeyError, ValueError) as error:
        raise ExportError(f"onnx.json is damaged ({error}); export again") from error


def _packed(values: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(values, dtype="<f4")
    return {"shape": list(data.shape), "float32": base64.b64encode(data.tobytes()).decode()}


def _unpacked(record: Mapping[str, Any]) -> np.ndarray:
    data = base64.b64decode(record["float32"], validate=True)
    return np.frombuffer(data, dtype="<f4").reshape(record["shape"])
