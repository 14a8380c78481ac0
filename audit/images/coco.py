"""Boxes and outlines of objects from a COCO JSON file.

Read are `images` (`id`, `file_name`, where given `width` and `height`), `annotations` (`image_id`,
`bbox` as x, y, width, height, `segmentation` as polygons or uncompressed run lengths) and
`categories`. An image's object is the union of its annotations: outlines where there are any,
boxes elsewhere. Where categories are named like classes of the photos, only annotations of the
photo's own class count. Format: Lin et al. 2014 and cocodataset.org, "Data format".
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from audit.errors import ImageError
from audit.images.decoding import UnreadableImageError
from audit.images.records import one_line

__all__ = ["CocoImage", "outline", "read_coco"]

# What a file that holds other things than it should makes of its reader.
_UNEXPECTED = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError),
    *(TypeError, ValueError),
)


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """One described image: each shape with the plain name of its category.

    `size` is width and height in pixels, None where the file does not say.
    """

    file_name: str
    size: tuple[int, int] | None
    shapes: tuple[tuple[str, Mapping[str, Any]], ...]
    categories: frozenset[str]

    def of_class(self, class_name: str) -> CocoImage:
        """Return the image with the shapes of one class, where any category bears its name."""
        wanted = _plain(class_name)
        if wanted not in self.categories:
            return self
        return replace(self, shapes=tuple(shape for shape in self.shapes if shape[0] == wanted))


def read_coco(path: Path) -> list[CocoImage]:
    """Return the images of a COCO file that have annotations.

    Raises:
        ImageError: If the file is no COCO file.
    """
    shown = one_line(str(path))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        categories = {one["id"]: _plain(one["name"]) for one in document.get("categories", [])}
        shapes: dict[Any, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
        for annotation in document["annotations"]:
            name = categories.get(annotation.get("category_id"), "")
            shapes[annotation["image_id"]].append((name, annotation))
        return [
            CocoImage(
                file_name=str(image["file_name"]),
                size=_size(image),
                shapes=tuple(shapes[image["id"]]),
                categories=frozenset(categories.values()),
            )
            for image in document["images"]
            if image["id"] in shapes
        ]
    except OSError as error:
        raise ImageError(f"{shown} cannot be read: {error.strerror}") from error
    except _UNEXPECTED as error:
        reason = one_line(f"{type(error).__name__}: {error}", 80)
        raise ImageError(
            f"{shown} is not a COCO file ({reason}); expected JSON with `images` (id, file_name) "
            "and `annotations` (image_id, bbox or segmentation)"
        ) from error


def outline(image: CocoImage, size: tuple[int, int]) -> np.ndarray:
    """Return where an image's shapes are, bool (H, W); a pixel belongs to one if its center does.

    Args:
        size: Width and height of the upright photo.

    Raises:
        UnreadableImageError: If a shape cannot be meant, or the file describes another size.
    """
    if image.size is not None and image.size != size:
        raise UnreadableImageError(
            f"the file says {image.size[0]} x {image.size[1]} pixels and the photo, upright, has "
            f"{size[0]} x {size[1]}; describe the photos as they are shown"
        )
    mask = np.zeros((size[1], size[0]), dtype=bool)
    for _, annotation in image.shapes:
        try:
            mask |= _shape(annotation, mask.shape)
        except _UNEXPECTED as error:
            reason = one_line(f"{type(error).__name__}: {error}", 80)
            raise UnreadableImageError(f"a shape cannot be read ({reason})") from error
    return mask


def _shape(annotation: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping):
        return _run_lengths(segmentation, shape)
    if segmentation:
        return _polygons(segmentation, shape)
    return _box(annotation["bbox"], shape)


def _polygons(polygons: list[list[float]], shape: tuple[int, ...]) -> np.ndarray:
    from skimage.draw import polygon

    mask = np.zeros(shape, dtype=bool)
    for flat in polygons:
        corners = np.asarray(flat, dtype=np.float64).reshape(-1, 2)
        # Pixel i reaches from i to i + 1, its center lies at i + 1/2.
        rows, columns = polygon(corners[:, 1] - 0.5, corners[:, 0] - 0.5, shape)  # type: ignore[no-untyped-call]
        mask[rows, columns] = True
    return mask


def _run_lengths(segmentation: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return counts of zeros, ones, zeros, ... down the columns as a mask."""
    counts = segmentation["counts"]
    if isinstance(counts, str):
        raise UnreadableImageError(
            "its run lengths are compressed; write them as lists of counts, or as polygons"
        )
    if tuple(segmentation["size"]) != tuple(shape):
        raise ValueError(f"run lengths for {segmentation['size']}, the photo has {list(shape)}")
    if min(counts) < 0 or sum(counts) != shape[0] * shape[1]:  # checked before memory is taken
        raise ValueError(
            f"run lengths of {sum(counts)} pixels, the photo has {shape[0] * shape[1]}"
        )
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.asarray(values.reshape(shape, order="F"))


def _box(box: list[float], shape: tuple[int, ...]) -> np.ndarray:
    left, top, width, height = map(float, box)
    down, across = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    rows, columns = (
        (down >= top) & (down < top + height),
        (across >= left) & (across < left + width),
    )
    return np.asarray(rows[:, None] & columns[None, :])


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    if "width" not in image or "height" not in image:
        return None
    return int(image["width"]), int(image["height"])


def _plain(name: str) -> str:
    return str(name).casefold().replace("_", " ").replace("-", " ").strip()
