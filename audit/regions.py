"""Where did the network look? Saliency maps put into plain words: corners, edges, center, border.

A map is summed up in the ninths of the image (a 3x3 grid) and in its quarters (2x2). The ninth and
the quarter that hold most of the map are where the network looked; edges, corners and border are
unions of ninths. The regions are fixed before any map is seen, so that a test of one of them has
nothing to answer for but that there are several.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["REGIONS", "Region", "energy_shares", "looked_at", "region_holding"]

Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the image that has a name.

    Attributes:
        name: In plain words, after "looking at".
        grid: Cells along each side of the grid that the region belongs to.
        cells: Which of its cells, row by row from the upper left.
    """

    name: str
    grid: int
    cells: tuple[int, ...]

    @property
    def area(self) -> float:
        """Share of the image."""
        return len(self.cells) / self.grid**2

    @property
    def cell_boxes(self) -> tuple[Box, ...]:
        """Left, top, right, bottom of each cell, in [0, 1]."""
        places = [divmod(cell, self.grid) for cell in self.cells]
        return tuple(
            (x / self.grid, y / self.grid, (x + 1) / self.grid, (y + 1) / self.grid)
            for y, x in places
        )

    @property
    def box(self) -> Box:
        """Left, top, right, bottom of the smallest rectangle around the cells, in [0, 1]."""
        lefts, tops, rights, bottoms = zip(*self.cell_boxes, strict=True)
        return min(lefts), min(tops), max(rights), max(bottoms)


_NINTHS = (
    "the upper left corner",
    "the middle of the top edge",
    "the upper right corner",
    "the middle of the left edge",
    "the center",
    "the middle of the right edge",
    "the lower left corner",
    "the middle of the bottom edge",
    "the lower right corner",
)
_QUARTERS = (
    "the upper left quarter",
    "the upper right quarter",
    "the lower left quarter",
    "the lower right quarter",
)
_UNIONS = {
    "the top edge": (0, 1, 2),
    "the left edge": (0, 3, 6),
    "the right edge": (2, 5, 8),
    "the bottom edge": (6, 7, 8),
    "one of the corners": (0, 2, 6, 8),
    "the border": (0, 1, 2, 3, 5, 6, 7, 8),
}

REGIONS: tuple[Region, ...] = (
    *(Region(name=name, grid=3, cells=(cell,)) for cell, name in enumerate(_NINTHS)),
    *(Region(name=name, grid=2, cells=(cell,)) for cell, name in enumerate(_QUARTERS)),
    *(Region(name=name, grid=3, cells=cells) for name, cells in _UNIONS.items()),
)


def looked_at(maps: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return whether each map looked at each region, (N, len(REGIONS)).

    A map looks at a cell of a grid if no other cell holds more of it; a map that is zero, or alike
    everywhere, looks at nothing.

    Args:
        maps: Saliency maps >= 0, (N, h, w).
    """
    cells = {}
    for grid in {region.grid for region in REGIONS}:
        shares = energy_shares(maps, grid)
        # Where all cells hold alike, the largest one is an accident of rounding.
        flat = np.ptp(shares, axis=1) < 1e-6
        cells[grid] = np.where(flat, -1, shares.argmax(axis=1))
    columns = [np.isin(cells[region.grid], region.cells) for region in REGIONS]
    return np.stack(columns, axis=1)


def region_holding(mask: NDArray[np.bool_], share: float = 0.8) -> Region | None:
    """Return the smallest region that holds so much of a mask, (H, W), and more of it than of the
    image; None where none does."""
    held = {
        grid: energy_shares(mask[None].astype(np.float64), grid)[0]
        for grid in {region.grid for region in REGIONS}
    }
    fitting = [
        region
        for region in REGIONS
        if held[region.grid][list(region.cells)].sum() >= max(share, region.area + 0.1)
    ]
    return min(fitting, key=lambda region: region.area, default=None)


def energy_shares(maps: NDArray[np.floating], grid: int) -> Floats:
    """Return how much of each map lies in each cell of a grid, (N, grid * grid).

    Each pixel of a map counts towards the cells that it overlaps, by the overlap's area. Rows sum
    to one; those of maps that are zero everywhere hold zeros.

    Args:
        maps: Saliency maps >= 0, (N, h, w).
        grid: Cells along each side.
    """
    values = np.asarray(maps, dtype=np.float64)
    height, width = values.shape[1:]
    sums = np.einsum("gh,nhw,kw->ngk", _overlap(height, grid), values, _overlap(width, grid))
    flat: Floats = sums.reshape(len(values), grid * grid)
    total = flat.sum(axis=1, keepdims=True)
    return np.asarray(flat / np.where(total > 0, total, 1))


def _overlap(pixels: int, grid: int) -> Floats:
    """Return which part of each pixel along a side lies in each cell, (grid, pixels)."""
    edges, borders = np.linspace(0, 1, pixels + 1), np.linspace(0, 1, grid + 1)
    ends = np.minimum(edges[None, 1:], borders[1:, None])
    starts = np.maximum(edges[None, :-1], borders[:-1, None])
    return np.asarray(np.maximum(0, ends - starts) * pixels)
