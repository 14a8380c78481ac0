"""Maps in words: a bright spot is found where it lies, on coarse grids and on fine ones."""

from __future__ import annotations

import numpy as np
import pytest

from audit.regions import REGIONS, energy_shares, looked_at, region_holding

BY_NAME = {region.name: region for region in REGIONS}


def regions_of(heat: np.ndarray) -> set[str]:
    (row,) = looked_at(heat[None])
    return {region.name for region, there in zip(REGIONS, row, strict=True) if there}


@pytest.mark.parametrize(("height", "width", "grid"), [(7, 7, 3), (4, 5, 3), (2, 3, 3), (5, 8, 2)])
def test_energy_is_shared_by_area(height: int, width: int, grid: int) -> None:
    maps = np.random.default_rng(0).random((3, height, width))
    # Slow and plain: cut every pixel into so many pieces that none of them crosses a border.
    fine = maps.repeat(grid, axis=1).repeat(grid, axis=2)
    slow = np.zeros((3, grid, grid))
    for y in range(height * grid):
        for x in range(width * grid):
            slow[:, y // height, x // width] += fine[:, y, x]
    slow /= slow.sum(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(energy_shares(maps, grid), slow.reshape(3, -1), atol=1e-12)


@pytest.mark.parametrize("side", [3, 4, 7, 14])
@pytest.mark.parametrize(
    ("y", "x", "expected"),
    [
        (0, 0, {"the upper left corner", "the top edge", "the left edge", "one of the corners"}),
        (-1, -1, {"the lower right corner", "the lower right quarter", "the bottom edge"}),
        (0, -1, {"the upper right corner", "the upper right quarter", "the right edge"}),
        (-1, 0, {"the lower left corner", "the lower left quarter", "the bottom edge"}),
    ],
)
def test_a_spot_is_named_by_where_it_lies(side: int, y: int, x: int, expected: set[str]) -> None:
    heat = np.full((side, side), 0.01)
    heat[y, x] = 1
    found = regions_of(heat)
    assert expected <= found and "the border" in found and "the center" not in found
    assert sum("corner" in name for name in found) == 2  # the corner, and one of the corners


def test_the_middle_is_the_center_and_not_the_border() -> None:
    heat = np.zeros((7, 7))
    heat[3, 3] = 1
    assert "the center" in regions_of(heat) and "the border" not in regions_of(heat)


@pytest.mark.parametrize("heat", [np.zeros((5, 5)), np.ones((7, 7)), np.ones((1, 1))])
def test_a_map_without_a_place_looks_at_nothing(heat: np.ndarray) -> None:
    assert regions_of(heat) == set()


def test_boxes_are_left_top_right_bottom() -> None:
    assert BY_NAME["the lower right quarter"].box == (0.5, 0.5, 1, 1)
    assert BY_NAME["the upper right corner"].box == pytest.approx((2 / 3, 0, 1, 1 / 3))
    assert BY_NAME["the bottom edge"].box == pytest.approx((0, 2 / 3, 1, 1))
    assert BY_NAME["one of the corners"].box == (0, 0, 1, 1)
    assert len(BY_NAME["one of the corners"].cell_boxes) == 4
    assert BY_NAME["the border"].area == pytest.approx(8 / 9)


@pytest.mark.parametrize(
    ("rows", "columns", "name"),
    [
        (slice(77, 98), slice(47, 98), "the lower right quarter"),
        (slice(70, 98), slice(70, 98), "the lower right corner"),
        (slice(0, 20), slice(0, 100), "the top edge"),
        (slice(40, 60), slice(45, 55), "the center"),
        (slice(0, 100), slice(0, 100), None),
        (slice(5, 70), slice(5, 95), None),
    ],
)
def test_a_mask_lies_in_the_smallest_region_that_holds_four_fifths_of_it(
    rows: slice, columns: slice, name: str | None
) -> None:
    mask = np.zeros((100, 100), dtype=bool)
    mask[rows, columns] = True
    found = region_holding(mask)
    assert (found and found.name) == name


def test_a_frame_lies_at_the_border() -> None:
    mask = np.ones((100, 100), dtype=bool)
    mask[4:-4, 4:-4] = False
    found = region_holding(mask)
    assert found is not None and found.name == "the border"
