"""What the network says itself where nothing misleads it: to be learned from beside the labels.

Trained on a few images, a layer forgets some of what it knew. The network's own answers keep it
(Li and Hoiem 2016, "Learning without forgetting"), but where an artefact decides them they are what
is to be mended. There the artefact's pixels, or all that lies around the object, are taken from
`COPIES` other images in turn, and the logarithms of the answers are averaged: what the answer
depends on is averaged away with the pixels it came from, and what one lender happens to show with
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from audit.errors import RunError, UsageError
from audit.images import ImageFolder, iterate_batches
from repair.counterfactuals import Counterfactuals, draw_donors
from repair.guidance import Guidance

if TYPE_CHECKING:
    from audit.networks import Network

COPIES = 8
_SEED = 7919  # so that these lenders are not those of the counterfactuals


def own_answers(
    network: Network,
    folder: ImageFolder,
    positions: Sequence[int],
    guidance: Guidance,
    *,
    own: Sequence[int] | None = None,
    divisor: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    on_image: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Return the network's probabilities where what misleads it is hidden, (N, K) float32.

    N counts the folder's records; images that were not asked for or cannot be read have NaN.

    Args:
        network: As it was scanned.
        folder: The images.
        positions: Of all training images; they lend pixels.
        guidance: What is hidden: an artefact, or what the masks leave out.
        own: Positions of the images whose answers are asked for, all of them when None.
        divisor: Of the logits.
        batch_size: Images in one pass.
        seed: Of the lenders; an image has the same ones in every process.
        on_image: Called with the number of images that were looked at.

    Raises:
        RunError: All images show it, so that none can lend other pixels.
    """
    carriers, lenders = _carriers_and_lenders(network, folder, positions, guidance, batch_size)
    if carriers and not lenders:
        raise RunError(
            f"all {len(carriers)} training images carry the artefact of {guidance.source}, so none "
            "shows what else could be there; add images without it by --train DIR"
        )
    asked = set(positions if own is None else own)
    hidden = sorted(asked.intersection(carriers))
    plain = sorted(asked.difference(carriers))
    answers = torch.full((len(folder.records), len(network.card.classes)), torch.nan)
    for batch, said in _said(network, folder, plain, None, batch_size):
        answers[batch] = (said / divisor).softmax(dim=1).float()
        on_image(len(batch))
    sums = torch.zeros_like(answers, dtype=torch.float64)
    for copy in range(COPIES if hidden else 0):
        donors = draw_donors(
            carriers,
            guidance.masks,
            seed=COPIES * _SEED * (seed + 1) + copy,
            lenders=lenders,
        )
        lent = Counterfactuals(
            folder=folder,
            preprocessing=network.card.preprocessing,
            allowed=guidance.masks,
            donors=donors,
            hide_objects=guidance.hides_objects,
        )
        for batch, said in _said(network, folder, hidden, lent, batch_size):
            sums[batch] += (said / divisor).log_softmax(dim=1)
            on_image(len(batch))
    rows = torch.tensor(hidden, dtype=torch.int64)
    answers[rows] = (sums[rows] / COPIES).softmax(dim=1).float()
    return answers


def check_can_hide(guidance: Guidance) -> None:
    """Raise UsageError where a region alone is known, and not which images it misleads."""
    if guidance.artefact is None and not guidance.hides_objects:
        raise UsageError(
            f"the images of {guidance.source} share a region and no artefact, so it is not known "
            "what its answers owe to it; give --distill 0, or masks of the objects by --masks DIR"
        )


def _carriers_and_lenders(
    network: Network,
    folder: ImageFolder,
    positions: Sequence[int],
    guidance: Guidance,
    batch_size: int,
) -> tuple[list[int], list[int]]:
    """Return which images show what misleads the network, and which can lend other pixels: of an
    artefact those that carry it and the others, around objects all that have a mask."""
    if guidance.artefact is None:
        masked = guidance.masks.among(positions)
        return masked, masked
    carriers: list[int] = []
    lenders: list[int] = []
    for batch in iterate_batches(
        folder, positions, network.card.preprocessing, batch_size=batch_size
    ):
        carried = guidance.artefact.carried_by(batch.pixels).tolist()
        for position, carries in zip(batch.indices.tolist(), carried, strict=True):
            (carriers if carries else lenders).append(position)
    return carriers, lenders


def _said(
    network: Network,
    folder: ImageFolder,
    positions: Sequence[int],
    lent: Counterfactuals | None,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions and logits in double precision, batch by batch, on the CPU."""
    for batch in iterate_batches(
        folder, positions, network.card.preprocessing, batch_size=batch_size
    ):
        shown = batch if lent is None else lent(batch)
        with torch.no_grad():
            logits = network.program.logits(network.normalize(shown.pixels))
        yield batch.indices, logits.double().cpu()


def mixed_targets(answers: Tensor, labels: Sequence[int], share: float) -> Tensor:
    """Return `share` of the answers and for the rest the labels, (N, K); NaN rows stay NaN.

    Args:
        answers: (N, K).
        labels: True classes of all N.
        share: In [0, 1].
    """
    known = torch.tensor(list(labels), dtype=torch.int64)
    mixed = share * answers
    mixed[torch.arange(len(known)), known] += 1 - share
    return mixed
