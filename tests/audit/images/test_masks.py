"""Masks are found by name, read as they are meant, and laid out like the photos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from audit.errors import ImageError
from audit.images import open_image_folder
from audit.images.coco import outline, read_coco
from audit.images.decoding import UnreadableImageError, decode, decode_mask, preprocess
from audit.images.masks import ObjectMasks, object_mask, open_masks
from audit.networks.card import Preprocessing

Photo = Callable[..., Image.Image]

WHOLE = Preprocessing(
    input_size=(16, 24), mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest", crop=1.0
)


@pytest.fixture
def photos(tmp_path: Path, photo: Photo) -> Path:
    """Two classes with two photos each, of which 001 is a name in both."""
    root = tmp_path / "photos"
    for number, name in enumerate(("cat/001.jpg", "cat/002.png", "dog/001.png", "dog/003.png")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    return root


def opened(path: Path, photos: Path, **settings: Any) -> ObjectMasks:
    return open_masks(path, open_image_folder(photos, ("cat", "dog"), **settings))


def save_mask(path: Path, mask: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = box(2, 3, 9, 8) if mask is None else mask
    Image.fromarray(np.where(mask, 1, 0).astype(np.uint8)).save(path)


def box(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = (24, 16)) -> Any:
    mask = np.zeros((size[1], size[0]), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


# -------------------------------------------------------------------- which mask is whose


def test_masks_in_class_folders_belong_to_the_photos_of_the_same_path(
    tmp_path: Path, photos: Path
) -> None:
    for name in ("cat/001", "dog/001"):
        save_mask(tmp_path / "masks" / f"{name}.png")
    masks = opened(tmp_path / "masks", photos)
    assert dict(masks.files) == {"cat/001.jpg": "cat/001.png", "dog/001.png": "dog/001.png"}
    assert "cat/001.jpg" in masks and "cat/002.png" not in masks
    assert (masks.kind, masks.unused) == ("folder", 0)


def test_masks_side_by_side_belong_to_photos_whose_name_is_theirs_alone(
    tmp_path: Path, photos: Path
) -> None:
    for name in ("001", "002", "003", "009"):
        save_mask(tmp_path / "masks" / f"{name}.png")
    masks = opened(tmp_path / "masks", photos)
    assert dict(masks.files) == {"cat/002.png": "002.png", "dog/003.png": "003.png"}
    assert masks.unused == 2


def test_a_sample_of_the_photos_makes_no_name_unique(tmp_path: Path, photos: Path) -> None:
    """With one photo scanned, 001 is still a name that two photos share."""
    save_mask(tmp_path / "masks" / "001.png")
    for seed in range(8):
        with pytest.raises(ImageError, match="named like a photo"):
            opened(tmp_path / "masks", photos, limit=1, seed=seed)


def test_two_masks_of_one_name_are_none(tmp_path: Path, photos: Path) -> None:
    for name in ("002.png", "002.bmp", "003.png"):
        save_mask(tmp_path / "masks" / name)
    assert set(opened(tmp_path / "masks", photos).files) == {"dog/003.png"}


def test_splits_above_the_class_folders_may_be_left_out_or_kept(
    tmp_path: Path, photos: Path
) -> None:
    for split in ("train", "val"):
        (tmp_path / "split" / split).mkdir(parents=True)
    (photos / "cat").rename(tmp_path / "split" / "train" / "cat")
    (photos / "dog").rename(tmp_path / "split" / "train" / "dog")
    save_mask(tmp_path / "masks" / "train" / "dog" / "001.png")
    save_mask(tmp_path / "masks" / "cat" / "001.png")
    masks = opened(tmp_path / "masks", tmp_path / "split")
    assert dict(masks.files) == {
        "train/cat/001.jpg": "cat/001.png",
        "train/dog/001.png": "train/dog/001.png",
    }


def test_names_that_match_nothing_are_one_error_with_the_remedy(
    tmp_path: Path, photos: Path
) -> None:
    save_mask(tmp_path / "masks" / "mask_a.png")
    with pytest.raises(ImageError) as error:
        opened(tmp_path / "masks", photos)
    text = str(error.value)
    assert "cat/001.png" in text and "mask_a.png" in text and "name masks like" in text
    assert "\n" not in text
    with pytest.raises(ImageError, match="give a folder of mask images or a COCO JSON file"):
        opened(tmp_path / "nothing", photos)


def test_masks_that_are_all_unusable_are_one_error_with_the_first_reason(
    tmp_path: Path, photos: Path
) -> None:
    save_mask(tmp_path / "masks" / "cat" / "001.png", box(0, 0, 5, 5, (30, 30)))
    save_mask(tmp_path / "masks" / "cat" / "002.png", box(0, 0, 0, 0))
    (tmp_path / "masks" / "003.png").write_text("no image")
    with pytest.raises(ImageError, match=r"none of the 3 masks .* 30 x 30 pixels .* 24 x 16"):
        opened(tmp_path / "masks", photos)


# -------------------------------------------------------------------- what a mask says


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_every_pixel_that_is_not_zero_is_object(tmp_path: Path, mode: str) -> None:
    expected = box(2, 3, 9, 8)
    values = expected.astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(values, mode=None).convert("L")
        image.putpalette([7, 7, 7, 0, 0, 0])  # index 1 is black: the index counts
        assert image.mode == "P"
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode in ("1", "L"):
        image = Image.fromarray(expected if mode == "1" else values)
    elif mode == "RGB":
        image = Image.fromarray(np.stack([0 * values, values, 0 * values], axis=2))
    else:  # a part of the mask that is transparent is no object
        clear = box(0, 0, 24, 16) & ~box(20, 0, 24, 16)
        shown = (expected | box(20, 0, 24, 16)).astype(np.uint8)
        channels = [shown] * (3 if mode == "RGBA" else 1) + [clear.astype(np.uint8) * 255]
        image = Image.fromarray(np.stack(channels, axis=2), mode=None)
    assert image.mode == mode
    path = tmp_path / ("mask.tif" if mode == "I;16" else "mask.png")
    image.save(path)
    assert np.array_equal(decode_mask(path), expected)


def test_the_black_of_jpeg_masks_is_no_object(tmp_path: Path) -> None:
    expected = box(4, 4, 12, 12)
    Image.fromarray(np.where(expected, 255, 0).astype(np.uint8)).save(
        tmp_path / "m.jpg", quality=60
    )
    noisy = np.asarray(Image.open(tmp_path / "m.jpg"))
    assert ((noisy > 0) != expected).any()
    assert (decode_mask(tmp_path / "m.jpg") == expected).mean() > 0.97


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_lie_over_rotated_photos_as_these_are_shown(tmp_path: Path, orientation: int) -> None:
    """The photo is stored turned, with the EXIF note; the mask is drawn on the upright one."""
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[3:8, 2:9] = 255
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = Image.fromarray(upright)
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photos" / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    stored.save(path, exif=exif)
    save_mask(tmp_path / "masks" / "a.png")
    masks = opened(tmp_path / "masks", tmp_path / "photos")
    mask = object_mask(masks, "cat/a.png", WHOLE)
    seen = preprocess(decode(path), WHOLE)[0] > 127
    assert np.array_equal(mask > 0.5, seen)


@pytest.mark.parametrize("size", [(24, 16), (50, 80), (200, 64), (31, 97)])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.5])
def test_the_mask_is_scaled_and_cut_like_the_photo(
    tmp_path: Path, size: tuple[int, int], crop: float
) -> None:
    """A photo that is white exactly where its mask is: preprocessed, the two agree."""
    settings = Preprocessing(
        input_size=(20, 28), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", crop=crop
    )
    width, height = size
    mask = box(width * 2 // 5, height * 2 // 5, width * 3 // 5, height * 11 // 20, size)
    photo = tmp_path / "photos" / "cat" / "a.png"
    photo.parent.mkdir(parents=True)
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).convert("RGB").save(photo)
    save_mask(tmp_path / "masks" / "a.png", mask)
    masks = opened(tmp_path / "masks", tmp_path / "photos")
    covered = object_mask(masks, "cat/a.png", settings)
    seen = preprocess(decode(photo), settings)[0] / 255
    assert covered.shape == (20, 28) and covered.dtype == np.float32
    assert covered.min() >= 0 and covered.max() <= 1
    # Bilinear scaling blurs edges by up to a pixel, area scaling does not; neither moves anything.
    assert ((covered > 0.5) != (seen > 0.5)).mean() < 0.08
    for axis in (0, 1):
        places = np.arange(covered.shape[axis])
        means = [np.average(places, weights=one.sum(axis=1 - axis)) for one in (covered, seen)]
        assert abs(means[0] - means[1]) <= 0.5


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path, photos: Path) -> None:
    save_mask(tmp_path / "masks" / "cat" / "001.png")
    save_mask(tmp_path / "masks" / "cat" / "002.png", box(0, 0, 5, 5, (16, 24)))
    masks = opened(tmp_path / "masks", photos)
    object_mask(masks, "cat/001.jpg", WHOLE)
    with pytest.raises(
        UnreadableImageError, match="16 x 24 pixels and its photo, upright, 24 x 16"
    ):
        object_mask(masks, "cat/002.png", WHOLE)


# -------------------------------------------------------------------- COCO files


def coco(path: Path, images: dict[str, list[dict[str, Any]]], **more: Any) -> Path:
    document: dict[str, Any] = {"images": [], "annotations": [], **more}
    for number, (name, shapes) in enumerate(images.items(), start=10):
        document["images"].append({"id": number, "file_name": name, "width": 24, "height": 16})
        document["annotations"] += [{"image_id": number, **one} for one in shapes]
    path.write_text(json.dumps(document))
    return path


def drawn(path: Path) -> np.ndarray:
    (image,) = read_coco(path)
    return outline(image, (24, 16))


def test_a_box_is_x_y_width_height(tmp_path: Path) -> None:
    path = coco(tmp_path / "c.json", {"a.png": [{"bbox": [2, 3, 7, 5]}]})
    assert np.array_equal(drawn(path), box(2, 3, 9, 8))


def test_a_polygon_around_whole_pixels_covers_just_these(tmp_path: Path) -> None:
    corners = [2, 3, 9, 3, 9, 8, 2, 8]
    path = coco(tmp_path / "c.json", {"a.png": [{"segmentation": [corners], "bbox": [0, 0, 1, 1]}]})
    assert np.array_equal(drawn(path), box(2, 3, 9, 8))


def test_a_polygon_covers_the_pixels_whose_centers_lie_inside(tmp_path: Path) -> None:
    """Against a slow loop over pixels: the even-odd rule by hand."""
    corners = [(1.3, 0.7), (20.2, 4.9), (11.6, 14.8), (9.1, 6.2), (3.4, 13.3)]
    path = coco(
        tmp_path / "c.json", {"a.png": [{"segmentation": [[v for xy in corners for v in xy]]}]}
    )
    expected = np.zeros((16, 24), dtype=bool)
    for row in range(16):
        for column in range(24):
            x, y = column + 0.5, row + 0.5
            for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
                if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
                    expected[row, column] ^= True
    assert np.array_equal(drawn(path), expected)


def test_run_lengths_count_down_the_columns(tmp_path: Path) -> None:
    mask = box(2, 3, 9, 8) | box(20, 0, 22, 16)
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    counts = np.diff([0, *changes, flat.size]).tolist()
    path = coco(
        tmp_path / "c.json", {"a.png": [{"segmentation": {"counts": counts, "size": [16, 24]}}]}
    )
    assert np.array_equal(drawn(path), mask)


def test_several_shapes_are_one_object(tmp_path: Path) -> None:
    shapes = [{"bbox": [0, 0, 4, 4]}, {"segmentation": [[9, 9, 12, 9, 12, 12, 9, 12]]}]
    path = coco(tmp_path / "c.json", {"a.png": shapes})
    assert np.array_equal(drawn(path), box(0, 0, 4, 4) | box(9, 9, 12, 12))


def test_shapes_of_the_photos_own_class_count_where_categories_are_classes(
    tmp_path: Path, photos: Path
) -> None:
    shapes = [{"bbox": [0, 0, 4, 4], "category_id": 1}, {"bbox": [9, 9, 3, 3], "category_id": 2}]
    images = {"cat/002.png": shapes, "dog/003.png": shapes[:1]}
    named = [{"id": 1, "name": "Cat"}, {"id": 2, "name": "person"}]
    masks = opened(coco(tmp_path / "c.json", images, categories=named), photos)
    assert masks.kind == "coco"
    assert np.array_equal(object_mask(masks, "cat/002.png", WHOLE) > 0.5, box(0, 0, 4, 4))
    # No category is called dog: everything that is outlined is the object.
    assert "dog/003.png" in masks
    also_dogs = [*named, {"id": 3, "name": "dog"}]
    masks = opened(coco(tmp_path / "c.json", images, categories=also_dogs), photos)
    assert "dog/003.png" not in masks


@pytest.mark.parametrize("name", ["cat/002.png", "cat\\002.png", "images/v1/002.png", "002.jpg"])
def test_coco_images_are_found_by_path_or_by_a_name_of_their_own(
    tmp_path: Path, photos: Path, name: str
) -> None:
    path = coco(tmp_path / "c.json", {name: [{"bbox": [2, 3, 7, 5]}], "b/9.png": []})
    assert set(opened(path, photos).outlines) == {"cat/002.png"}


def test_coco_names_that_match_nothing_say_both_sides(tmp_path: Path, photos: Path) -> None:
    path = coco(tmp_path / "c.json", {"street/17.png": [{"bbox": [2, 3, 7, 5]}]})
    with pytest.raises(ImageError, match=r"street/17\.png, photos are called cat/001\.jpg"):
        opened(path, photos)


@pytest.mark.parametrize(
    "annotation, reason",
    [
        ({"segmentation": {"counts": "abc", "size": [16, 24]}}, "run lengths are compressed"),
        ({"segmentation": {"counts": [5], "size": [4, 4]}}, "a shape cannot be read"),
        ({"segmentation": {"counts": [5, 6], "size": [16, 24]}}, "a shape cannot be read"),
        ({"segmentation": [[1, 2, 3]]}, "a shape cannot be read"),
        ({"category_id": 1}, "a shape cannot be read .KeyError: 'bbox'"),
        ({"bbox": [100, 100, 5, 5]}, "marks no pixel"),
    ],
)
def test_a_shape_that_cannot_be_meant_is_a_reason(
    tmp_path: Path, photos: Path, annotation: dict[str, Any], reason: str
) -> None:
    images = {"cat/002.png": [annotation], "dog/003.png": [{"bbox": [2, 3, 7, 5]}]}
    masks = opened(coco(tmp_path / "c.json", images), photos)
    with pytest.raises(UnreadableImageError, match=reason):
        object_mask(masks, "cat/002.png", WHOLE)


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": 3, "annotations": []}'])
def test_a_file_that_is_no_coco_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ImageError, match=r"c\.json is not a COCO file") as error:
        read_coco(tmp_path / "c.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": 1e999}', "9" * 5000])
def test_a_file_without_end_is_no_coco_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ImageError, match="is not a COCO file"):
        read_coco(tmp_path / "c.json")


def test_shapes_of_other_classes_alone_are_one_error(tmp_path: Path, photos: Path) -> None:
    path = coco(
        tmp_path / "c.json",
        {"cat/001.jpg": [{"bbox": [0, 0, 4, 4], "category_id": 7}]},
        categories=[{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}],
    )
    with pytest.raises(ImageError, match="no shapes of the photos' own classes"):
        opened(path, photos)


@pytest.mark.parametrize(
    "shape",
    [
        {"segmentation": {"size": [16, 24], "counts": [10**15, 1]}},  # a bomb
        {"segmentation": {"size": [16, 24], "counts": [-1, 385]}},
        {"segmentation": {"size": [16, 24], "counts": [10**400]}},
        {"bbox": [1e308, 0, 1e308, "wide"]},
        {"segmentation": [[1, 2, 3]]},
    ],
)
def test_a_hostile_shape_is_a_reason(tmp_path: Path, shape: dict[str, Any]) -> None:
    with pytest.raises(UnreadableImageError, match="a shape cannot be read"):
        drawn(coco(tmp_path / "c.json", {"a.png": [shape]}))
