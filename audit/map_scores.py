"""Judge the maps of a scan: against masks while they are made, or by the proxy afterwards.

The scores of `audit.map_accuracy` and `audit.faithfulness` for the images of a folder, kept by
position. `case_record` adds them up to the cases of `audit.cases`, as they stand in `run.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from audit.cases import MapAccuracy, assign_cases, by_masks, by_proxy, case_table
from audit.faithfulness import FAITHFULNESS_THRESHOLD, faithfulness
from audit.images.decoding import UnreadableImageError
from audit.images.masks import ObjectMasks, object_mask
from audit.map_accuracy import energy_inside, mask_areas, pointing_hits
from audit.statistics import bootstrap_mean, wilson

if TYPE_CHECKING:
    from audit.networks.card import Preprocessing

__all__ = [
    "PROXY_IMAGES",
    "MapScores",
    "Objects",
    "case_record",
    "image_columns",
    "judge_maps",
    "proxy_positions",
    "read_objects",
    "score_by_masks",
    "score_by_proxy",
]

PROXY_IMAGES = 512
_REFUSED_SHOWN = 20
_RARE = 0.01


@dataclass
class MapScores:
    """Per image of a folder, by position; NaN where it was not measured.

    Attributes:
        energy: Share of the map inside the mask.
        hit: 1 where the map's peak is inside the mask, 0 where it is not.
        area: The mask's share of the input.
        faithfulness: The proxy's score.
        refused: Why a mask could not be used, by position.
    """

    energy: np.ndarray
    hit: np.ndarray
    area: np.ndarray
    faithfulness: np.ndarray
    refused: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, images: int) -> MapScores:
        energy, hit, area, faithfulness = np.full((4, images), np.nan)
        return cls(energy, hit, area, faithfulness)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Where the objects of a batch are.

    Attributes:
        rows: Which images of the batch have a mask that can be used.
        masks: How much of each input pixel their objects cover, (len(rows), H, W) in [0, 1].
    """

    rows: list[int]
    masks: Tensor


def read_objects(
    scores: MapScores,
    positions: Sequence[int],
    paths: Sequence[str],
    masks: ObjectMasks,
    preprocessing: Preprocessing,
) -> Objects | None:
    """Return the objects of a batch of photos, None where there are none; note refused masks."""
    rows, covered = [], []
    for row, (position, path) in enumerate(zip(positions, paths, strict=True)):
        if path not in masks:
            continue
        try:
            mask = object_mask(masks, path, preprocessing)
        except UnreadableImageError as error:
            scores.refused[position] = str(error)
            continue
        if not mask.any():
            scores.refused[position] = "the object lies outside the part that the network sees"
            continue
        rows.append(row)
        covered.append(torch.from_numpy(mask))
    return Objects(rows=rows, masks=torch.stack(covered)) if rows else None


def score_by_masks(
    scores: MapScores, positions: Sequence[int], maps: Tensor, objects: Objects
) -> None:
    """Score a batch of maps (B, h, w) against the objects of their photos."""
    chosen = maps[objects.rows]
    at = np.asarray(positions)[objects.rows]
    scores.energy[at] = energy_inside(chosen, objects.masks).cpu().numpy()
    scores.hit[at] = pointing_hits(chosen, objects.masks).cpu().numpy()
    scores.area[at] = mask_areas(objects.masks).numpy()


def score_by_proxy(
    scores: MapScores,
    positions: Sequence[int],
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
) -> None:
    """Score a batch of maps (B, h, w) by insertion."""
    found = faithfulness(predict, images, targets, maps)
    scores.faithfulness[np.asarray(positions)] = found.cpu().numpy()


def proxy_positions(loaded: np.ndarray, *, seed: int, images: int = PROXY_IMAGES) -> list[int]:
    """Return which images the proxy judges: all, or a seeded draw of so many.

    Args:
        loaded: Which images could be loaded, bool (N,).
    """
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(loaded))[:images]
    return sorted(drawn.tolist())


def judge_maps(scores: MapScores, *, with_masks: bool, threshold: float) -> MapAccuracy:
    """Return which maps are accurate, by masks where there are any and else by the proxy.

    Args:
        threshold: Least share of a map's energy inside the mask; the proxy has its own.
    """
    if with_masks:
        return by_masks(scores.energy, threshold)
    return by_proxy(scores.faithfulness, FAITHFULNESS_THRESHOLD)


def image_columns(
    scores: MapScores, accuracy: MapAccuracy | None, right: np.ndarray, kept: np.ndarray
) -> dict[str, Any]:
    """Return the columns of the images' table that tell of their maps.

    Args:
        right: Whether each image of the folder was right, bool (N,).
        kept: Positions of the images in the table.
    """
    accurate = [accuracy.accurate[i] if accuracy else None for i in kept]
    return {
        "case": assign_cases(right[kept], accurate),
        "map_accurate": accurate,
        "map_energy_inside": scores.energy[kept],
        "map_pointing_hit": [None if np.isnan(hit) else bool(hit) for hit in scores.hit[kept]],
        "mask_area": scores.area[kept],
        "map_faithfulness": scores.faithfulness[kept],
    }


def case_record(
    scores: MapScores,
    accuracy: MapAccuracy,
    *,
    loaded: np.ndarray,
    right: np.ndarray,
    class_names: Sequence[str],
    paths: Sequence[str],
    masks: ObjectMasks | None,
    layer: str,
    seed: int,
) -> dict[str, Any]:
    """Return the cases of a scan as `run.json` holds them: source, rule, table, and mean scores."""
    kept = np.flatnonzero(loaded).tolist()
    cases = assign_cases(right[kept], [accuracy.accurate[i] for i in kept])
    record: dict[str, Any] = {
        "source": accuracy.source,
        "threshold": accuracy.threshold,
        "rule": accuracy.rule,
        "note": accuracy.note,
        "layer": layer,
        "method": "gradcam",
        "images": sum(case is not None for case in cases),
        "without": sum(case is None for case in cases),
        "table": case_table(cases, [class_names[i] for i in kept]),
        "scores": _mean_scores(scores, seed),
    }
    if masks is not None:
        record["note"] = _threshold_note(scores, accuracy)
        record["masks"] = {
            "path": str(masks.path),
            "kind": masks.kind,
            "matched": sum(paths[i] in masks for i in kept),
            "unused": masks.unused,
            "refused": len(scores.refused),
            "refused_files": [
                {"path": paths[i], "reason": why}
                for i, why in list(scores.refused.items())[:_REFUSED_SHOWN]
            ],
        }
    return record


def _threshold_note(scores: MapScores, accuracy: MapAccuracy) -> str:
    """Return a warning where so small objects, or so coarse maps, leave the threshold out of reach.

    Half of the energy inside is much for a thin object: the map of a late layer has few cells, and
    each is wider than the object.
    """
    reached = [accurate for accurate in accuracy.accurate if accurate is not None]
    if not reached or sum(reached) >= _RARE * len(reached):
        return ""
    area, energy = float(np.nanmean(scores.area)), float(np.nanmean(scores.energy))
    return (
        f"Hardly any map reaches the threshold of {accuracy.threshold:.0%}: objects cover "
        f"{area:.1%} of the image on average and maps have {energy:.1%} of their energy inside. "
        "Where objects are smaller than a cell of the map, use boxes, or a lower --map-threshold."
    )


def _mean_scores(scores: MapScores, seed: int) -> dict[str, Any]:
    """Return the mean of each score with its interval; energy beside what chance would give it."""
    means: dict[str, Any] = {}
    known = ~np.isnan(scores.energy)
    if known.any():
        means["energy_inside"] = bootstrap_mean(scores.energy[known], seed=seed).as_dict()
        means["energy_by_chance"] = float(scores.area[known].mean())
        means["pointing_hits"] = wilson(int(scores.hit[known].sum()), int(known.sum())).as_dict()
    measured = scores.faithfulness[~np.isnan(scores.faithfulness)]
    if len(measured):
        means["faithfulness"] = bootstrap_mean(measured, seed=seed).as_dict()
    return means
