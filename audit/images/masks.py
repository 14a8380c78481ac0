"""Where in each photo is the object? Ground truth from a folder of masks or a COCO file.

A folder holds one image per photo, of the same size, in which every pixel that is not zero belongs
to the object (`audit.images.decoding.decode_mask`). It is found by the photo's path without the
suffix, or by as much of that path's end as names one photo alone: the mask of `train/cat/001.jpg`
may be `train/cat/001.png`, `cat/001.png` or `001.png`. Boxes and polygons: `audit.images.coco`.
Masks are turned, scaled and cut exactly like the photos. A photo without a mask is counted, never
the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from audit.errors import ImageError
from audit.images.coco import CocoImage, outline, read_coco
from audit.images.decoding import (
    UnreadableImageError,
    decode_mask,
    preprocess_mask,
    quiet_pillow,
    upright_size,
)
from audit.images.listing import files_below
from audit.images.records import ImageFolder, SkippedFile, one_line

if TYPE_CHECKING:
    from audit.networks.card import Preprocessing

__all__ = ["ObjectMasks", "object_mask", "open_masks"]

_EXAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class ObjectMasks:
    """Where the masks of a folder's photos are; nothing of them has been decoded yet.

    Attributes:
        path: What the user named, a folder or a JSON file.
        photos: The root of the photos.
        files: By a photo's path, its mask file relative to `path`; empty for a COCO file.
        outlines: By a photo's path, its shapes; empty for a folder.
        unused: How many masks belong to none of the photos.
    """

    path: Path
    photos: Path
    files: Mapping[str, str]
    outlines: Mapping[str, CocoImage]
    unused: int

    @property
    def kind(self) -> Literal["folder", "coco"]:
        return "folder" if self.files else "coco"

    def __contains__(self, photo: str) -> bool:
        return photo in self.files or photo in self.outlines


def open_masks(path: Path, folder: ImageFolder) -> ObjectMasks:
    """Return the masks of the folder's photos.

    Args:
        path: A folder of masks, or a COCO JSON file.

    Raises:
        ImageError: If nothing is there, nothing in it belongs to any photo, or nothing that does
            can be used.
    """
    masks = _of_coco_file(path, folder) if path.is_file() else _of_folder(path, folder)
    refused: list[str] = []
    for photo in (*masks.files, *masks.outlines):
        try:
            _read(masks, photo)
            return masks
        except UnreadableImageError as error:
            refused.append(f"{one_line(photo)}: {error}")
    if not refused:
        raise ImageError(
            f"the images in {one_line(str(path))} that are photos of {one_line(str(folder.root))} "
            "have no shapes of the photos' own classes; name categories like the classes"
        )
    raise ImageError(
        f"none of the {len(refused)} masks in {one_line(str(path))} that belong to a photo can be "
        f"used; the first is {refused[0]}"
    )


def object_mask(masks: ObjectMasks, photo: str, preprocessing: Preprocessing) -> np.ndarray:
    """Return how much of each input pixel of one photo the object covers, float32 (h, w) in [0, 1].

    Raises:
        KeyError: The photo has no mask.
        UnreadableImageError: Its mask cannot be used: unreadable, of another size, or empty.
    """
    return preprocess_mask(_read(masks, photo), preprocessing)


def _read(masks: ObjectMasks, photo: str) -> np.ndarray:
    """Return where the object is in the upright photo, bool (H, W)."""
    with quiet_pillow():
        width, height = upright_size(masks.photos / photo)
        if photo in masks.files:
            mask = decode_mask(masks.path / masks.files[photo])
        else:
            mask = outline(masks.outlines[photo], (width, height))
    if mask.shape != (height, width):
        raise UnreadableImageError(
            f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels and its photo, upright, "
            f"{width} x {height}; save masks in the size of the photos"
        )
    if not mask.any():
        raise UnreadableImageError("the mask marks no pixel")
    return mask


def _of_folder(path: Path, folder: ImageFolder) -> ObjectMasks:
    if not path.is_dir():
        raise ImageError(
            f"no masks at {one_line(str(path))}; give a folder of mask images or a COCO JSON file"
        )
    left_out: list[SkippedFile] = []
    found: dict[str, list[str]] = defaultdict(list)
    for file in files_below(path, ".", left_out):
        found[_stem(file)].append(PurePosixPath(file).as_posix())
    matched = _match(folder, found)
    if not matched:
        photo = folder.records[0].path
        held = ", ".join(one_line(files[0]) for files in list(found.values())[:_EXAMPLES])
        raise ImageError(
            f"no mask in {one_line(str(path))} is named like a photo: for {one_line(photo)} "
            f"expected {one_line(_stem(photo))}.png or {one_line(_stem(PurePosixPath(photo).name))}"
            f".png, found {held or 'no files'}; name masks like their photos"
        )
    used = set(matched.values())
    return ObjectMasks(
        path=path,
        photos=folder.root,
        files={photo: found[key][0] for photo, key in matched.items()},
        outlines={},
        unused=sum(len(files) for key, files in found.items() if key not in used),
    )


def _of_coco_file(path: Path, folder: ImageFolder) -> ObjectMasks:
    described = read_coco(path)
    found: dict[str, list[CocoImage]] = defaultdict(list)
    for image in described:
        found[_stem(image.file_name)].append(image)
    matched = _match(folder, found)
    names = {record.path: record.class_name for record in folder.records}
    if not matched:
        held = ", ".join(one_line(image.file_name) for image in described[:_EXAMPLES])
        raise ImageError(
            f"no image with shapes in {one_line(str(path))} is a photo of "
            f"{one_line(str(folder.root))}: file_name says {held or 'nothing'}, photos are called "
            f"{one_line(folder.records[0].path)}; write file_name as the path below that folder"
        )
    outlines = {photo: found[key][0].of_class(names[photo]) for photo, key in matched.items()}
    return ObjectMasks(
        path=path,
        photos=folder.root,
        files={},
        outlines={photo: image for photo, image in outlines.items() if image.shapes},
        unused=len(described) - len(set(matched.values())),
    )


def _match(folder: ImageFolder, found: Mapping[str, Sequence[object]]) -> dict[str, str]:
    """Return by photo the key in `found` that shares the longest end of its path.

    An end that several masks share says nothing, and neither does one that several photos share,
    those that are not scanned this time included.
    """
    photos = {record.path for record in folder.records}
    stems = {_stem(photo) for photo in photos} | {
        _stem(f) for f in files_below(folder.root, ".", [])
    }
    shared = Counter(end for stem in stems for end in _ends(stem))
    owners: dict[str, list[str]] = defaultdict(list)
    for key, masks in found.items():
        for end in _ends(key):
            owners[end] += [key] * len(masks)
    matched = {}
    for photo in photos:
        for end in _ends(_stem(photo)):
            if len(owners[end]) == 1 and shared[end] == 1:
                matched[photo] = owners[end][0]
                break
    return dict(sorted(matched.items()))


def _ends(stem: str) -> list[str]:
    """Return the ends of a path, longest first: a/b/c, b/c, c."""
    parts = stem.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _stem(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).with_suffix("").as_posix()
