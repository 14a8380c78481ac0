"""How often a network is right by what lies around the objects alone.

Masks say where the objects are, and not whether the rest of an image misleads. So the objects are
painted over and the network is asked what it sees. Where it goes by the surroundings it is then
right as often as these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from audit import console
from audit.images import ImageFolder, iterate_batches
from repair.counterfactuals import without_object
from repair.guidance import object_masks_at

if TYPE_CHECKING:
    from audit.networks import Network

ASKED, FEWEST = 256, 20  # images


def share_right_without_objects(
    network: Network,
    folder: ImageFolder,
    positions: Sequence[int],
    masks: Path,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> float | None:
    """Return the share of images that the network gets right with their objects painted over.

    None where fewer than `FEWEST` of those drawn have a mask and can be read.

    Args:
        network: As it was scanned.
        folder: The images.
        positions: Of the images, in the folder's records; at most `ASKED` are drawn.
        masks: Folder of masks or COCO file.
        seed: Of the draw.
        batch_size: Images in one pass.

    Raises:
        ImageError: The masks cannot be used.
    """
    chosen = np.random.default_rng([seed, ASKED]).permutation(positions)[:ASKED].tolist()
    preprocessing = network.card.preprocessing
    objects = object_masks_at(folder, chosen, masks, preprocessing, network.program.input_size)
    masked = objects.among(chosen)
    right = asked = 0
    with console.progress("asking the network, objects painted over", len(masked)) as bar:
        for batch in iterate_batches(folder, masked, preprocessing, batch_size=batch_size):
            hidden = [
                without_object(pixels.float(), objects.one(position))
                for pixels, position in zip(batch.pixels, batch.indices.tolist(), strict=True)
            ]
            images = torch.stack(hidden).round().to(batch.pixels.dtype)
            with torch.no_grad():
                said = network.program.logits(network.normalize(images)).argmax(dim=1).tolist()
            labels = [folder.records[position].label for position in batch.indices.tolist()]
            right += sum(one == label for one, label in zip(said, labels, strict=True))
            asked += len(labels)
            bar.advance(len(labels))
    return right / asked if asked >= FEWEST else None
