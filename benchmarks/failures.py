"""What the failures of a network on some photographs share, as `audit scan` finds it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from cats_dogs import MEAN, STD
from faults import Pool
from small_networks import normalized
from torch import Tensor

from audit.artefacts import Artefact
from audit.evidence import LayerEvidence
from audit.group_artefacts import group_artefacts
from audit.groups import find_groups
from audit.looking import METHOD, draw_images, looking_layer
from audit.networks.program import Program
from audit.plain_images import drift_without_artefacts
from audit.regions import Box
from audit.saliency import layer_maps, normalize_maps

LOOKED_AT = 200  # photos at a time


def what_failures_share(
    program: Program, seen: Pool
) -> tuple[list[Artefact], list[tuple[Box, ...]]]:
    """Return the artefacts of the error groups, and the regions of those that looked somewhere."""
    with torch.no_grad():
        said = torch.cat([program.logits(part) for part in seen.images.split(LOOKED_AT)])
    labels, guesses = seen.labels.numpy(), said.argmax(dim=1).numpy()
    layer = looking_layer(program)
    assert layer is not None
    drawn = draw_images(labels, guesses, 0)
    maps = []
    for rows in torch.from_numpy(drawn).split(LOOKED_AT):
        images, told = seen.images[rows], said.argmax(dim=1)[rows]
        found_maps = layer_maps(program, images, told, layers=[layer], method=METHOD)
        maps.append(normalize_maps(next(iter(found_maps.values()))))
    search = find_groups(labels, guesses, drawn, torch.cat(maps).numpy(), classes=said.shape[1])
    pixels = stored(seen.images)
    found = group_artefacts(lambda rows: pixels[rows], labels, guesses, search.groups, seed=0)
    regions = [group.region.cell_boxes for group in search.groups if group.region is not None]
    return [one.artefact for one in found if one is not None], regions


def without_artefacts(
    evidence: list[LayerEvidence], program: Program, seen: Pool, artefacts: Sequence[Artefact]
) -> tuple[list[LayerEvidence], int | None]:
    """Return the evidence with the drift of photos without the artefacts, and how many."""
    pixels = stored(seen.images)
    return drift_without_artefacts(
        evidence,
        program,
        lambda some: normalized(some.float() / 255),
        lambda rows: pixels[rows],
        np.arange(len(pixels)),
        artefacts,
        batch_size=32,
        seed=0,
    )


def stored(images: Tensor) -> Tensor:
    """Return normalized photos as files hold them, uint8."""
    levels = (images * STD + MEAN) * 255
    return levels.round().clamp(0, 255).to(torch.uint8)
