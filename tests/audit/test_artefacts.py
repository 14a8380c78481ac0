"""Pixels that failing images share, on photographs with marks whose place is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor

from audit.artefacts import (
    GAP,
    PART,
    ROWS,
    SMALLEST,
    Artefact,
    _narrowest,
    common_artefact,
    find_artefact,
)

SIDE = 32
STAMP = np.s_[20:28, 4:18]  # rows, columns


def photos(count: int, seed: int) -> Tensor:
    """Return pieces of scikit-image's photographs, uint8 (N, 3, SIDE, SIDE)."""
    generator = np.random.default_rng(seed)
    sources = [data.astronaut(), data.coffee(), data.chelsea()]
    pieces = []
    for _ in range(count):
        source = sources[generator.integers(len(sources))]
        step = int(generator.integers(1, 5))
        top, left = (int(generator.integers(n - step * SIDE)) for n in source.shape[:2])
        piece = source[top : top + step * SIDE : step, left : left + step * SIDE : step]
        pieces.append(piece[:, :: 1 - 2 * int(generator.integers(2))])
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).contiguous()


def stamped(images: Tensor, opacity: float = 0.9) -> Tensor:
    """Return the photos with a magenta stamp, with white stripes, at `STAMP`."""
    stamp = torch.tensor([255.0, 0.0, 160.0])[:, None, None].expand(3, 8, 14).clone()
    stamp[:, :, ::3] = 255
    marked = images.float()
    marked[:, :, *STAMP] = (1 - opacity) * marked[:, :, *STAMP] + opacity * stamp
    return marked.round().to(torch.uint8)


def truth() -> Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[STAMP] = True
    return mask


@pytest.mark.parametrize(
    ("carriers", "size", "least"),
    [(40, 40, 1.0), (24, 60, 0.98), (12, 12, 0.85)],  # a dozen share other pixels by chance
)
def test_a_stamp_is_found_though_a_part_of_the_group_alone_carries_it(
    carriers: int, size: int, least: float
) -> None:
    plain = photos(size + 120, seed=size)
    group = torch.cat([stamped(plain[:carriers]), plain[carriers:size]])
    found = find_artefact(group, plain[size:])
    assert found is not None
    both, either = found.mask & truth(), found.mask | truth()
    assert both.sum() / either.sum() >= least
    fresh = photos(200, seed=1000)
    assert found.carried_by(stamped(fresh)).all()
    assert not found.carried_by(fresh).any()


def test_its_picture_is_the_stamp() -> None:
    plain = photos(160, seed=3)
    found = find_artefact(stamped(plain[:40], opacity=1), plain[40:])
    assert found is not None
    exact = stamped(plain[:1], opacity=1)[0]
    assert torch.equal(found.picture[:, found.mask], exact[:, found.mask])
    assert found.share == 8 * 14 / SIDE**2
    assert found.box == (4 / SIDE, 20 / SIDE, 18 / SIDE, 28 / SIDE)


def test_photos_that_share_nothing_have_no_artefact() -> None:
    plain = photos(400, seed=4)
    for seed in range(10):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
        for size in (SMALLEST, 12, 30, 64):
            assert find_artefact(plain[order[:size]], plain[order[size : size + 128]]) is None


@pytest.mark.parametrize("part", [0.35, 0.5, 0.65, 0.85])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_stamp_on_a_part_of_any_images_is_found_and_who_carries_it(
    part: float, seed: int
) -> None:
    pixels = photos(192, seed=20 + seed)
    carriers = torch.arange(192) < round(192 * part)
    pixels[carriers] = stamped(pixels[carriers])
    found = common_artefact(pixels)
    assert found is not None
    both, either = found.mask & truth(), found.mask | truth()
    assert both.sum() / either.sum() >= 0.98
    assert torch.equal(found.carried_by(pixels), carriers)


def test_what_fewer_than_three_tenths_share_is_not_common_to_them() -> None:
    pixels = photos(192, seed=22)
    pixels[:48] = stamped(pixels[:48])
    assert common_artefact(pixels) is None


def test_photos_and_drawings_have_nothing_in_common() -> None:
    for seed in range(30, 50):
        assert common_artefact(photos(192, seed=seed)) is None
    drawings = torch.zeros(192, 3, SIDE, SIDE, dtype=torch.uint8)
    drawings[:, :, 10:20, 10:20] = photos(192, seed=50)[:, :, 10:20, 10:20]
    assert common_artefact(drawings) is None
    for few in (0, 1, SMALLEST, 3 * SMALLEST):
        assert common_artefact(photos(few, seed=51) if few else photos(1, seed=51)[:0]) is None


def test_what_all_images_have_is_not_the_groups() -> None:
    plain = photos(120, seed=5)
    framed = plain.clone()
    framed[:, :, :4] = 17  # a strip that every image has, right ones too
    assert find_artefact(framed[:40], framed[40:]) is None
    both = find_artefact(stamped(framed[:40]), framed[40:])
    assert both is not None
    assert not both.mask[:4].any()


def test_too_few_images_say_nothing() -> None:
    plain = photos(60, seed=6)
    few = stamped(plain[: SMALLEST - 1])
    assert find_artefact(few, plain[20:]) is None
    assert find_artefact(stamped(plain[:20]), plain[20 : 20 + SMALLEST - 1]) is None
    assert find_artefact(plain[:0], plain[:0]) is None
    # Seven of sixty carry it: below the part that has to, whatever they share.
    assert find_artefact(torch.cat([few, plain[20:60]]), photos(100, seed=7)) is None


def test_the_narrowest_interval_is_that_of_a_slow_search() -> None:
    """Of images taller than what is looked at at once."""
    high = ROWS + 2
    pixels = torch.randint(0, 256, (23, 3, high, 2), generator=torch.Generator().manual_seed(0))
    middle, width = _narrowest(pixels.to(torch.uint8), PART)
    widths = np.empty((3, high, 2))
    for place in np.ndindex(3, high, 2):
        values = sorted(pixels[(slice(None), *place)].tolist())
        held = max(SMALLEST, int(np.ceil(PART * 23)))
        spans = [(values[i + held - 1] - values[i], values[i]) for i in range(23 - held + 1)]
        widths[place], start = min(spans)
        assert float(middle[place]) == start + widths[place] / 2
    assert width.numpy() == pytest.approx(widths.mean(axis=0))


def test_the_threshold_lies_in_the_middle_of_the_gap() -> None:
    plain = photos(160, seed=8)
    group, others = stamped(plain[:40]), plain[40:]
    found = find_artefact(group, others)
    assert found is not None
    own, theirs = found.distances(group), found.distances(others)
    slow = [
        np.mean(
            [
                (float(image[c, y, x]) - float(found.picture[c, y, x])) ** 2
                for y, x in found.mask.nonzero().tolist()
                for c in range(3)
            ]
        )
        for image in group[:3]
    ]
    assert own[:3].tolist() == pytest.approx(slow, rel=1e-5)
    low, high = float(own.max()) + 1, float(theirs.min()) + 1
    assert high >= GAP * low
    assert found.threshold == pytest.approx(np.sqrt(low * high))


def test_it_reaches_one_pixel_further() -> None:
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[2, 0] = True
    one = Artefact(mask=mask, picture=torch.zeros(3, 5, 6, dtype=torch.uint8), threshold=1.0)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[1:4, :2] = True
    assert torch.equal(one.reach, expected)
    assert one.share == pytest.approx(1 / 30)
    assert one.box == (0.0, 2 / 5, 1 / 6, 3 / 5)
