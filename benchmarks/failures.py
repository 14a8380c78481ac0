"""What the failures of a network on some photographs share, as `audit scan` finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cats_dogs import MEAN, STD
from faults import Pool
from small_networks import normalized
from torch import Tensor

from audit.artefacts import Artefact
from audit.evidence import LayerEvidence
from audit.group_artefacts import groups_with_artefacts
from audit.looking import METHOD, draw_images, looking_layer
from audit.networks.program import Program
from audit.plain_images import drift_without_artefacts
from audit.regions import Box
from audit.saliency import layer_maps, normalize_maps

LOOKED_AT = 200  # photos at a time


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What failures share.

    Attributes:
        artefacts: Of the error groups.
        called_alike: How many of those are of groups by what was said or looked at.
        regions: Of the groups that looked somewhere.
    """

    artefacts: list[Artefact]
    called_alike: int
    regions: list[tuple[Box, ...]]


def what_failures_share(program: Program, seen: Pool) -> Shared:
    """Return what the error groups of some photos share."""
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
    pixels = stored(seen.images)
    search, found = groups_with_artefacts(
        lambda rows: pixels[rows],
        labels,
        guesses,
        drawn,
        torch.cat(maps).numpy(),
        classes=said.shape[1],
        seed=0,
    )
    told = [(group, one.artefact) for group, one in zip(search.groups, found, strict=True) if one]
    return Shared(
        artefacts=[artefact for _, artefact in told],
        called_alike=sum(group.kind != "artefact" for group, _ in told),
        regions=[group.region.cell_boxes for group in search.groups if group.region is not None],
    )


def without_artefacts(
    evidence: list[LayerEvidence], program: Program, seen: Pool, artefacts: Sequence[Artefact]
) -> tuple[list[LayerEvidence], int | None]:
    """Return the evidence with the drift of photos without the artefacts, and how many; of first
    layers with what no change of them explains."""
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
