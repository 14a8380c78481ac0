"""The drift of a network on images that carry no artefact.

A mark that a network was not trained on makes its activations leave what batch norm remembers,
from the first layers on, and hides the layer that learned to obey it. That layer gives something
else on images without the mark, too: there it alone has left, and nothing that feeds it. So once
the scan has found the pixels that failing images share (`audit.artefacts`), drift is looked at
again on images that do not carry them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from audit.artefacts import Artefact
from audit.evidence import LayerEvidence, drift_over
from audit.networks.program import Program

__all__ = ["FEWEST", "drift_without_artefacts", "plain_pixels"]

MOST, FEWEST = 256, 64
"""Images without an artefact: no more are looked at, and with fewer nothing is said."""

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
    was, and None.

    Args:
        normalize: Makes of pixels what the network takes.
        load: Returns the pixels of the images at some places, uint8 (n, 3, H, W); those that cannot
            be read are left out.
        places: Of the images to draw from.
        artefacts: What none of them may carry.
        batch_size: Look at so many at a time.
        seed: Of the draw.
    """
    if not artefacts:
        return list(evidence), None
    batches = list(plain_pixels(load, places, artefacts, batch_size=batch_size, seed=seed))
    count = sum(map(len, batches))
    if count < FEWEST:
        return list(evidence), None
    return drift_over(evidence, program, map(normalize, batches)), count


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
