"""What failing images share pixel for pixel: a stamp, a frame, a date burned into the corner.

An error group says what its images share in the network's eyes. Where an artefact is behind it,
they share pixels as well: in one place they hardly differ from each other, while other images of
the same classes differ there as much as images do. Nobody has to annotate anything.

    width       of the narrowest interval that holds a share of the values of a pixel
    shared      pixels whose width in the group is less than half of that in the other images
    carried by  images that are closer to what the group has there than the widest gap between the
                distances of all images; without a wide gap there is no artefact

A group holds errors that have other reasons too, so that a part of its images is enough (the
narrowest interval is the one-dimensional case of the minimum covariance determinant; Rousseeuw
1984, "Least median of squares regression", section 4, has it for one half). Found in that way, the
artefact is sought once more among the images that carry it, where it is seen more clearly.

Where the answers scatter over many classes there may be no group, or the right images carry the
artefact as well. So it is also sought among images of any kind, whatever the network says of them:
pixels that are narrow beside those of the rest of the image, and a gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Artefact", "common_artefact", "find_artefact"]

SMALLEST = 8  # images that have to carry it; five photos share pixels by chance
PART, MOST = 0.3, 0.5  # of the images that has to share it, and of those that carry it
FAR = 0.95  # of the distances of images of any kind are below those that may be chance
NARROW = 0.5  # times the width elsewhere
GAP = 2.0  # between distances: when it was chosen, at least 5 with a mark, at most 1.2 without
ROWS = 32  # of the images at a time, for memory's sake
GRAY_LEVEL = 1.0  # what differs by less may be rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Artefact:
    """Pixels that failing images share.

    Attributes:
        mask: Where they are, (H, W) bool.
        picture: What is there, (3, H, W) uint8; elsewhere it is of no use.
        threshold: Images no further from it than this carry it: mean squared difference in gray
            levels.
    """

    mask: Tensor
    picture: Tensor
    threshold: float

    @property
    def share(self) -> float:
        """Share of the image."""
        return float(self.mask.float().mean())

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the smallest rectangle around it, in [0, 1]."""
        height, width = self.mask.shape
        rows, columns = self.mask.any(dim=1).nonzero(), self.mask.any(dim=0).nonzero()
        return (
            int(columns.min()) / width,
            int(rows.min()) / height,
            (int(columns.max()) + 1) / width,
            (int(rows.max()) + 1) / height,
        )

    @property
    def reach(self) -> Tensor:
        """The mask and one pixel around it, where its edge is blurred, (H, W) bool."""
        return F.max_pool2d(self.mask[None, None].float(), 3, 1, 1)[0, 0] > 0

    def distances(self, pixels: Tensor) -> Tensor:
        """Return how far images are from carrying it, (N,): mean squared difference in gray levels.

        Args:
            pixels: uint8, (N, 3, H, W), cut and scaled as the group's were.
        """
        own = self.picture[:, self.mask].float()
        return (pixels[:, :, self.mask].float() - own).square().mean(dim=(1, 2))

    def carried_by(self, pixels: Tensor) -> Tensor:
        """Return which images carry it, (N,) bool; arguments as for `distances`."""
        return self.distances(pixels) <= self.threshold


def find_artefact(group: Tensor, others: Tensor) -> Artefact | None:
    """Return the pixels that a group's images share and others do not; None where there are none.

    Args:
        group: uint8, (N, 3, H, W).
        others: Images to compare with, best right ones of the same classes, uint8 (M, 3, H, W).
    """
    if min(len(group), len(others)) < SMALLEST:
        return None
    found = _common(group, others, PART)
    if found is None:
        return None
    carriers = group[found.carried_by(group)]
    return _common(carriers, others, MOST) if len(carriers) >= SMALLEST else None


def common_artefact(pixels: Tensor) -> Artefact | None:
    """Return the pixels that three tenths of some images or more share and the others do not.

    None where there are none. It looks at the images alone, so that a test of what is said of those
    that carry it is not of what it was found by.

    Args:
        pixels: uint8, (N, 3, H, W), drawn from all images alike.
    """
    if PART * len(pixels) < SMALLEST:
        return None
    picture, width = _narrowest(pixels, PART)
    usual = float(width.median())
    mask = width <= NARROW * usual
    if usual <= GRAY_LEVEL or not mask.any():  # the ground of drawings tells nothing apart
        return None
    found = Artefact(mask=mask, picture=picture.round().to(torch.uint8), threshold=0.0)
    distances = found.distances(pixels)
    low, high = (float(distances.quantile(share)) for share in (PART, FAR))
    threshold = _widest_gap(distances, low, high)
    if threshold is None:
        return None
    carried = distances <= threshold
    others = pixels[~carried]
    return _common(pixels[carried], others, MOST) if len(others) >= SMALLEST else None


def _common(group: Tensor, others: Tensor, share: float) -> Artefact | None:
    """Return what a share of a group's images has in common, where a wide gap sets it apart."""
    picture, width = _narrowest(group, share)
    # In as many images as the group has: of few, the narrowest interval is narrower.
    whole = max(1, len(others) // len(group))
    parts = torch.chunk(others[: whole * len(group)], whole)
    elsewhere = torch.stack([_narrowest(part, share)[1] for part in parts]).mean(dim=0)
    # What differs nowhere, the ground of a drawing, is not the group's.
    mask = (width <= NARROW * elsewhere) & (elsewhere > GRAY_LEVEL)
    if not mask.any():
        return None
    found = Artefact(mask=mask, picture=picture.round().to(torch.uint8), threshold=0.0)
    own, theirs = found.distances(group), found.distances(others)
    threshold = _widest_gap(
        torch.cat([own, theirs]), float(own.quantile(share)), float(theirs.median())
    )
    return None if threshold is None else replace(found, threshold=threshold)


def _narrowest(pixels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the middle and the width of the narrowest interval that holds a share of the values
    of each pixel, (3, H, W) and the mean over the channels, (H, W), in gray levels."""
    held = min(len(pixels), max(SMALLEST, math.ceil(share * len(pixels))))
    middles, widths = [], []
    for rows in torch.split(pixels, ROWS, dim=2):
        # Along the last axis, where the values lie side by side, sorting is several times as fast.
        ordered = rows.permute(1, 2, 3, 0).contiguous().sort(dim=-1).values.float()
        width, start = (ordered[..., held - 1 :] - ordered[..., : len(pixels) - held + 1]).min(-1)
        middles.append(ordered.gather(-1, start[..., None])[..., 0] + width / 2)
        widths.append(width.mean(dim=0))
    return torch.cat(middles, dim=1), torch.cat(widths)


def _widest_gap(distances: Tensor, low: float, high: float) -> float | None:
    """Return the middle of the widest gap between two bounds, None where none is wide."""
    ordered = distances[(distances >= low) & (distances <= high)].double().sort().values
    if len(ordered) < 2:
        return None
    steps = (ordered[1:] + GRAY_LEVEL) / (ordered[:-1] + GRAY_LEVEL)
    at = int(steps.argmax())
    if float(steps[at]) < GAP:
        return None
    return math.sqrt(float(ordered[at] + GRAY_LEVEL) * float(ordered[at + 1] + GRAY_LEVEL))
