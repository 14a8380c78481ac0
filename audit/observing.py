"""The passes of a scan over its images: what the network says of each, and where it looks.

Every image is predicted; those outside the test split give evidence on every layer in the same
pass; maps are then judged, by the proxy where no mask says where the objects are. Processes of a
team take whole batches in turn and the first one ends with the numbers of all of them. Each pass
can be interrupted after any batch and goes on there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit import console
from audit.checkpoints import Checkpoint, Checkpoints
from audit.evidence import Gathering, LayerEvidence
from audit.images import ImageBatch, ImageFolder, iterate_batches
from audit.images.masks import ObjectMasks
from audit.map_scores import (
    MapScores,
    proxy_positions,
    read_objects,
    score_by_masks,
    score_by_proxy,
)
from audit.networks import Network
from audit.networks.layers import Layer
from audit.networks.program import Program
from audit.parallel import Team
from audit.saliency import layer_map, normalize_maps, target_scores
from audit.scan_config import ScanConfig
from audit.statistics import Interval

__all__ = ["Findings", "Predictions", "Subject", "loading_workers", "observe", "score_maps"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a scan looks at, how, and with whom.

    Attributes:
        layers: Those to find evidence on.
        shown: The layer whose maps are shown first, None where none has maps.
    """

    network: Network
    folder: ImageFolder
    masks: ObjectMasks | None
    layers: tuple[Layer, ...]
    shown: str | None
    config: ScanConfig
    team: Team
    checkpoints: Checkpoints

    @property
    def labels(self) -> np.ndarray:
        return np.array([record.label for record in self.folder.records])


@dataclass
class Predictions:
    """Per image of the folder, by position; NaN and -1 where an image could not be loaded."""

    predicted: np.ndarray
    p_true: np.ndarray
    p_predicted: np.ndarray
    cross_entropy: np.ndarray
    map_mean: np.ndarray
    map_peak: np.ndarray  # (N, 2), x and y in [0, 1]

    @classmethod
    def empty(cls, images: int) -> Predictions:
        p_true, p_predicted, cross_entropy, map_mean = np.full((4, images), np.nan)
        peak = np.full((images, 2), np.nan)
        return cls(np.full(images, -1), p_true, p_predicted, cross_entropy, map_mean, peak)

    @property
    def loaded(self) -> np.ndarray:
        return self.predicted >= 0


@dataclass
class Findings:
    """What is known of each image of the folder, by position, and which could not be loaded."""

    predictions: Predictions
    scores: MapScores
    skipped: dict[int, str]

    @classmethod
    def empty(cls, images: int) -> Findings:
        return cls(Predictions.empty(images), MapScores.empty(images), {})

    @property
    def size_bytes(self) -> int:
        return sum(column.nbytes for column in self._columns())

    def state(self) -> dict[str, Any]:
        """Return all of it, for `restore`: a tensor and plain values."""
        return {
            "table": torch.from_numpy(np.stack(self._columns()).astype(np.float64)),
            "skipped": self.skipped,
            "refused": self.scores.refused,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        for column, values in zip(self._columns(), state["table"].numpy(), strict=True):
            column[:] = values
        self.skipped |= state["skipped"]
        self.scores.refused |= state["refused"]

    def share(self, team: Team, mine: Sequence[int]) -> None:
        """Let the first process know what each found out about its own images."""
        if team.alone:
            return
        own = np.asarray(mine, dtype=np.int64)
        values = np.stack([column[own] for column in self._columns()])
        for places, found, skipped, refused in team.gathered(
            (own, values, self.skipped, self.scores.refused)
        ):
            for column, numbers in zip(self._columns(), found, strict=True):
                known = numbers >= 0  # not NaN, nor -1: another pass has dealt it out otherwise
                column[places[known]] = numbers[known]
            self.skipped |= skipped
            self.scores.refused |= refused

    def _columns(self) -> list[np.ndarray]:
        said, scores = self.predictions, self.scores
        return [
            *(said.predicted, said.p_true, said.p_predicted, said.cross_entropy, said.map_mean),
            *(said.map_peak[:, 0], said.map_peak[:, 1]),
            *(scores.energy, scores.hit, scores.area, scores.faithfulness),
        ]


def observe(subject: Subject, findings: Findings) -> list[LayerEvidence]:
    """Predict every image; return the evidence of those that are not in the test split.

    Findings and evidence of all images are the first process's; others keep those of their own.
    """
    folder = subject.folder
    testing = folder.positions("test")
    choosing = sorted({*range(len(folder.records))} - {*testing})
    evidence = _gather(subject, findings, choosing)
    _predict_test_split(subject, findings, testing)
    return evidence


def score_maps(subject: Subject, findings: Findings) -> None:
    """Score maps by the proxy, of a draw of the images, where there are maps and no masks."""
    shown, program = subject.shown, subject.network.program
    if shown is None or subject.masks is not None:
        return
    step = subject.checkpoints.step("cases")
    if _is_known(step, findings):
        return
    loaded, seed = findings.predictions.loaded, subject.config.seed
    positions = subject.team.leaders(proxy_positions(loaded, seed=seed))
    labels = torch.from_numpy(subject.labels)

    def score(batch: ImageBatch) -> None:
        images = subject.network.normalize(batch.pixels)
        targets = labels[batch.indices].to(program.device)
        _, maps = _predict(program, images, targets, shown)
        indices = batch.indices.tolist()
        score_by_proxy(findings.scores, indices, program.logits, images, targets, maps[shown])

    _share_out(subject, step, findings, positions, "judging maps by the proxy", score)
    step.finish({"findings": findings.state()})


# ------------------------------------------------------------------------- the passes


def _gather(subject: Subject, findings: Findings, positions: Sequence[int]) -> list[LayerEvidence]:
    network, layers, shown = subject.network, subject.layers, subject.shown
    step = subject.checkpoints.step("evidence")
    if _is_known(step, findings):
        records = step.result["evidence"] if step.result else ()
        return [_from_record(x, of) for x, of in zip(layers, records, strict=subject.team.leads)]
    program, labels = network.program, torch.from_numpy(subject.labels)
    # The shown layer's maps are wanted of every image, also where that layer is not tried.
    further = [program.layer(shown)] if shown and shown not in {x.name for x in layers} else []
    gathering = Gathering(program, [*layers, *further])
    if step.earlier is not None:
        gathering.restore(step.earlier["gathering"])

    def gather(batch: ImageBatch) -> None:
        at = batch.indices.tolist()
        objects = None
        if subject.masks is not None and shown is not None:
            paths = [subject.folder.records[i].path for i in at]
            preprocessing = network.card.preprocessing
            objects = read_objects(findings.scores, at, paths, subject.masks, preprocessing)
        logits, maps = gathering.add(
            network.normalize(batch.pixels),
            labels[batch.indices].to(program.device),
            objects=objects,
            keys=batch.indices,
        )
        found = maps.get(shown or "")
        _record(findings.predictions, batch.indices.numpy(), logits, labels[batch.indices], found)
        if objects is not None and found is not None:
            score_by_masks(findings.scores, at, found, objects)

    _share_out(subject, step, findings, positions, "gathering evidence", gather, gathering)
    gathering.share(subject.team)
    evidence = gathering.scores(seed=subject.config.seed)[: len(layers)]
    step.finish({"findings": findings.state(), "evidence": [_as_record(one) for one in evidence]})
    return evidence


def _predict_test_split(subject: Subject, findings: Findings, positions: Sequence[int]) -> None:
    network, shown = subject.network, subject.shown
    step = subject.checkpoints.step("test")
    if _is_known(step, findings):
        return
    program, labels = network.program, torch.from_numpy(subject.labels)

    def predict(batch: ImageBatch) -> None:
        images, targets = network.normalize(batch.pixels), labels[batch.indices]
        logits, maps = _predict(program, images, targets.to(program.device), shown)
        found = maps.get(shown or "")
        _record(findings.predictions, batch.indices.numpy(), logits, targets, found)
        at = batch.indices.tolist()
        if subject.masks is not None and found is not None:
            paths = [subject.folder.records[i].path for i in at]
            preprocessing = network.card.preprocessing
            objects = read_objects(findings.scores, at, paths, subject.masks, preprocessing)
            if objects is not None:
                score_by_masks(findings.scores, at, found, objects)

    _share_out(subject, step, findings, positions, "predicting the test split", predict)
    step.finish({"findings": findings.state()})


def _share_out(
    subject: Subject,
    step: Checkpoint,
    findings: Findings,
    positions: Sequence[int],
    what: str,
    work: Callable[[ImageBatch], None],
    gathering: Gathering | None = None,
) -> None:
    """Work through this process's batches, from where it was interrupted; then share the findings.

    Args:
        positions: Of the images, rising.
        what: What the user is told.
        gathering: What is kept beside the findings.
    """
    network, size = subject.network, subject.config.batch_size
    device = network.program.device
    mine = subject.team.part_by_batch(positions, size)
    done = 0
    if step.earlier is not None:
        done = step.earlier["done"]
        findings.restore(step.earlier["findings"])
    with console.progress(what, len(mine)) as bar:
        bar.advance(done)
        for batch in iterate_batches(
            subject.folder,
            mine[done:],
            network.card.preprocessing,
            batch_size=size,
            workers=loading_workers(subject.config.workers, device),
            pin_memory=device.type == "cuda",
            on_skip=findings.skipped.__setitem__,
        ):
            work(batch)
            bar.advance(len(batch.indices))
            held = findings.size_bytes + (gathering.size_bytes if gathering else 0)
            if step.due(held):
                # Whole batches, whatever was skipped: those to come stay as they are.
                before = bisect_left(mine, int(batch.indices[0])) // size
                state = {"done": min((before + 1) * size, len(mine)), "findings": findings.state()}
                step.save(state | ({"gathering": gathering.state()} if gathering else {}))
    findings.share(subject.team, mine)


def _is_known(step: Checkpoint, findings: Findings) -> bool:
    """Whether a step was finished before an interruption; what is known then is taken over."""
    if step.result is not None:
        findings.restore(step.result["findings"])
    return step.finished


# ------------------------------------------------------------------------- one batch


def _predict(
    program: Program, images: Tensor, targets: Tensor, shown: str | None
) -> tuple[Tensor, dict[str, Tensor]]:
    if shown is None:
        with torch.no_grad():
            return program.logits(images), {}
    activations, logits = program.watch(images, [shown])
    score = target_scores(logits, targets)
    (gradients,) = torch.autograd.grad(score, activations[shown])
    maps = layer_map(program.layer(shown), activations[shown], gradients)
    return logits.detach(), {shown: normalize_maps(maps.detach())}


def _record(
    predictions: Predictions,
    positions: np.ndarray,
    logits: Tensor,
    targets: Tensor,
    maps: Tensor | None,
) -> None:
    logits = logits.double().cpu()
    probabilities = logits.softmax(dim=1)
    best, predicted = probabilities.max(dim=1)
    true = probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    predictions.predicted[positions] = predicted.numpy()
    predictions.p_true[positions] = true.numpy()
    predictions.p_predicted[positions] = best.numpy()
    predictions.cross_entropy[positions] = cross_entropy.numpy()
    if maps is None:
        return
    height, width = maps.shape[1:]
    peak = maps.flatten(1).argmax(dim=1)
    predictions.map_mean[positions] = maps.mean(dim=(1, 2)).cpu().numpy()
    predictions.map_peak[positions, 0] = ((peak % width + 0.5) / width).cpu().numpy()
    predictions.map_peak[positions, 1] = ((peak // width + 0.5) / height).cpu().numpy()


# ------------------------------------------------------------------------- small decisions


def loading_workers(asked: int | None, device: torch.device) -> int:
    """Return how many processes load images."""
    if asked is not None:
        return asked
    # On a CPU the network itself keeps the cores busy; a GPU has to be fed.
    return 8 if device.type == "cuda" else 0


def _as_record(evidence: LayerEvidence) -> dict[str, Any]:
    record = {name: getattr(evidence, name) for name in evidence.__dataclass_fields__}
    del record["layer"]
    return record | {"map_auroc": asdict(evidence.map_auroc)}


def _from_record(layer: Layer, record: Mapping[str, Any]) -> LayerEvidence:
    separation = Interval(**record["map_auroc"])
    return LayerEvidence(**{**record, "layer": layer, "map_auroc": separation})
