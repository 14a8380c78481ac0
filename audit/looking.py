"""Looking at failures: which images, at which layer, and what spoke for the answer that was given.

Maps are HiResCAM (Draelos and Carin 2020) of the *predicted* class. Grad-CAM weights a channel
alike wherever it fires and does not show a small mark that acts through a busy channel; HiResCAM
keeps the place. They are taken at the last convolution, unless its grid is too coarse to tell
regions apart: then at the deepest layer with a finer grid that nothing passes by (inside a residual
block a layer carries only a part of what the network saw).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from audit.images import ImageFolder, iterate_batches
from audit.networks import Network
from audit.networks.program import Program
from audit.saliency import Method, layer_maps, normalize_maps

__all__ = ["METHOD", "draw_images", "looking_layer", "predicted_class_maps"]

METHOD: Method = "hirescam"
IMAGES_LOOKED_AT = 512  # of wrong images, and as many right ones
FINE_GRID = 7  # cells along a side that tell ninths apart: more than two to each
PIXEL_GRID = 28  # a grid finer than this is close to the pixels, and its maps are noise

Integers = NDArray[np.int64]
Maps = NDArray[np.float32]


def looking_layer(program: Program) -> str | None:
    """Return the layer whose maps tell where the network looked, None where none has maps."""
    layers = [layer for layer in program.layers if layer.has_maps]
    if not layers:
        return None

    def grid(shape: tuple[int, ...], channels_last: bool) -> int:
        return min(shape[:2] if channels_last else shape[1:])

    cells = {layer.name: grid(layer.output_shape, layer.channels_last) for layer in layers}
    last = layers[-1].name
    if cells[last] >= FINE_GRID:
        return last
    for layer in reversed(layers):
        fine = FINE_GRID <= cells[layer.name] <= PIXEL_GRID
        if fine and _all_passes_through(program, layer.name):
            return layer.name
    return last


def _all_passes_through(program: Program, layer: str) -> bool:
    """Whether the layer is all that reads what comes before it: no branch or residual beside it."""
    crossing = program.split(layer).crossing_nodes
    return len(crossing) == 1 and len(crossing[0].users) == 1


def draw_images(labels: Integers, guesses: Integers, seed: int) -> Integers:
    """Draw wrong images, and right ones of the same predicted classes in like shares."""
    generator = np.random.default_rng(seed)
    wrong = generator.permutation(np.flatnonzero(labels != guesses))[:IMAGES_LOOKED_AT]
    right = generator.permutation(np.flatnonzero(labels == guesses))
    needed = np.bincount(guesses[wrong], minlength=int(guesses.max(initial=0)) + 1)
    right = right[needed[guesses[right]] > 0]
    turn = np.empty(len(right))  # when each comes up if classes take turns in shares of `needed`
    for answer in np.unique(guesses[right]):
        own = guesses[right] == answer
        turn[own] = np.arange(own.sum()) / needed[answer]
    return np.sort(
        np.concatenate([wrong, right[np.argsort(turn, kind="stable")][:IMAGES_LOOKED_AT]])
    )


def predicted_class_maps(
    network: Network,
    folder: ImageFolder,
    positions: Integers,
    drawn: Integers,
    guesses: Integers,
    layer: str,
    batch_size: int,
    workers: int,
    progress: Callable[[int], None],
) -> tuple[Integers, Maps]:
    """Return which of the drawn images could be loaded, and their maps (M, h, w) in [0, 1]."""
    place = {int(positions[i]): int(i) for i in drawn}
    seen: list[int] = []
    parts: list[Maps] = []
    for batch in iterate_batches(
        folder,
        list(place),
        network.card.preprocessing,
        batch_size=batch_size,
        workers=workers,
        pin_memory=network.program.device.type == "cuda",
    ):
        rows = [place[int(i)] for i in batch.indices]
        targets = torch.from_numpy(guesses[rows]).to(network.program.device)
        images = network.normalize(batch.pixels)
        found = layer_maps(network.program, images, targets, layers=[layer], method=METHOD)
        parts.append(normalize_maps(next(iter(found.values()))).float().cpu().numpy())
        seen += rows
        progress(len(rows))
    if not parts:
        return np.empty(0, dtype=np.int64), np.zeros((0, 1, 1), dtype=np.float32)
    return np.asarray(seen, dtype=np.int64), np.concatenate(parts)
