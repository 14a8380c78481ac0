"""Error groups of a network: look at failing images, find groups, keep what a reader wants to see.

Between `audit.looking` (images to maps), `audit.groups` (maps to groups) and the run folder: each
group becomes a record with a sentence, its images, mean maps and a few examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from audit.group_artefacts import GroupArtefact, groups_with_artefacts
from audit.groups import ErrorGroup, GroupSearch
from audit.images import ImageFolder, load_pixels
from audit.looking import METHOD, draw_images, looking_layer, predicted_class_maps
from audit.networks import Network
from audit.regions import REGIONS, looked_at
from audit.statistics import wilson

__all__ = ["FoundGroups", "error_groups", "pixel_loader", "positions_looked_at"]

EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class FoundGroups:
    """What a run keeps of its error groups.

    Attributes:
        document: As `groups.json` holds it.
        maps: `wrong` and `right`, mean maps of each group and of the right images it was compared
            with, (groups, h, w), NaN where there are none; `examples`, (images, h, w).
        pictures: Example images as the network saw them, HWC uint8, in the order of `examples`.
        artefacts: `masks`, (groups, H, W) bool, and `pictures`, (groups, H, W, 3) uint8, of the
            pixels that the images of a group share; no pixel where they share none.
    """

    document: dict[str, Any]
    maps: dict[str, NDArray[np.float32]]
    pictures: list[NDArray[np.uint8]]
    artefacts: dict[str, NDArray[np.generic]]


def positions_looked_at(folder: ImageFolder, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the images stand that could be loaded and are not in the test split.

    Args:
        predicted: Predicted class of each image of the folder, -1 where it was not loaded.
    """
    used = [i for i, r in enumerate(folder.records) if r.split != "test" and predicted[i] >= 0]
    return np.asarray(used, dtype=np.int64)


def pixel_loader(
    network: Network, folder: ImageFolder, positions: NDArray[np.int64]
) -> Callable[[NDArray[np.int64]], Tensor]:
    """Return what loads images by their rows in some positions, uint8 (n, 3, H, W); those that
    cannot be read are left out."""

    def load(rows: NDArray[np.int64]) -> Tensor:
        return load_pixels(folder, positions[rows].tolist(), network.card.preprocessing).pixels

    return load


def error_groups(
    network: Network,
    folder: ImageFolder,
    predicted: NDArray[np.int64],
    p_predicted: NDArray[np.float64],
    *,
    seed: int,
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> FoundGroups:
    """Return the error groups of the images that are not in the test split.

    Args:
        predicted: Predicted class of each image of the folder, -1 where it was not loaded.
        p_predicted: Its probability.
        seed: Of the draw of images that are looked at, where there are many.
        progress: Called with the number of images after each batch.
    """
    positions = positions_looked_at(folder, predicted)
    labels = np.array([folder.records[i].label for i in positions], dtype=np.int64)
    guesses = np.asarray(predicted[positions], dtype=np.int64)
    layer = looking_layer(network.program)
    mapped, maps = np.empty(0, dtype=np.int64), np.zeros((0, 1, 1), dtype=np.float32)
    if layer is not None:
        drawn = draw_images(labels, guesses, seed)
        mapped, maps = predicted_class_maps(
            network, folder, positions, drawn, guesses, layer, batch_size, workers, progress
        )
    classes = network.card.classes
    load = pixel_loader(network, folder, positions)
    search, artefacts = groups_with_artefacts(
        load, labels, guesses, mapped, maps, classes=len(classes), seed=seed
    )
    examples = _examples(search.groups, mapped, p_predicted[positions])
    preprocessing = network.card.preprocessing
    shown = sorted({int(i) for chosen in examples for i in chosen})
    entries = {
        i: {
            "id": f"{place:04d}",
            "path": folder.records[positions[i]].path,
            "label_name": classes[labels[i]],
            "predicted_name": classes[guesses[i]],
            "right": False,
            "split": folder.records[positions[i]].split,
            "p_predicted": float(p_predicted[positions[i]]),
        }
        for place, i in enumerate(shown)
    }
    place_of = {int(i): place for place, i in enumerate(mapped)}
    document = {
        "layer": layer,
        "method": METHOD if layer is not None else None,
        "images": len(positions),
        "errors": search.errors,
        "errors_looked_at": search.errors_with_maps,
        "right_looked_at": search.right_with_maps,
        "tests": search.tests,
        "correction": search.correction,
        "alpha": search.alpha,
        "minimum_size": search.minimum,
        "groups": [
            {
                **_record(group, f"group-{number}", search, classes, maps, place_of),
                "artefact": artefact.as_dict() if artefact else None,
                "paths": [folder.records[positions[i]].path for i in group.members],
                "examples": [entries[int(i)] for i in chosen],
            }
            for number, (group, chosen, artefact) in enumerate(
                zip(search.groups, examples, artefacts, strict=True), start=1
            )
        ],
    }
    arrays = {
        "wrong": _mean_maps([group.members for group in search.groups], maps, place_of),
        "right": _mean_maps(
            [_compared(group, labels, guesses, mapped) for group in search.groups], maps, place_of
        ),
        "examples": maps[[place_of[i] for i in shown]],
    }
    pixels = load_pixels(folder, [int(positions[i]) for i in shown], preprocessing)
    return FoundGroups(
        document=document,
        maps=arrays,
        pictures=list(pixels.pixels.permute(0, 2, 3, 1).numpy()),
        artefacts=_shared_pixels(artefacts, preprocessing.input_size),
    )


# --- what is kept of a group ----------------------------------------------------------------------


def _record(
    group: ErrorGroup,
    identity: str,
    search: GroupSearch,
    classes: Sequence[str],
    maps: NDArray[np.float32],
    place_of: dict[int, int],
) -> dict[str, Any]:
    share = wilson(group.size, group.of)
    region, ninths = group.region, _ninths(group, maps, place_of)
    return {
        "id": identity,
        "kind": group.kind,
        "sentence": _sentence(group, search, classes, ninths),
        "label": group.label,
        "label_name": None if group.label is None else classes[group.label],
        "predicted": group.predicted,
        "predicted_name": None if group.predicted is None else classes[group.predicted],
        "region": region.name if region else None,
        "box": list(region.box) if region else None,
        "cells": [list(cell) for cell in region.cell_boxes] if region else [],
        "ninths": ninths,
        "size": group.size,
        "of": group.of,
        "share": share.as_dict(),
        "expected": group.expected,
        "compared": len(group.compared),
        "compared_share": group.compared_share,
        "p_value": group.p_value,
        "p_adjusted": group.p_adjusted,
        "test": group.test,
    }


def _shared_pixels(
    found: Sequence[GroupArtefact | None], size: tuple[int, int]
) -> dict[str, NDArray[np.generic]]:
    masks = np.zeros((len(found), *size), dtype=np.bool_)
    pictures = np.zeros((len(found), *size, 3), dtype=np.uint8)
    for row, one in enumerate(found):
        if one is not None:
            masks[row] = one.artefact.mask.numpy()
            pictures[row] = one.artefact.picture.permute(1, 2, 0).numpy()
    return {"masks": masks, "pictures": pictures}


def _sentence(
    group: ErrorGroup, search: GroupSearch, classes: Sequence[str], ninths: dict[str, int]
) -> str:
    said = "anything" if group.label is None else classes[group.label]
    if group.predicted is not None:
        said = f"{said} called {classes[group.predicted]}"
    elif group.label is not None:
        said = f"{said} called anything else"
    else:
        said = "any class called any other"
    where = f" while looking at {group.region.name}" if group.region else ""
    where += ", in images that look alike in one place" if group.kind == "artefact" else ""
    if group.region is not None and len(group.region.cells) > 1:
        parts = [REGIONS[cell] for cell in group.region.cells]  # the ninths come first
        where += f" ({', '.join(f'{ninths[part.name]} at {part.name}' for part in parts)})"
    errors = "errors" if group.of == search.errors else f"errors looked at ({search.errors} in all)"
    text = (
        f"{group.size} of {group.of} {errors}: {said}{where}; {group.expected:.0f} expected by "
        f"chance, {_p_text(group.p_adjusted)} ({search.correction}, {search.tests} tests)."
    )
    if group.region is None or group.compared_share is None:
        return text
    called = "" if group.kind == "region" else f" called {classes[group.predicted or 0]}"
    return f"{text} Of right images{called}, {group.compared_share:.0%} look there."


def _p_text(p: float) -> str:
    if p < 1e-300:  # below the smallest number of double precision there is only zero
        return "p < 1e-300"
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.0e}"


def _ninths(
    group: ErrorGroup, maps: NDArray[np.float32], place_of: dict[int, int]
) -> dict[str, int]:
    """Return how many of a group looked at each ninth; those without a map are left out."""
    own = [place_of[int(i)] for i in group.members if int(i) in place_of]
    counts = looked_at(maps[own]).sum(axis=0) if own else np.zeros(len(REGIONS), dtype=int)
    single = [k for k, region in enumerate(REGIONS) if region.grid == 3 and len(region.cells) == 1]
    return {REGIONS[k].name: int(counts[k]) for k in single}


def _compared(
    group: ErrorGroup,
    labels: NDArray[np.int64],
    guesses: NDArray[np.int64],
    mapped: NDArray[np.int64],
) -> NDArray[np.int64]:
    if group.kind != "confusion":
        return group.compared
    right = (labels == guesses)[mapped] & (guesses[mapped] == group.predicted)
    return np.asarray(mapped[right])


def _mean_maps(
    chosen: Sequence[NDArray[np.int64]], maps: NDArray[np.float32], place_of: dict[int, int]
) -> NDArray[np.float32]:
    means = np.full((len(chosen), *maps.shape[1:]), np.nan, dtype=np.float32)
    for row, members in enumerate(chosen):
        own = [place_of[int(i)] for i in members if int(i) in place_of]
        if own:
            means[row] = maps[own].mean(axis=0)
    return means


def _examples(
    groups: Sequence[ErrorGroup], mapped: NDArray[np.int64], confidence: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """Return the surest wrong images of each group that have maps, not yet shown ones first."""
    chosen: list[NDArray[np.int64]] = []
    for group in groups:
        own = np.intersect1d(group.members, mapped)
        shown = np.isin(own, np.concatenate(chosen)) if chosen else np.zeros(len(own), dtype=bool)
        chosen.append(own[np.lexsort((-confidence[own], shown))][:EXAMPLES])
    return chosen
