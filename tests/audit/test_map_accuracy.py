"""Scores of maps against masks, each against a slow loop or by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.transform import resize

from audit.map_accuracy import energy_inside, mask_areas, pointing_hits


def random_maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energy_inside_is_the_share_of_the_map_on_the_object() -> None:
    maps = random_maps(3, 6, 8)
    masks = (random_maps(3, 6, 8, seed=1) > 0.6).float()
    expected = []
    for heat, mask in zip(maps.numpy(), masks.numpy(), strict=True):
        inside = total = 0.0
        for row in range(6):
            for column in range(8):
                total += heat[row, column]
                inside += heat[row, column] * mask[row, column]
        expected.append(inside / total)
    np.testing.assert_allclose(energy_inside(maps, masks), expected, rtol=1e-12)


def test_small_maps_are_enlarged_to_the_masks_first() -> None:
    maps, mask = random_maps(1, 3, 4), torch.zeros(1, 12, 16)
    mask[0, 2:7, 5:11] = 1
    enlarged = resize(maps[0].numpy(), (12, 16), order=1, mode="edge", anti_aliasing=False)
    expected = enlarged[2:7, 5:11].sum() / enlarged.sum()
    assert float(energy_inside(maps, mask)) == pytest.approx(expected, rel=1e-9)


def test_a_map_without_preference_has_the_objects_area_inside() -> None:
    masks = (random_maps(4, 10, 10) > 0.7).float()
    flat = torch.full((4, 5, 5), 0.3)
    np.testing.assert_allclose(energy_inside(flat, masks), mask_areas(masks), rtol=1e-6)


def test_pixels_that_the_object_covers_in_part_count_in_part() -> None:
    heat = torch.tensor([[[1.0, 3.0]]])
    mask = torch.tensor([[[0.0, 0.25]]])
    assert float(energy_inside(heat, mask)) == pytest.approx(3 * 0.25 / 4)
    assert float(mask_areas(mask)) == 0.125


def test_the_peak_hits_or_misses_the_object() -> None:
    maps = torch.zeros(3, 8, 8)
    maps[0, 2, 3] = maps[1, 2, 3] = 1.0
    maps[2] = 0.0  # no peak: a miss, wherever the object is
    masks = torch.zeros(3, 8, 8)
    masks[0, 2, 3] = 1
    masks[1, 5:, 5:] = 1
    masks[2, 0, 0] = 1
    assert pointing_hits(maps, masks).tolist() == [True, False, False]


def test_a_tolerance_forgives_peaks_up_to_that_many_pixels_away() -> None:
    maps, masks = torch.zeros(1, 20, 20), torch.zeros(1, 20, 20)
    masks[0, 10, 10] = 1
    maps[0, 13, 14] = 1.0  # 3 down and 4 across: exactly 5 pixels away
    assert not pointing_hits(maps, masks, tolerance=4)
    assert pointing_hits(maps, masks, tolerance=5)


def test_a_map_that_is_zero_everywhere_lies_nowhere() -> None:
    assert energy_inside(torch.zeros(1, 4, 4), torch.ones(1, 8, 8)).tolist() == [0.0]


def test_scale_of_a_map_does_not_matter() -> None:
    maps, masks = random_maps(2, 7, 7), (random_maps(2, 28, 28, seed=2) > 0.5).float()
    for factor in (1e-30, 1e6):
        np.testing.assert_allclose(
            energy_inside(maps * factor, masks), energy_inside(maps, masks), rtol=1e-9
        )
