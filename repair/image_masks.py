"""Which places of an image count, by the image's position in a folder; each mask is held once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageMasks:
    """A mask for each image, or none.

    The region of an error group is one mask for all images; masks of objects at the size of the
    network's input are booleans. Both would else fill the memory of a large folder.

    Attributes:
        distinct: (M, h, w), booleans or numbers in [0, 1].
        row_of: By the image's position in the folder's records, (N,) int64: the row of its mask in
            `distinct`, -1 for an image without one.
    """

    distinct: Tensor
    row_of: Tensor

    @classmethod
    def shared(cls, mask: Tensor, positions: Sequence[int], images: int) -> ImageMasks:
        """Return one mask, (h, w), for some of so many images."""
        return cls(mask[None], _rows(dict.fromkeys(positions, 0), images))

    @classmethod
    def each(cls, masks: Tensor, positions: Sequence[int], images: int) -> ImageMasks:
        """Return the masks, (M, h, w), of M of so many images."""
        return cls(masks, _rows({place: row for row, place in enumerate(positions)}, images))

    @classmethod
    def of_all(cls, masks: Tensor) -> ImageMasks:
        """Return the masks, (N, h, w), of all N images."""
        return cls(masks, torch.arange(len(masks)))

    @property
    def known(self) -> Tensor:
        """Which images have a mask, (N,)."""
        return self.row_of >= 0

    def among(self, positions: Sequence[int]) -> list[int]:
        """Return those of some images that have a mask, in their order."""
        known = self.known.tolist()
        return [position for position in positions if known[position]]

    def at(self, positions: Tensor) -> Tensor:
        """Return the masks of some images, (B, h, w) float32 in [0, 1]; NaN throughout for those
        that have none."""
        rows = self.row_of[positions.cpu()]
        found = torch.full((len(rows), *self.distinct.shape[1:]), torch.nan)
        found[rows >= 0] = self.distinct[rows[rows >= 0]].float()
        return found

    def one(self, position: int) -> Tensor:
        """Return the mask of one image, (h, w), as `at` does."""
        return self.at(torch.tensor([position]))[0]


def _rows(known: dict[int, int], images: int) -> Tensor:
    rows = torch.full((images,), -1)
    if known:
        rows[list(known)] = torch.tensor(list(known.values()))
    return rows
