"""Where the maps of the training images may lie: on the object, or anywhere but on an artefact.

Losses that need masks get them from one of two places. Masks of the objects say for each image what
it shows. An error group of the scan says where the network looked when it failed, and where its
images share an artefact, which pixels that is: no annotation is needed to forbid them, in every
image alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.artefacts import Artefact
from audit.errors import RunError, UsageError
from audit.group_artefacts import find_group_artefact
from audit.images import ImageFolder
from audit.images.decoding import UnreadableImageError
from audit.images.masks import object_mask, open_masks
from audit.runs import Run
from audit.wording import percent
from repair.image_masks import ImageMasks

if TYPE_CHECKING:
    from audit.networks import Preprocessing

_FINE = 840  # pixels along a side of the raster of regions: halves to eighths fall between pixels


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Where maps may lie, and who said so.

    Attributes:
        masks: Of the training images, at the size of the maps.
        source: `masks` or the identity of an error group.
        sentence: In plain words, for the record.
        images: How many training images have one.
        artefact: Where they may not lie, and how to tell the images that have it there; None where
            masks of the objects, or the region of a group alone, say where they may.
    """

    masks: ImageMasks
    source: str
    sentence: str
    images: int
    artefact: Artefact | None = None

    @property
    def hides_objects(self) -> bool:
        """Whether what the masks leave in an image is its object."""
        return self.source == "masks"

    def as_dict(self) -> dict[str, Any]:
        return {"source": self.source, "sentence": self.sentence, "images": self.images}


def find_guidance(
    run: Run,
    folder: ImageFolder,
    positions: Sequence[int],
    preprocessing: Preprocessing,
    size: tuple[int, int],
    *,
    masks: Path | None = None,
    group: str | None = None,
    on_image: Callable[[], None] | None = None,
) -> Guidance:
    """Return where the maps of the training images may lie.

    From the masks that are named, or the group; where neither is, from the masks that the scan was
    given, or the first of its error groups that has an artefact, else the first with a region.

    Args:
        run: The scan.
        folder: Its images, and those added for training.
        positions: Of the training images, in the folder's records.
        preprocessing: Of the images; masks are cut and scaled like them.
        size: Of the maps, (h, w).
        masks: Folder of masks or COCO file.
        group: Identity of an error group, such as `group-1`.
        on_image: Called after each image whose mask was looked for.

    Raises:
        UsageError: Both are named, there is no such group, or it has neither artefact nor region.
        RunError: Nothing is named and the scan has neither.
        ImageError: The masks cannot be used.
    """
    source = guidance_source(run, masks=masks, group=group)
    if source is None:
        raise RunError(
            "this loss must know where a map may lie, and the scan has neither masks nor an error "
            "group with a region; give masks of the objects with --masks DIR"
        )
    if isinstance(source, Path):
        return _on_objects(source, folder, positions, preprocessing, size, on_image)
    return _away_from(run, source, folder, positions, preprocessing, size)


def guidance_source(
    run: Run, *, masks: Path | None = None, group: str | None = None
) -> Path | Mapping[str, Any] | None:
    """Return where the masks lie, or the error group, that `find_guidance` goes by; None without.

    Raises:
        UsageError: Both are named, or there is no such group.
    """
    if masks is not None and group is not None:
        raise UsageError("--masks and --group exclude each other; give one of them")
    if group is not None:
        return _group(run, group)
    if masks is not None:
        return masks
    scanned_with = ((run.info.get("cases") or {}).get("masks") or {}).get("path")
    if scanned_with:
        return Path(scanned_with)
    groups = run.groups["groups"]
    telling = [one for one in groups if one.get("artefact")] or [
        one for one in groups if one.get("cells")
    ]
    return dict(telling[0]) if telling else None


def share_right(run: Run, group: Mapping[str, Any]) -> float | None:
    """Return how often what an error group says is right where its artefact or its region is.

    For an artefact it is what the scan counted. For a region, of the images outside the test split
    that have the group's predicted class, and whose map lies on its region, the share that is
    right. Maps were looked at in samples of wrong and of right images; both counts are scaled up.
    None where the group was not compared with right images, or too few carry the artefact.
    """
    artefact = group.get("artefact")
    if artefact:
        told = artefact.get("agreeing")
        return None if told is None else float(told)
    if group.get("compared_share") is None:
        return None
    images = run.images
    seen = images[images["split"] != "test"]
    if group["predicted"] is not None:
        seen = seen[seen["predicted"] == group["predicted"]]
    right = int(seen["right"].sum()) * group["compared_share"]
    wrong = group["size"] * run.groups["errors"] / max(1, run.groups["errors_looked_at"])
    return float(right / (right + wrong)) if right + wrong else None


def object_masks_at(
    folder: ImageFolder,
    positions: Sequence[int],
    path: Path,
    preprocessing: Preprocessing,
    size: tuple[int, int],
    *,
    on_image: Callable[[], None] | None = None,
) -> ImageMasks:
    """Return how much of each place of a map the object covers, in (h, w) places.

    Images that are not asked for, have no mask, or one that cannot be used, have none.
    """
    found = open_masks(path, folder)
    whole = size == tuple(preprocessing.input_size)
    covered = torch.empty((len(positions), *size), dtype=torch.bool if whole else torch.float32)
    usable: list[int] = []
    for position in positions:
        photo = folder.records[position].path
        if photo in found:
            try:
                mask = torch.from_numpy(object_mask(found, photo, preprocessing))
            except UnreadableImageError:
                continue
            if mask.any():
                covered[len(usable)] = _by_area(mask, size)
                usable.append(position)
        if on_image is not None:
            on_image()
    return ImageMasks.each(covered[: len(usable)], usable, len(folder.records))


def outside_cells(cells: Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Return how much of each place of a map lies outside all cells, (h, w) in [0, 1].

    Args:
        cells: Left, top, right, bottom of each, in [0, 1].
        size: (h, w).
    """
    raster = torch.ones(_FINE, _FINE)
    for left, top, right, bottom in cells:
        rows = slice(round(top * _FINE), round(bottom * _FINE))
        raster[rows, round(left * _FINE) : round(right * _FINE)] = 0
    return _by_area(raster, size)


def _by_area(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[None, None].float(), size=size, mode="area")[0, 0]


def _on_objects(
    path: Path,
    folder: ImageFolder,
    positions: Sequence[int],
    preprocessing: Preprocessing,
    size: tuple[int, int],
    on_image: Callable[[], None] | None,
) -> Guidance:
    masks = object_masks_at(folder, positions, path, preprocessing, size, on_image=on_image)
    known = int(masks.known.sum())
    if not known:
        raise RunError(
            f"none of the {len(positions)} training images has a usable mask in {path}; "
            "the masks of an image folder lie at the same paths as its photos"
        )
    return Guidance(
        masks=masks,
        source="masks",
        sentence=f"Maps may lie on the object: {known} of {len(positions)} training images have "
        "a mask.",
        images=known,
    )


def _away_from(
    run: Run,
    group: Mapping[str, Any],
    folder: ImageFolder,
    positions: Sequence[int],
    preprocessing: Preprocessing,
    size: tuple[int, int],
) -> Guidance:
    artefact = find_group_artefact(run, group)
    if artefact is not None:
        if tuple(artefact.mask.shape) != tuple(preprocessing.input_size):
            raise RunError(
                f"the artefact of {group['id']} is not of the size of the network's images; "
                "scan again"
            )
        allowed = _by_area((~artefact.reach).float(), size)
        sentence = (
            f"What must not matter is where the images of {group['id']} look alike, "
            f"{percent(artefact.share)} of each."
        )
    elif group.get("cells"):
        allowed = outside_cells(group["cells"], size)
        sentence = (
            f"Maps may lie anywhere but at {group['region']}, where the network looked in the "
            f"images of {group['id']}."
        )
    else:
        raise UsageError(
            f"{group['id']} has no region: its images share what was said, not where the network "
            "looked; choose another group, or give masks with --masks DIR"
        )
    return Guidance(
        masks=ImageMasks.shared(allowed, positions, len(folder.records)),
        source=str(group["id"]),
        sentence=sentence,
        images=len(positions),
        artefact=artefact,
    )


def _group(run: Run, identity: str) -> Mapping[str, Any]:
    groups = run.groups["groups"]
    for group in groups:
        if group["id"] == identity:
            return dict(group)
    known = ", ".join(str(group["id"]) for group in groups) or "none"
    raise UsageError(f"the scan has no error group {identity!r}; it has {known}")
