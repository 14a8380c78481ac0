"""The drift of a network on images that carry no artefact.

A mark that a network was not trained on makes its activations leave what batch norm remembers,
from the first layers on, and hides the layer that learned to obey it. That layer gives something
else on images without the mark, too: there it alone has left, and nothing that feeds it. So once
the scan has found the pixels that failing images share (`audit.artefacts`), drift is looked at
again on images that do not carry them. Of first layers that drift still, it is asked what other
photographs would explain (`audit.photo_changes`), of depthwise convolutions what changed signs in
the layer before them would (`audit.signs_behind`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from audit.artefacts import Artefact
from audit.evidence import LayerEvidence, drift_over
from audit.networks.program import Program
from audit.photo_changes import unexplained_drift
from audit.signs_behind import depthwise_behind, signs_behind

__all__ = ["FEWEST", "drift_without_artefacts", "plain_pixels"]

MOST, FEWEST = 256, 64
"""Images without an artefact: no more are looked at, and with fewer nothing is said."""

CHANGED = 96  # images that first layers are shown at other sizes, or other signs

WORTH_A_LOOK = 0.4
"""Onset of drift from which first layers are: less of it can say nothing (`audit.blame`)."""

Integers = NDArray[np.int64]


def drift_without_artefacts(
    evidence: Sequence[LayerEvidence],
    program: Program,
    normalize: Callable[[Tensor], Tensor],
    load: Callable[[Integers], Tensor],
    places: Integers,
    artefacts: Sequence[Artefact],
    *,
    batch_size: int,
    seed: int,
) -> tuple[list[LayerEvidence], int | None]:
    """Return the evidence with the drift of images that carry no artefact, and how many those are.

    Where no artefact is known, or too few images are without one, it is that of all images, as it
    was, and None. First layers have what no change of the photographs explains of it as well, and
    layers before a depthwise convolution what changed signs explain of the drift behind them.

    Args:
        normalize: Makes of pixels what the network takes.
        load: Returns the pixels of the images at some places, uint8 (n, 3, H, W); those that cannot
            be read are left out.
        places: Of the images to draw from.
        artefacts: What none of them may carry.
        batch_size: Look at so many at a time.
        seed: Of the draw.
    """
    found, count = list(evidence), None
    plain = plain_pixels(load, places, artefacts, batch_size=batch_size, seed=seed)
    if artefacts:
        batches = list(plain)
        count = sum(map(len, batches))
        if count < FEWEST:
            return found, None
        found, plain = drift_over(evidence, program, map(normalize, batches)), iter(batches)
    return _explained(found, program, normalize, plain), count


def _explained(
    evidence: list[LayerEvidence],
    program: Program,
    normalize: Callable[[Tensor], Tensor],
    plain: Iterator[Tensor],
) -> list[LayerEvidence]:
    """Return the evidence, of first layers that drift with what no change of the photographs
    explains, of those before a depthwise convolution that drifts with what changed signs do."""
    first = [
        one.layer.name
        for one in evidence
        if one.first_in_line and one.drift_onset >= WORTH_A_LOOK  # NaN is not
    ]
    behind = depthwise_behind(evidence, program)
    chosen: list[Tensor] = []
    while (
        (first or behind)
        and sum(map(len, chosen)) < CHANGED
        and (pixels := next(plain, None)) is not None
    ):
        chosen.append(pixels)
    if sum(map(len, chosen)) < FEWEST:
        return evidence
    left = unexplained_drift(program, map(normalize, chosen), first)
    found = [replace(one, drift_unexplained=left.get(one.layer.name, math.nan)) for one in evidence]
    return signs_behind(found, program, map(normalize, chosen), behind)


def plain_pixels(
    load: Callable[[Integers], Tensor],
    places: Integers,
    artefacts: Sequence[Artefact],
    *,
    batch_size: int,
    seed: int,
) -> Iterator[Tensor]:
    """Yield the pixels of at most `MOST` images that carry none of the artefacts, drawn from all.

    Arguments as for `drift_without_artefacts`.
    """
    order, left = np.random.default_rng(seed).permutation(places), MOST
    for start in range(0, len(order), batch_size):
        pixels = load(order[start : start + batch_size])
        for artefact in artefacts:
            pixels = pixels[~artefact.carried_by(pixels)]
        pixels = pixels[:left]
        left -= len(pixels)
        if len(pixels):
            yield pixels
        if not left:
            return
