"""What a study shows of a repair, and what the votes say of the repair's cases.

Pictures and maps are those of the repair's gallery: Grad-CAM of the true class at the repaired
layer. In the task `trust` the map is that of the true class too, whatever was predicted: no other
maps are kept. Raters get pictures only, never a path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from audit.cases import CASES, assign_cases, by_votes
from audit.errors import RunError
from audit.gallery import Picture, data_uri, overlay, read_pixels
from audit.runs import RepairFolder
from audit.statistics import bootstrap_mean, mcnemar
from dashboard.study.design import CHECKS, Item, Question, Side, StudyDesign

if TYPE_CHECKING:
    from dashboard.study.store import Study, Vote

__all__ = ["accuracy_votes", "items_of", "pictures", "write_cases_by_votes"]

MEASURED = "cases_measured"
_SIDES: tuple[Side, ...] = ("before", "after")
_GRAY = 150  # of the blank decoy
_TILES = 8  # a side of the scrambled decoy


def items_of(repair: RepairFolder, images: int, checks: int, seed: int) -> tuple[Item, ...]:
    """Return the items of a study: seeded images of the repair's gallery, then checks.

    Images that the repair fixed, broke, left wrong and left right take turns. Checks use the images
    of which the repaired network is surest, so that the real map is as plain as can be.

    Raises:
        RunError: The repair has no maps before and after.
    """
    gallery = repair.gallery
    entries = gallery["images"]
    _require_maps(repair)
    cases = _recorded_cases(repair)
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for place in sorted(range(len(entries)), key=lambda place: _draw(seed, place)):
        entry = entries[place]
        kinds.setdefault((bool(entry["right"]), bool(entry["right_after"])), []).append(place)
    chosen = _in_turns([kinds[kind] for kind in sorted(kinds)])[:images]
    surest = sorted(
        range(len(entries)),
        key=lambda place: (
            not entries[place]["right_after"],
            -(entries[place].get("p_true_after") or 0.0),
        ),
    )
    items = [_item(number, place, entries[place], cases) for number, place in enumerate(chosen)]
    for number in range(checks):
        place = surest[number % len(surest)]
        kind = CHECKS[number % len(CHECKS)]
        items.append(_item(len(items), place, entries[place], {}, check=kind))
    return tuple(items)


def pictures(repair: RepairFolder, question: Question) -> list[Picture]:
    """Return the original and the map or maps of a question, in the order they are shown.

    Raises:
        RunError: The repair's gallery has changed or cannot be read.
    """
    entries, place = repair.gallery["images"], question.item.image
    if place >= len(entries) or str(entries[place].get("path")) != question.item.path:
        raise RunError("the images of this study are no longer there; ask who sent you the link")
    pixels = read_pixels(repair.gallery_image(str(entries[place]["id"])))
    shown = [Picture(title="The original image", uri=data_uri(pixels))]
    if question.task != "prefer":
        side = question.shown or "after"
        return [*shown, _map_picture(repair, pixels, place, side, "Where the network looked")]
    right: Side = "before" if question.left == "after" else "after"
    for title, side in (("Left", question.left or "after"), ("Right", right)):
        if question.item.check is not None and side == "before":
            decoy = _decoy(pixels, question.item)
            shown.append(Picture(title=title, uri=data_uri(decoy)))
        else:
            shown.append(_map_picture(repair, pixels, place, side, title))
    return shown


def accuracy_votes(
    design: StudyDesign, votes: Iterable[Vote], side: Side, without: Iterable[int] = ()
) -> dict[str, list[bool]]:
    """Return by path what each rater said of one side's map: does it lie on the object?

    The table that `audit.cases.by_votes` takes. Answers of `accurate` alone count: which of two
    maps is the better one does not say whether either is good. "Can't tell" is no answer.

    Args:
        without: Raters who are left out.
    """
    left_out = set(without)
    table: dict[str, list[bool]] = {item.path: [] for item in design.judged}
    for vote in votes:
        counts = vote.task == "accurate" and vote.shown == side and vote.rater not in left_out
        if counts and vote.answer in ("yes", "no"):
            table[design.items[vote.item].path].append(vote.answer == "yes")
    return table


def write_cases_by_votes(
    repair: RepairFolder, study: Study, votes: Sequence[Vote], without: Iterable[int] = ()
) -> dict[str, Any]:
    """Make the votes what decides the repair's cases; return the new `cases` of `repair.json`.

    The columns `case_before` and `case_after` of `images.parquet` change with it. What was measured
    stays beside it, as `cases_measured` and `case_before_measured`, and is never overwritten.

    Raises:
        RunError: Nobody has voted on whether a map lies on the object, or files cannot be read.
    """
    left_out = sorted(set(without))
    images = repair.images
    paths = [str(path) for path in images["path"]]
    verdicts = {
        side: by_votes(paths, accuracy_votes(study.design, votes, side, left_out))
        for side in _SIDES
    }
    columns = {
        side: assign_cases(images[f"right_{side}"], verdicts[side].accurate) for side in _SIDES
    }
    both = np.array(
        [[a or 0, b or 0] for a, b in zip(columns["before"], columns["after"], strict=True)]
    )
    known = both[(both > 0).all(axis=1)]
    if not (both > 0).any():
        raise RunError(
            "no map has a majority yet; cases by votes need the question whether the map lies on "
            "the object, answered for maps before and after"
        )
    measured = repair.info.get(MEASURED if MEASURED in repair.info else "cases") or {}
    accurate = np.isin(known, (1, 2))
    record: dict[str, Any] = {
        "layer": repair.gallery.get("shown_layer", repair.layer),
        "method": repair.gallery.get("shown_method"),
        "source": "votes",
        "rule": verdicts["before"].rule,
        "note": "",
        "study": study.id,
        "raters_left_out": [number + 1 for number in left_out],
        "images": len(known),
        "without": len(both) - len(known),
        "table": [
            [int(((known[:, 0] == b) & (known[:, 1] == a)).sum()) for a in CASES] for b in CASES
        ],
        "accurate": _paired(accurate, study.design.seed) if len(known) else None,
        "insertion": measured.get("insertion"),
        "pointing": measured.get("pointing"),
    }
    rows: dict[str, Any] = {name: images[name].tolist() for name in images.columns}
    for side in _SIDES:
        rows.setdefault(f"case_{side}_measured", rows[f"case_{side}"])
        rows[f"case_{side}"] = columns[side]
    repair.write_images(rows)
    repair.write_info(cases=record, **{MEASURED: measured})
    return record


# --- pieces ---------------------------------------------------------------------------------------


def _item(
    number: int,
    place: int,
    entry: Mapping[str, Any],
    cases: Mapping[str, tuple[int | None, int | None]],
    **further: Any,
) -> Item:
    path = str(entry["path"])
    before, after = cases.get(path, (None, None))
    return Item(
        number=number,
        image=place,
        path=path,
        label_name=str(entry["label_name"]),
        predicted_before=str(entry["predicted_name"]),
        predicted_after=str(entry["predicted_after_name"]),
        right_before=bool(entry["right"]),
        right_after=bool(entry["right_after"]),
        case_before=before,
        case_after=after,
        **further,
    )


def _recorded_cases(repair: RepairFolder) -> dict[str, tuple[int | None, int | None]]:
    """Return the cases before and after by path, as they were measured."""
    images = repair.images
    names = [
        f"case_{side}_measured" if f"case_{side}_measured" in images else f"case_{side}"
        for side in _SIDES
    ]
    columns = [[_case(value) for value in images[name].tolist()] for name in names]
    return dict(zip(map(str, images["path"]), zip(*columns, strict=True), strict=True))


def _case(value: Any) -> int | None:
    return int(value) if value in CASES else None


def _require_maps(repair: RepairFolder) -> None:
    gallery = repair.gallery
    layer, method = gallery.get("shown_layer"), gallery.get("shown_method")
    entries = gallery["images"]
    complete = bool(entries) and all("right_after" in entry for entry in entries)
    if not (complete and layer and method and all(_has(repair, method, layer, s) for s in _SIDES)):
        raise RunError(
            f"the repair {repair.name} has no maps before and after to vote on; finish it, or "
            "repair a layer with spatial output"
        )


def _has(repair: RepairFolder, method: str, layer: str, side: Side) -> bool:
    return repair.has_maps(method, layer, side)


def _map_picture(
    repair: RepairFolder, pixels: np.ndarray, place: int, side: Side, title: str
) -> Picture:
    gallery = repair.gallery
    maps = repair.maps(gallery["shown_method"], gallery["shown_layer"], side)
    if place >= len(maps):
        raise RunError(f"the gallery has an image {place} and only {len(maps)} maps; repair again")
    return Picture(title=title, uri=data_uri(overlay(pixels, maps[place])))


def _decoy(pixels: np.ndarray, item: Item) -> np.ndarray:
    """Return a picture that plainly highlights nothing: gray, or its own tiles in disorder."""
    if item.check == "blank":
        return np.full_like(pixels, _GRAY)
    height, width = (side - side % _TILES for side in pixels.shape[:2])
    tiles = pixels[:height, :width].reshape(_TILES, height // _TILES, _TILES, width // _TILES, 3)
    flat = tiles.swapaxes(1, 2).reshape(_TILES**2, height // _TILES, width // _TILES, 3)
    mixed = np.random.default_rng(item.number).permutation(flat)
    rows = mixed.reshape(_TILES, _TILES, height // _TILES, width // _TILES, 3).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(height, width, 3))


def _paired(accurate: np.ndarray, seed: int) -> dict[str, Any]:
    """Return the shares of accurate maps before and after, (M, 2), and their difference."""
    values = accurate.astype(np.float64)
    samples = {
        "before": values[:, 0],
        "after": values[:, 1],
        "difference": values[:, 1] - values[:, 0],
    }
    intervals = {name: bootstrap_mean(v, seed=seed).as_dict() for name, v in samples.items()}
    return {**intervals, "mcnemar": mcnemar(accurate[:, 0], accurate[:, 1]).as_dict()}


def _in_turns(queues: Sequence[list[int]]) -> list[int]:
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _draw(seed: int, place: int) -> bytes:
    return hashlib.sha256(f"{seed}/images/{place}".encode()).digest()
