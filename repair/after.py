"""What a repair did beyond accuracy: cases before and after, calibration, and where maps lie now.

The cases are those of the scan: its layer, its rule, its threshold. They are compared image by
image on the test split.

A repair by the penalty is trained on the maps' mean, or on their share outside a mask; a score that
was trained says little. What is told beside it is insertion (`audit.faithfulness`): is the region
that the map keeps, shown alone, taken for the true class? No loss here trains on it, and it needs
no masks. Where there are masks, the pointing game stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from audit.cases import assign_cases
from audit.images import ImageFolder, iterate_batches
from audit.images.masks import ObjectMasks, open_masks
from audit.map_accuracy import ENERGY_THRESHOLD
from audit.map_scores import (
    MapScores,
    judge_maps,
    proxy_positions,
    read_objects,
    score_by_masks,
    score_by_proxy,
)
from audit.saliency import layer_maps, normalize_maps
from audit.statistics import Interval, bootstrap_mean, calibration_interval, mcnemar
from repair.decision import Predictions

if TYPE_CHECKING:
    from audit.networks import Network
    from audit.runs import Run

SCORED_IMAGES = 256
"""Test images whose maps are scored, a seeded draw where there are more: a score of one image costs
as much as a few of its predictions."""

CASES = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class MapComparison:
    """The maps of the same test images before and after a repair.

    Attributes:
        layer: Whose Grad-CAM of the true class was scored.
        source: What says whether a map is accurate: `masks` or `proxy`.
        rule: The same in words.
        note: What speaks against relying on it, empty where nothing does.
        rows: Which rows of the test split were scored, (M,).
        cases: Case of each scored image before and after, (M, 2); 0 where it has none.
        insertion: Insertion score of each before and after, (M, 2) in [0, 1].
        hits: Whether the peak lies on the object before and after, (M, 2); NaN without a mask.
    """

    layer: str
    source: str
    rule: str
    note: str
    rows: np.ndarray
    cases: np.ndarray
    insertion: np.ndarray
    hits: np.ndarray

    @property
    def table(self) -> list[list[int]]:
        """Images by case before (rows) and after (columns)."""
        return [
            [int(((self.cases[:, 0] == b) & (self.cases[:, 1] == a)).sum()) for a in CASES]
            for b in CASES
        ]

    def as_dict(self, *, seed: int) -> dict[str, Any]:
        """Return the numbers for repair.json, with intervals."""
        known = self.cases[(self.cases > 0).all(axis=1)]
        accurate = np.isin(known, (1, 2))  # right or wrong, with an accurate map
        record: dict[str, Any] = {
            "layer": self.layer,
            "method": "gradcam",
            "source": self.source,
            "rule": self.rule,
            "note": self.note,
            "images": len(known),
            "without": len(self.cases) - len(known),
            "table": self.table,
            "accurate": None,
            "insertion": _paired(self.insertion, seed),
            "pointing": None,
        }
        if len(known):
            test = mcnemar(accurate[:, 0], accurate[:, 1])
            record["accurate"] = {
                **_paired(accurate.astype(np.float64), seed),
                "mcnemar": test.as_dict(),
            }
        seen = self.hits[~np.isnan(self.hits).any(axis=1)]
        if len(seen):
            record["pointing"] = {**_paired(seen, seed), "images": len(seen)}
        return record

    def columns(self, images: int) -> dict[str, list[int | None]]:
        """Return the cases for images.parquet, None for images that were not scored."""
        columns: dict[str, list[int | None]] = {}
        for column, when in enumerate(("before", "after")):
            cases: list[int | None] = [None] * images
            for row, case in zip(self.rows, self.cases[:, column], strict=True):
                cases[int(row)] = int(case) or None
            columns[f"case_{when}"] = cases
        return columns


def compare_maps(
    run: Run,
    network: Network,
    parameters: Mapping[str, Tensor],
    folder: ImageFolder,
    positions: Sequence[int],
    before: Predictions,
    after: Predictions,
    *,
    layer: str,
    seed: int,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> MapComparison | None:
    """Return the maps of the test images scored before and after a repair.

    Args:
        run: The scan, which says whose maps it judged and by what.
        network: The network before.
        parameters: What the repair changed, by state entry.
        folder: The images.
        positions: Places of the test images in the folder's records.
        before: What the network said about them, in that order.
        after: What the repaired network says.
        layer: Whose maps to judge where the scan judged none.
        seed: Of the draw and of the bootstrap.
        batch_size: Images at a time.
        on_batch: Called with the number of images of each batch.

    Returns:
        None where no layer has maps.
    """
    recorded = run.info.get("cases") or {}
    judged = network.layer(recorded.get("layer") or layer)
    if not judged.has_maps:
        return None
    drawn = proxy_positions(np.ones(len(positions), bool), seed=seed, images=SCORED_IMAGES)
    rows = np.array(drawn, dtype=np.int64)
    wanted = [int(positions[row]) for row in rows]
    masks = _recorded_masks(recorded, folder)
    threshold = float((run.info.get("config") or {}).get("map_threshold", ENERGY_THRESHOLD))
    scores = [
        score_maps(one, judged.name, folder, wanted, masks, batch_size, on_batch)
        for one in (network, network.with_state(parameters))
    ]
    at = np.array(wanted)
    verdicts = [
        judge_maps(one, with_masks=masks is not None, threshold=threshold) for one in scores
    ]
    cases = [
        assign_cases(said.right[rows], [verdict.accurate[i] for i in wanted])
        for said, verdict in zip((before, after), verdicts, strict=True)
    ]
    return MapComparison(
        layer=judged.name,
        source=verdicts[0].source,
        rule=verdicts[0].rule,
        note=verdicts[0].note or verdicts[1].note,
        rows=rows,
        cases=np.array([[case or 0 for case in column] for column in cases]).T,
        insertion=np.stack([one.faithfulness[at] for one in scores], axis=1),
        hits=np.stack([one.hit[at] for one in scores], axis=1),
    )


def calibration_record(
    before: Predictions, after: Predictions, control: Predictions | None, *, seed: int
) -> dict[str, Any]:
    """Return the expected calibration error of each, with bootstrap intervals."""
    named = {"before": before, "after": after, "control": control}
    return {
        name: calibration_interval(said.p_predicted, said.right, seed=seed).as_dict()
        for name, said in named.items()
        if said is not None and said.p_predicted is not None
    }


def _recorded_masks(cases: Mapping[str, Any], folder: ImageFolder) -> ObjectMasks | None:
    """Return the masks that the scan used, None where it had none or they are gone."""
    path = (cases.get("masks") or {}).get("path")
    if path is None or not Path(path).exists():
        return None
    return open_masks(Path(path), folder)


def score_maps(
    network: Network,
    layer: str,
    folder: ImageFolder,
    positions: Sequence[int],
    masks: ObjectMasks | None,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> MapScores:
    """Return the scores of a layer's Grad-CAM of the true class, by position.

    Args:
        positions: Places in the folder's records of the images to score, by the proxy.
        masks: To score them against too.
        on_batch: Called with the number of images of each batch.
    """
    program, preprocessing = network.program, network.card.preprocessing
    scores = MapScores.empty(len(folder.records))
    for batch in iterate_batches(folder, positions, preprocessing, batch_size=batch_size):
        images = network.normalize(batch.pixels)
        places = batch.indices.tolist()
        labels = [folder.records[i].label for i in places]
        targets = torch.tensor(labels, device=program.device)
        maps = normalize_maps(layer_maps(program, images, targets, layers=[layer])[layer])
        score_by_proxy(scores, places, program.logits, images, targets, maps)
        if masks is not None:
            paths = [folder.records[i].path for i in places]
            objects = read_objects(scores, places, paths, masks, preprocessing)
            if objects is not None:
                score_by_masks(scores, places, maps, objects)
        if on_batch is not None:
            on_batch(len(places))
    return scores


def _paired(values: np.ndarray, seed: int) -> dict[str, Any]:
    """Return means before and after, and their difference with its interval, of (M, 2)."""
    kept = values[~np.isnan(values).any(axis=1)]

    def interval(sample: np.ndarray) -> dict[str, float]:
        found: Interval = bootstrap_mean(sample, seed=seed)
        return found.as_dict()

    return {
        "before": interval(kept[:, 0]),
        "after": interval(kept[:, 1]),
        "difference": interval(kept[:, 1] - kept[:, 0]),
    }
