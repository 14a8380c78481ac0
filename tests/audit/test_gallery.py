"""Maps laid over pictures: the right place, the right way up, readable by everyone."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit.errors import RunError
from audit.gallery import card, color_scale, heat_picture, layer_strip, outcome, overlay
from tests.run_builder import FAULTY, build_run


def test_a_map_lights_the_place_it_points_to() -> None:
    pixels = np.full((40, 60, 3), 120, dtype=np.uint8)
    heat = np.zeros((4, 6))
    heat[0, 5] = 1.0  # top right
    changed = np.abs(overlay(pixels, heat).astype(int) - pixels).sum(axis=2)
    y, x = np.unravel_index(changed.argmax(), changed.shape)
    assert y < 10 and x >= 50
    assert changed[30:, :30].max() == 0


def test_a_dark_map_shows_the_picture_half_gray() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    gray = np.asarray(Image.fromarray(pixels).convert("L"), dtype=float)[..., None]
    shown = overlay(pixels, np.zeros((2, 2)))
    assert shown.dtype == np.uint8
    assert np.abs(shown - (pixels + gray) / 2).max() <= 1.5


def test_values_outside_the_range_do_not_wrap_around() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    assert np.array_equal(overlay(pixels, np.full((2, 2), 9.0)), overlay(pixels, np.ones((2, 2))))
    assert np.array_equal(
        overlay(pixels, np.full((2, 2), np.nan)), overlay(pixels, np.zeros((2, 2)))
    )


def test_the_color_scale_gets_lighter_all_the_way() -> None:
    colors = [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in color_scale()]
    luminance = np.array(colors) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"right": True}, "right"),
        ({"right": False}, "wrong"),
        ({"right": False, "right_after": True}, "fixed"),
        ({"right": True, "right_after": False}, "broken"),
        ({"right": True, "right_after": True}, "right"),
        ({"right": False, "right_after": False}, "wrong"),
        ({}, "unknown"),
    ],
)
def test_outcomes_compare_before_and_after(entry: dict[str, bool], expected: str) -> None:
    assert outcome(entry) == expected


def test_cards_hold_the_picture_and_its_maps(tmp_path: Path) -> None:
    run = build_run(tmp_path, repairs=("accepted",), images=120)
    scanned = card(run, 0, "gradcam", FAULTY)
    assert [picture.title for picture in scanned.pictures] == ["Image", "Map"]
    assert scanned.name == run.gallery["images"][0]["path"]
    repaired = card(run.repairs[0], 0, "gradcam", FAULTY)
    assert [picture.title for picture in repaired.pictures] == ["Image", "Before", "After"]
    encoded = repaired.pictures[2].uri.removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.size == (96, 96)


def test_a_map_is_clear_where_it_is_zero_and_its_values_can_be_read() -> None:
    heat = np.zeros((24, 36))
    heat[:12, :9] = 0.5
    picture = heat_picture("Map", "", heat, cells=12)
    with Image.open(io.BytesIO(base64.b64decode(picture.heat.partition(",")[2]))) as drawn:
        pixels = np.asarray(drawn)
    assert pixels.shape == (64, 64, 4)
    assert pixels[0, 0, 3] == round(255 * 0.5**0.5) and pixels[-1, -1, 3] == 0
    # 2 x 3 pixels a cell, by a plain loop
    means = [
        [f"{heat[2 * r : 2 * r + 2, 3 * c : 3 * c + 3].mean():.2f}" for c in range(12)]
        for r in range(12)
    ]
    assert [list(row) for row in picture.values] == means


def test_values_of_a_map_that_does_not_divide_are_those_of_its_parts() -> None:
    heat = np.arange(35, dtype=float).reshape(5, 7) / 34
    values = heat_picture("Map", "", heat, cells=3).values
    rows, columns = [(0, 1), (1, 3), (3, 5)], [(0, 2), (2, 4), (4, 7)]
    assert [list(row) for row in values] == [
        [f"{heat[top:bottom, left:right].mean():.2f}" for left, right in columns]
        for top, bottom in rows
    ]


def test_a_strip_has_the_layers_that_have_maps_in_order(tmp_path: Path) -> None:
    run = build_run(tmp_path, images=120)
    titles = {"features.0": "first", "classifier.0": "no maps", FAULTY: "faulty"}
    assert [one.title for one in layer_strip(run, 3, "gradcam", titles)] == ["first", "faulty"]


def test_a_gallery_with_too_few_maps_is_refused(tmp_path: Path) -> None:
    run = build_run(tmp_path, images=120)
    run.write_maps("gradcam", FAULTY, np.zeros((2, 3, 3)))
    with pytest.raises(RunError, match="only 2 maps"):
        card(run, 5, "gradcam", FAULTY)


def test_a_missing_picture_is_one_clear_line(tmp_path: Path) -> None:
    run = build_run(tmp_path, images=120)
    run.gallery_image("0000").unlink()
    with pytest.raises(RunError, match=r"picture 0000\.png cannot be read"):
        card(run, 0, "gradcam", FAULTY)
