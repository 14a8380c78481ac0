"""Masks of a folder's images: what is held, and what is given out."""

from __future__ import annotations

import torch

from repair.image_masks import ImageMasks


def test_a_mask_of_many_images_is_held_once() -> None:
    mask = torch.rand(8, 8)
    masks = ImageMasks.shared(mask, range(0, 20_000, 2), 20_000)
    assert masks.distinct.numel() == 64
    found = masks.at(torch.tensor([4, 5, 19_998]))
    assert torch.equal(found[0], mask) and torch.equal(found[2], mask)
    assert found[1].isnan().all()
    assert int(masks.known.sum()) == 10_000


def test_each_image_has_its_own_mask_as_numbers() -> None:
    own = torch.rand(3, 4, 5) > 0.5
    masks = ImageMasks.each(own, [7, 2, 5], 9)
    assert masks.distinct.dtype == torch.bool
    for row, position in enumerate([7, 2, 5]):
        assert torch.equal(masks.one(position), own[row].float())
    assert masks.one(0).isnan().all() and masks.one(0).shape == (4, 5)
    assert masks.known.nonzero().flatten().tolist() == [2, 5, 7]


def test_nothing_is_known_of_images_without_masks() -> None:
    masks = ImageMasks.each(torch.empty(0, 2, 2), [], 3)
    assert not masks.known.any()
    assert masks.at(torch.tensor([0, 2])).isnan().all()
