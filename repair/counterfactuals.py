"""Training images whose forbidden pixels are another image's.

Where it is known what an image's class may depend on (masks of the objects), or may not (the region
of an error group), the rest can be made to say nothing: each image keeps its label and its allowed
pixels and takes the others from an image drawn at random. What goes with the class in the images as
they are, a watermark or a background, goes with nothing in these. Sources: Xiao et al. 2021 ("Noise
or signal", Mixed-Rand) for backgrounds, Plumb et al. 2022 (SPIRE) for artefacts.

Of few images a layer learns what each donor happens to show with a class. So an image may have
several counterfactuals, with other donors, and each epoch takes the next: as many steps, and as
many passes through the frozen prefix as there are donors, which can be cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from audit.images import ImageFolder, load_pixels
from audit.images.loading import ImageBatch
from repair.image_masks import ImageMasks

if TYPE_CHECKING:
    from audit.networks import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Counterfactuals:
    """How counterfactual images are made.

    Attributes:
        folder: The images.
        preprocessing: Of the images.
        allowed: Which pixels an image keeps, at the size of the network's input.
        donors: For each image that is changed, the position of the one that lends the other pixels.
        hide_objects: Whether what `allowed` keeps of a donor is its object, which must not show:
            the mean color of the donor's other pixels takes its place.
    """

    folder: ImageFolder
    preprocessing: Preprocessing
    allowed: ImageMasks
    donors: dict[int, int]
    hide_objects: bool

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the pixels depend on, beside the images' own."""
        pairs = sorted(self.donors.items())
        lenders = [self.folder.records[donor].sha256 for _, donor in pairs]
        digest = hashlib.sha256(repr((pairs, lenders, self.hide_objects)).encode())
        involved = sorted({*self.donors, *self.donors.values()})
        rows = self.allowed.row_of[torch.tensor(involved, dtype=torch.int64)].numpy()
        digest.update(rows.tobytes())
        for row in np.unique(rows):
            if row >= 0:
                digest.update(self.allowed.distinct[row].numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """Return the batch with every image changed that has a donor which can be read."""
        donor_of = {int(p): self.donors[int(p)] for p in batch.indices if int(p) in self.donors}
        lent = load_pixels(self.folder, sorted(set(donor_of.values())), self.preprocessing)
        row_of = {int(position): row for row, position in enumerate(lent.indices)}
        pixels = batch.pixels.clone()
        for row, position in enumerate(batch.indices.tolist()):
            donor = donor_of.get(position)
            if donor in row_of:
                foreign = lent.pixels[row_of[donor]].float()
                if self.hide_objects:
                    foreign = without_object(foreign, self.allowed.one(donor))
                kept = self.allowed.one(position)
                pixels[row] = (kept * pixels[row] + (1 - kept) * foreign).round().to(pixels.dtype)
        return ImageBatch(pixels=pixels, indices=batch.indices)


def draw_donors(
    positions: Sequence[int],
    allowed: ImageMasks,
    *,
    seed: int,
    version: int = 0,
    lenders: Sequence[int] | None = None,
) -> dict[int, int]:
    """Return for each image that can be changed another one, drawn at random.

    Images without a mask are not changed.

    Args:
        positions: Of the images of one split, in the folder's records.
        allowed: Which pixels an image keeps.
        seed: Of the draw; it comes out alike in every process.
        version: Of several draws by a seed.
        lenders: Positions of the images that may lend; those of the split when None.
    """
    lenders = positions if lenders is None else lenders
    place = {position: at for at, position in enumerate(lenders)}
    generator = np.random.default_rng([seed, len(positions), version])
    donors = {}
    for position in allowed.among(positions):
        others = len(lenders) - (position in place)
        if not others:
            continue
        drawn = int(generator.integers(others))
        if position in place and drawn >= place[position]:
            drawn += 1  # not itself
        donors[position] = lenders[drawn]
    return donors


def without_object(pixels: Tensor, mask: Tensor) -> Tensor:
    """Return an image with its object painted over in the mean color of all else.

    Args:
        pixels: (3, H, W), floating point.
        mask: Where the object is, (H, W) in [0, 1].
    """
    rest = 1 - mask
    mean = (pixels * rest).sum(dim=(1, 2)) / rest.sum().clamp(min=1)
    return pixels * rest + mean[:, None, None] * mask
