"""Is a model file the network that it was exported from?

`onnx.checker` with full shape inference, then onnxruntime beside PyTorch on held-out images: with
graph optimizations off and on, in batches of one, two, seven and many, on the CPU and, where there
is one, on a CUDA device. What the file must give: the same class for every image, scores and maps
within a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image

from audit import console
from audit.images import ImageFolder, iterate_batches
from audit.images.decoding import preprocess
from audit.networks import Network, Preprocessing
from audit.saliency import layer_maps
from repair.onnx_comparison import Comparison, Given
from repair.onnx_serving import BATCH_AXIS, INPUT, Form
from repair.onnx_sessions import OpenedSession, cuda_state, open_sessions

__all__ = [
    "BATCHES",
    "Expected",
    "expected_outputs",
    "loaded_as",
    "model_inputs",
    "prove",
    "structure_error",
]

BATCHES = (1, 2, 7)  # each tried by itself, before all images in batches of PROOF_BATCH
PROOF_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What PyTorch says of some images: the model's input, scores (B, K) and maps (B, h, w)."""

    inputs: np.ndarray
    scores: np.ndarray
    maps: np.ndarray | None


def prove(
    path: Path, network: Network, images: ImageFolder, indices: Sequence[int], form: Form
) -> tuple[dict[str, Any], dict[int, int]]:
    """Return whether the model file is the network (status, numbers and reasons, JSON-ready), and
    PyTorch's class of each image by its position.

    Args:
        path: The ONNX file as it lies on the disk.
        network: The network it was exported from, on the CPU.
        images: Where the held-out images are.
        indices: Their positions in the folder's records.
        form: What the file was exported to take and give.
    """
    structure = structure_error(path)
    comparison = Comparison(half=form.half, scores=form.outputs[0])
    failure, sessions = structure, []
    if failure is None:
        try:
            sessions = list(open_sessions(path))
            _compare(sessions, network, images, indices, form, comparison)
        except Exception as error:  # onnxruntime raises its own, unrelated types
            failure = f"onnxruntime: {(str(error).splitlines() or [type(error).__name__])[0]}"
    reasons = [failure] if failure else comparison.reasons()
    proof = {
        "status": "failed" if reasons else "passed",
        "checker": structure or "ok",
        "against": "PyTorch",
        **comparison.image_record(images),
        **comparison.record(),
        "batches": [*BATCHES, PROOF_BATCH],
        "providers": list(dict.fromkeys(session.provider for session in sessions)),
        "cuda": cuda_state([session.provider for session in sessions]),
        "reasons": reasons,
    }
    return proof, comparison.expected


def loaded_as(settings: Preprocessing, form: Form) -> Preprocessing:
    """Return how images are loaded for a file of this form: prepared, unless it takes photographs.

    Those of one batch are of one size; it is odd, and larger than what the network sees.
    """
    if form.preprocess != "photo":
        return settings
    height, width = settings.input_size
    return replace(settings, input_size=(3 * height // 2 | 1, (3 * width // 2 | 1) + 2), crop=1.0)


def expected_outputs(network: Network, pixels: torch.Tensor, form: Form) -> Expected:
    """Return what the network itself gives for uint8 pixels (B, 3, H, W)."""
    normalized = network.normalize(_prepared(pixels, network.card.preprocessing, form))
    with torch.no_grad():
        logits = network.program.logits(normalized)
    maps = None
    if form.map_layer is not None:
        by_layer = layer_maps(
            network.program, normalized, logits.argmax(dim=1), layers=[form.map_layer]
        )
        maps = by_layer[network.layer(form.map_layer).name].cpu().numpy()
    scores = logits if form.preprocess is None else logits.softmax(dim=1)
    inputs = (
        normalized.cpu().numpy()
        if form.preprocess is None
        else model_inputs(pixels, network.card.preprocessing, form)
    )
    return Expected(inputs=inputs, scores=scores.cpu().numpy(), maps=maps)


def model_inputs(pixels: torch.Tensor, settings: Preprocessing, form: Form) -> np.ndarray:
    """Return what a file of this form takes for uint8 pixels (B, 3, H, W)."""
    if form.preprocess in ("nhwc", "photo"):
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()
    if form.preprocess == "nchw":
        return pixels.numpy()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.mean, settings.std))
    return ((pixels.to(torch.float32) / 255 - mean) / std).numpy()


def _prepared(pixels: torch.Tensor, settings: Preprocessing, form: Form) -> torch.Tensor:
    """Return what the network sees of pixels (B, 3, H, W): of photographs, what Pillow makes."""
    if form.preprocess != "photo":
        return pixels
    photos = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    seen = [preprocess(Image.fromarray(photo), settings) for photo in photos]
    return torch.from_numpy(np.stack(seen))


def structure_error(path: Path) -> str | None:
    """Return what is wrong with the file as a graph, None if nothing is."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    except Exception as error:  # checker, shape inference and protobuf each raise their own
        return f"onnx.checker: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    for value in (*model.graph.input, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        if not axes or axes[0].dim_param != BATCH_AXIS:
            size = axes[0].dim_value if axes else "unknown"
            return f"shape inference: the batch axis of {value.name!r} is {size}, not free"
    return None


def _compare(
    sessions: Sequence[OpenedSession],
    network: Network,
    images: ImageFolder,
    indices: Sequence[int],
    form: Form,
    comparison: Comparison,
) -> None:
    """Run every image through both networks, in batches of each size."""
    settings = loaded_as(network.card.preprocessing, form)
    with console.progress("proving on held-out images", len(indices)) as bar:
        for size, wanted in _rounds(indices):
            for batch in iterate_batches(images, wanted, settings, batch_size=size):
                expected = expected_outputs(network, batch.pixels, form)
                positions = batch.indices.tolist()
                for session in sessions:
                    scores, *maps = session.run({INPUT: expected.inputs}, form.outputs)
                    given = Given(scores=scores, maps=maps[0] if maps else None)
                    comparison.add(positions, expected.scores, expected.maps, given, session.name)
                if size == PROOF_BATCH:
                    bar.advance(len(positions))


def _rounds(indices: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    for size in BATCHES:
        yield size, list(islice(cycle(indices), size))
    yield PROOF_BATCH, list(indices)
