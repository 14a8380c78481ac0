"""What a scan writes down: the rows of its tables and the parts of run.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from audit.blame import shares_of_blame
from audit.cases import MapAccuracy
from audit.environment import device_record, versions
from audit.evidence import LayerEvidence
from audit.images import ImageFolder
from audit.images.records import SPLITS
from audit.map_scores import case_record, image_columns
from audit.moves import ChannelMove
from audit.networks import Network
from audit.networks.layers import Layer
from audit.observing import Findings, Subject
from audit.scan_config import ScanConfig, ScanRequest
from audit.statistics import classification_metrics
from audit.trials import TrialRepair, ranking

__all__ = ["case_info", "data_info", "image_table", "layer_rows", "metrics_info", "opening_info"]


def image_table(
    subject: Subject, findings: Findings, accuracy: MapAccuracy | None
) -> dict[str, Any]:
    """Return the columns of images.parquet, one entry per image that could be loaded."""
    said = findings.predictions
    kept = np.flatnonzero(said.loaded)
    records = [subject.folder.records[i] for i in kept]
    classes = subject.network.card.classes
    right = said.predicted == subject.labels
    return {
        "path": [record.path for record in records],
        "label": subject.labels[kept],
        "label_name": [classes[record.label] for record in records],
        "predicted": said.predicted[kept],
        "predicted_name": [classes[i] for i in said.predicted[kept]],
        "right": right[kept],
        "p_true": said.p_true[kept],
        "p_predicted": said.p_predicted[kept],
        "ce": said.cross_entropy[kept],
        "map_mean": said.map_mean[kept],
        "map_peak_x": said.map_peak[kept, 0],
        "map_peak_y": said.map_peak[kept, 1],
        **image_columns(findings.scores, accuracy, right, kept),
        "split": [record.split for record in records],
        "sha256": [record.sha256 for record in records],
    }


def layer_rows(
    layers: tuple[Layer, ...],
    evidence: Sequence[LayerEvidence],
    trials: Sequence[TrialRepair],
    channel_trials: Sequence[TrialRepair],
    moves: Sequence[ChannelMove],
) -> list[dict[str, Any]]:
    """Return the rows of layers.parquet."""
    blame = shares_of_blame(evidence, trials, channel_trials, moves) if trials else {}
    by_gain = [trial.layer.name for trial in ranking(trials)]
    order = sorted(by_gain, key=lambda name: -blame[name])  # stable: ties stay in order of gain
    ranks = {name: rank for rank, name in enumerate(order, start=1)}
    tried = {trial.layer.name: trial for trial in trials}
    channels = {trial.layer.name: trial.gain for trial in channel_trials}
    by_moves = {one.layer.name: one.gain for one in moves}
    rows = []
    for layer, scores in zip(layers, evidence, strict=True):
        row: dict[str, Any] = {
            "index": layer.index,
            "name": layer.name,
            "alias": layer.alias,
            "kind": layer.kind,
            "shape": "x".join(map(str, layer.shape)),
            "parameters": layer.parameters,
            "gradient_norm": scores.gradient_norm,
            "relative_gradient_norm": scores.relative_gradient_norm,
            "gradient_snr": scores.gradient_snr,
            "gradient_agreement": scores.gradient_agreement,
            "gradient_conflict": scores.gradient_conflict,
            "map_mean_right": scores.map_mean_right,
            "map_mean_wrong": scores.map_mean_wrong,
            "map_auroc": scores.map_auroc.value,
            "map_auroc_low": scores.map_auroc.low,
            "map_auroc_high": scores.map_auroc.high,
            "penalty": scores.penalty,
            "energy_inside": scores.energy_inside,
            "pointing_game": scores.pointing_game,
            "energy_drop": scores.energy_drop,
            "bn_drift": scores.drift,
            "bn_drift_onset": scores.drift_onset,
            "bn_drift_unexplained": scores.drift_unexplained,
            "bn_drift_by_signs": scores.drift_by_signs,
            "silent_channels": scores.silent_channels,
            "norm_outlier": scores.norm_outlier,
            "blame": blame.get(layer.name),
        }
        for column, gains in (("channel_gain", channels), ("moves_gain", by_moves)):
            if layer.name in gains:
                gain = gains[layer.name]
                row |= {
                    column: gain.value,
                    f"{column}_low": gain.low,
                    f"{column}_high": gain.high,
                }
        if layer.name in tried:
            trial = tried[layer.name]
            row |= {
                "trial_gain": trial.gain.value,
                "trial_gain_low": trial.gain.low,
                "trial_gain_high": trial.gain.high,
                "trial_step": trial.step_size,
                "trial_steps": trial.steps,
                "trial_broken": trial.broken,
                "rank": ranks[layer.name],
            }
        rows.append(row)
    return rows


def metrics_info(subject: Subject, findings: Findings) -> dict[str, Any]:
    """Return accuracy and its kin, over all images and by split."""
    said, labels = findings.predictions, subject.labels
    splits = np.array([record.split for record in subject.folder.records])
    metrics = {}
    for name in ("all", *SPLITS):
        chosen = said.loaded & ((splits == name) | (name == "all"))
        if chosen.any():
            metrics[name] = classification_metrics(
                labels[chosen],
                said.predicted[chosen],
                said.cross_entropy[chosen],
                subject.network.card.classes,
                seed=subject.config.seed,
            )
    return metrics


def case_info(
    subject: Subject, findings: Findings, accuracy: MapAccuracy | None
) -> dict[str, Any] | None:
    """Return the cases for run.json, None where the network has no layer with maps."""
    if subject.shown is None or accuracy is None:
        return None
    records = subject.folder.records
    return case_record(
        findings.scores,
        accuracy,
        loaded=findings.predictions.loaded,
        right=findings.predictions.predicted == subject.labels,
        class_names=[record.class_name for record in records],
        paths=[record.path for record in records],
        masks=subject.masks,
        layer=subject.shown,
        seed=subject.config.seed,
    )


def opening_info(
    request: ScanRequest, config: ScanConfig, network: Network, folder: ImageFolder, device: str
) -> dict[str, Any]:
    """Return what run.json says from the start; a resumed scan is found and checked by it."""
    masks = {"masks": str(request.masks)} if request.masks else {}
    return {
        "command": list(request.command),
        "config": {**asdict(config), **masks},
        "seed": config.seed,
        "versions": versions(),
        "device": device_record(device),
        "model": {
            "source": network.source,
            "arch": network.card.arch,
            "sha256": network.sha256,
            "parameters": sum(layer.parameters for layer in network.program.layers),
            "layers": len(network.program.layers),
            "classes": list(network.card.classes),
            "preprocessing": asdict(network.card.preprocessing),
        },
        "data": {"root": str(request.data), "fingerprint": folder.fingerprint},
    }


def data_info(request: ScanRequest, folder: ImageFolder, findings: Findings) -> dict[str, Any]:
    """Return what the images are, how many, and which were skipped and why."""
    loaded, skipped = findings.predictions.loaded, findings.skipped
    kept = [r for r, usable in zip(folder.records, loaded, strict=True) if usable]
    files = [{"path": s.path, "reason": s.reason} for s in folder.skipped]
    files += [{"path": folder.records[i].path, "reason": why} for i, why in sorted(skipped.items())]
    return {
        "root": str(request.data),
        "fingerprint": folder.fingerprint,
        "split_source": folder.split_source,
        "split_notes": list(folder.split_notes),
        "images": len(kept),
        "skipped": len(files),
        "duplicates": folder.duplicates,
        "splits": {split: sum(r.split == split for r in kept) for split in SPLITS},
        "skipped_files": files,
    }
