"""The scan: what a model gets wrong, where it looks, and which layer is at fault.

It reads like the method. Open the network and the images; predict every image and gather evidence
on every layer in one pass; try a repair of every layer on some images and judge it on others; add
that up to a verdict; keep everything in a run folder. The test split takes no part in choosing the
layer: it is predicted and nothing else, so that a repair can be judged on it later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit import console
from audit.blame import has_memory, promising, shares_of_blame
from audit.cases import MapAccuracy
from audit.environment import choose_device, device_record, peak_memory_mib, versions
from audit.errors import ImageError, UsageError
from audit.evidence import LayerEvidence, gather_evidence
from audit.grouping import error_groups
from audit.images import ImageFolder, iterate_batches, load_pixels, open_image_folder
from audit.images.masks import ObjectMasks, open_masks
from audit.images.records import SPLITS
from audit.map_accuracy import ENERGY_THRESHOLD
from audit.map_scores import (
    MapScores,
    Objects,
    case_record,
    image_columns,
    judge_maps,
    proxy_positions,
    read_objects,
    score_by_masks,
    score_by_proxy,
)
from audit.networks import Network, open_network
from audit.networks.layers import Layer, match_layers
from audit.networks.program import Program
from audit.runs import Run, start_run
from audit.saliency import (
    METHODS,
    Method,
    layer_map,
    layer_maps,
    normalize_maps,
    target_scores,
)
from audit.statistics import classification_metrics
from audit.trials import (
    CHANNEL_TRIAL,
    TrialConfig,
    TrialRepair,
    planned_steps,
    ranking,
    trial_repairs,
)
from audit.verdict import drift_origin, judge

__all__ = ["ScanConfig", "ScanRequest", "scan_model"]

GALLERY_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """What decides the numbers of a scan.

    Attributes:
        layers: Glob patterns of the layers to try; all when None.
        method: Saliency of the gallery's maps.
        limit: Scan a stratified sample of so many images.
        trial_images: At most so many images teach the trial repairs.
        judge_images: At most so many others judge them.
        map_threshold: Share of a map's energy that has to lie in the mask for it to be accurate.
        budget_s: At most so many seconds of trials; a trial that is under way is finished.
    """

    layers: str | None = None
    method: str = "gradcam"
    limit: int | None = None
    batch_size: int = 32
    workers: int | None = None
    device: str = "auto"
    seed: int = 0
    trial_images: int = 64
    judge_images: int = 192
    map_threshold: float = ENERGY_THRESHOLD
    budget_s: float = 300.0
    trial: TrialConfig = field(default_factory=TrialConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.budget_s <= 0:
            raise UsageError(f"--budget is {self.budget_s}; expected seconds above 0")
        if not 0 < self.map_threshold <= 1:
            raise UsageError(
                f"--map-threshold is {self.map_threshold}; expected a share above 0 and at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class ScanRequest:
    """What is scanned, from where, and where the run goes."""

    model: str
    data: Path
    out: Path = Path("runs")
    arch: str | None = None
    classes: Path | None = None
    masks: Path | None = None
    trust_pickle: bool = False
    code: Path | None = None
    command: tuple[str, ...] = ()


@dataclass
class _Predictions:
    """Per image of the folder, by position; NaN and -1 where an image could not be loaded."""

    predicted: np.ndarray
    p_true: np.ndarray
    p_predicted: np.ndarray
    cross_entropy: np.ndarray
    map_mean: np.ndarray
    map_peak: np.ndarray  # (N, 2), x and y in [0, 1]

    @classmethod
    def empty(cls, images: int) -> _Predictions:
        p_true, p_predicted, cross_entropy, map_mean = np.full((4, images), np.nan)
        peak = np.full((images, 2), np.nan)
        return cls(np.full(images, -1), p_true, p_predicted, cross_entropy, map_mean, peak)

    @property
    def loaded(self) -> np.ndarray:
        return self.predicted >= 0


class _Timings(dict[str, float]):
    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self[step] = round(time.perf_counter() - started, 3)


def scan_model(request: ScanRequest, config: ScanConfig) -> Run:
    """Scan a model and return the finished run.

    Raises:
        NetworkError: The model cannot be opened or traced.
        ImageError: The images cannot be matched to the model's classes, or none is usable; or no
            mask belongs to any of them.
        LayerNotFoundError: A pattern of ``config.layers`` matches nothing.
    """
    timings = _Timings()
    started = time.perf_counter()
    device = choose_device(config.device)
    with timings.measure("open_model"):
        network = open_network(
            request.model,
            arch=request.arch,
            classes=request.classes,
            trust_pickle=request.trust_pickle,
            code=request.code,
            device=device,
        )
        layers = _chosen_layers(network, config.layers)
    with timings.measure("open_images"), console.progress("reading images", None) as bar:
        folder = open_image_folder(
            request.data,
            network.card.classes,
            seed=config.seed,
            limit=config.limit,
            progress=bar.advance,
        )
    masks = open_masks(request.masks, folder) if request.masks else None
    run = start_run(
        request.out, _model_name(request.model), _opening_info(request, config, network, device)
    )
    try:
        _fill_run(run, network, folder, masks, layers, config, request, timings)
    except BaseException as error:
        run.fail(str(error) or type(error).__name__)
        raise
    timings["total"] = round(time.perf_counter() - started, 3)
    run.finish(timings_s=dict(timings), peak_memory_mib=peak_memory_mib())
    return run


def _fill_run(
    run: Run,
    network: Network,
    folder: ImageFolder,
    masks: ObjectMasks | None,
    layers: tuple[Layer, ...],
    config: ScanConfig,
    request: ScanRequest,
    timings: _Timings,
) -> None:
    shown = _shown_layer(network)
    predictions = _Predictions.empty(len(folder.records))
    scores = MapScores.empty(len(folder.records))
    skipped: dict[int, str] = {}
    with timings.measure("evidence"):
        evidence = _observe(
            network, folder, masks, layers, shown, config, predictions, scores, skipped
        )
    if not predictions.loaded.any():
        raise ImageError(
            f"none of the {len(folder.records)} images in {request.data} could be decoded"
        )
    labels = np.array([record.label for record in folder.records])
    with timings.measure("cases"):
        accuracy = _judge_maps(network, folder, masks, shown, config, predictions, scores)
    with timings.measure("groups"):
        _write_groups(run, network, folder, predictions, config)
    with timings.measure("trials"):
        trials, channel_trials, held_out = _try_repairs(
            network, folder, layers, evidence, predictions, labels, config
        )
    wrong = int((predictions.predicted[held_out] != labels[held_out]).sum())
    verdict = judge(
        trials,
        evidence,
        channel_trials,
        wrong=wrong,
        images=len(held_out),
    )
    with timings.measure("gallery"):
        _write_gallery(run, network, folder, layers, shown, predictions, labels, config)
    right = predictions.predicted == labels
    map_columns = image_columns(scores, accuracy, right)
    rows = zip(
        np.flatnonzero(predictions.loaded),
        _image_rows(folder, predictions, network),
        strict=True,
    )
    run.write_images([row | map_columns[i] for i, row in rows])
    run.write_layers(_layer_rows(layers, evidence, trials, channel_trials))
    run.write_verdict(verdict.as_dict())
    run.write_info(
        data=_data_info(request, folder, predictions, skipped),
        metrics=_metrics(folder, predictions, labels, network, config.seed),
        cases=_cases(folder, masks, shown, predictions, scores, accuracy, right, config.seed),
    )


def _observe(
    network: Network,
    folder: ImageFolder,
    masks: ObjectMasks | None,
    layers: tuple[Layer, ...],
    shown: str | None,
    config: ScanConfig,
    predictions: _Predictions,
    scores: MapScores,
    skipped: dict[int, str],
) -> list[LayerEvidence]:
    """Predict every image; gather evidence on those that are not in the test split."""
    program = network.program
    labels = torch.tensor([record.label for record in folder.records])
    in_hand = torch.empty(0, dtype=torch.int64)  # positions of the batch that is being worked on
    objects: Objects | None = None  # of the same batch

    def batches(positions: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal in_hand, objects
        for batch in iterate_batches(
            folder,
            positions,
            network.card.preprocessing,
            batch_size=config.batch_size,
            workers=_workers(config.workers, program.device),
            pin_memory=program.device.type == "cuda",
            on_skip=skipped.__setitem__,
        ):
            in_hand = batch.indices
            if masks is not None and shown is not None:
                at = in_hand.tolist()
                paths = [folder.records[i].path for i in at]
                objects = read_objects(scores, at, paths, masks, network.card.preprocessing)
            yield network.normalize(batch.pixels), labels[batch.indices].to(program.device)

    def record(logits: Tensor, maps: Mapping[str, Tensor]) -> None:
        found = maps.get(shown or "")
        _record(predictions, in_hand.numpy(), logits, labels[in_hand], found)
        if objects is not None and found is not None:
            score_by_masks(scores, in_hand.tolist(), found, objects)

    testing = folder.positions("test")
    choosing = sorted({*range(len(folder.records))} - {*testing})
    with console.progress("gathering evidence", len(choosing)) as bar:

        def observed(logits: Tensor, maps: Mapping[str, Tensor]) -> None:
            record(logits, maps)
            bar.advance(len(logits))

        # The shown layer's maps are wanted of every image, also where that layer is not tried.
        further = [program.layer(shown)] if shown and shown not in {x.name for x in layers} else []
        evidence = gather_evidence(
            program,
            batches(choosing),
            [*layers, *further],
            seed=config.seed,
            objects=lambda: objects,
            on_batch=observed,
        )[: len(layers)]
    with console.progress("predicting the test split", len(testing)) as bar:
        for images, targets in batches(testing):
            record(*_predict(program, images, targets, shown))
            bar.advance(len(images))
    return evidence


def _write_groups(
    run: Run,
    network: Network,
    folder: ImageFolder,
    predictions: _Predictions,
    config: ScanConfig,
) -> None:
    """Look at wrong images beside right ones; keep the groups that chance does not explain."""
    with console.progress("looking at wrong images", None) as bar:
        found = error_groups(
            network,
            folder,
            predictions.predicted,
            predictions.p_predicted,
            seed=config.seed,
            batch_size=config.batch_size,
            workers=_workers(config.workers, network.program.device),
            progress=bar.advance,
        )
    run.write_groups(found.document, found.maps, found.pictures)


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
    predictions: _Predictions,
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


def _judge_maps(
    network: Network,
    folder: ImageFolder,
    masks: ObjectMasks | None,
    shown: str | None,
    config: ScanConfig,
    predictions: _Predictions,
    scores: MapScores,
) -> MapAccuracy | None:
    """Return which maps are accurate; without masks the proxy says so of a draw of the images."""
    if shown is None:
        return None
    program = network.program
    if masks is None:
        positions = proxy_positions(predictions.loaded, seed=config.seed)
        batches = iterate_batches(
            folder, positions, network.card.preprocessing, batch_size=config.batch_size
        )
        with console.progress("judging maps by the proxy", len(positions)) as bar:
            for batch in batches:
                images = network.normalize(batch.pixels)
                labels = [folder.records[i].label for i in batch.indices]
                targets = torch.tensor(labels, device=program.device)
                _, maps = _predict(program, images, targets, shown)
                indices = batch.indices.tolist()
                score_by_proxy(scores, indices, program.logits, images, targets, maps[shown])
                bar.advance(len(images))
    return judge_maps(scores, with_masks=masks is not None, threshold=config.map_threshold)


def _try_repairs(
    network: Network,
    folder: ImageFolder,
    layers: tuple[Layer, ...],
    evidence: Sequence[LayerEvidence],
    predictions: _Predictions,
    labels: np.ndarray,
    config: ScanConfig,
) -> tuple[list[TrialRepair], list[TrialRepair], np.ndarray]:
    """Return trials of weights and of channels, and the positions of the images that judged them.

    Channels are tried where no batch norm remembers the training; both kinds share the budget.
    """
    learning, judging = _trial_positions(folder, predictions, labels, config)
    if not len(learning) or not len(judging):
        return [], [], judging
    device = network.program.device
    pixels = load_pixels(
        folder, [*learning, *judging], network.card.preprocessing, batch_size=config.batch_size
    ).pixels
    images = network.normalize(pixels)
    cut = len(learning)
    targets = torch.from_numpy(labels).to(device)
    kinds = (config.trial,) if has_memory(evidence) else (config.trial, CHANNEL_TRIAL)
    origin = drift_origin(evidence)
    favored = () if origin is None else (origin.layer.name,)
    order = promising(evidence)
    found: list[list[TrialRepair]] = []
    with console.progress(
        "trial repairs", sum(planned_steps(len(layers), k) for k in kinds)
    ) as bar:
        for kind in kinds:
            trials = trial_repairs(
                network.program,
                images[:cut],
                targets[learning],
                images[cut:],
                targets[judging],
                layers,
                replace(kind, budget_s=config.budget_s / len(kinds)),
                seed=config.seed,
                promising=order,
                favored=favored,
                on_steps=bar.advance,
            )
            found.append(trials)
    return found[0], found[1] if len(found) > 1 else [], judging


def _trial_positions(
    folder: ImageFolder, predictions: _Predictions, labels: np.ndarray, config: ScanConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images that teach the trials and others that judge them, none of the test split.

    They learn from the train split, wrong images first up to one half. A network that was fitted
    to that split makes too few errors there to learn from; then both come from the val split.
    """
    generator = np.random.default_rng(config.seed)
    right = predictions.predicted == labels

    def shuffled(split: str) -> np.ndarray:
        positions = [i for i, r in enumerate(folder.records) if r.split == split]
        return generator.permutation([i for i in positions if predictions.loaded[i]]).astype(int)

    train, val = shuffled("train"), shuffled("val")
    if not len(val):
        return val, val
    if not len(train) or (~right[train]).mean() < 0.5 * (~right[val]).mean():
        middle = len(val) // 2
        train, val = val[:middle], val[middle:]
    wrong_train, right_train = train[~right[train]], train[right[train]]
    wrong_chosen = wrong_train[: config.trial_images // 2]
    learning = np.concatenate([wrong_chosen, right_train])[: config.trial_images]
    return generator.permutation(learning), val[: config.judge_images]


def _write_gallery(
    run: Run,
    network: Network,
    folder: ImageFolder,
    layers: tuple[Layer, ...],
    shown: str | None,
    predictions: _Predictions,
    labels: np.ndarray,
    config: ScanConfig,
) -> None:
    """Keep maps of the true class for some images: wrong ones by confidence, then right ones."""
    positions = _gallery_positions(predictions, labels, config.seed)
    if shown is None or not positions:
        return
    method: Method = next(m for m in METHODS if m == config.method)
    loaded = load_pixels(folder, positions, network.card.preprocessing)
    images = network.normalize(loaded.pixels)
    targets = torch.from_numpy(labels[positions]).to(images.device)
    names = [layer.name for layer in layers if layer.has_maps]
    if shown not in names:
        names.append(shown)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(positions), config.batch_size):
        rows = slice(start, start + config.batch_size)
        found = layer_maps(
            network.program, images[rows], targets[rows], layers=names, method=method
        )
        for name, maps in found.items():
            parts.setdefault(name, []).append(normalize_maps(maps).float().cpu().numpy())
    for name, arrays in parts.items():
        run.write_maps(method, name, np.concatenate(arrays))
    classes = network.card.classes
    entries = [
        {
            "id": f"{at:04d}",
            "path": folder.records[i].path,
            "label_name": classes[labels[i]],
            "predicted_name": classes[predictions.predicted[i]],
            "right": bool(predictions.predicted[i] == labels[i]),
            "split": folder.records[i].split,
            "p_true": float(predictions.p_true[i]),
        }
        for at, i in enumerate(positions)
    ]
    index = {
        "images": entries,
        "layers": list(parts),
        "methods": [method],
        "shown_layer": shown if shown in parts else next(iter(parts)),
        "shown_method": method,
    }
    run.write_gallery(index, list(loaded.pixels.permute(0, 2, 3, 1).numpy()))


def _gallery_positions(
    predictions: _Predictions, labels: np.ndarray, seed: int, images: int = GALLERY_IMAGES
) -> list[int]:
    loaded = np.flatnonzero(predictions.loaded)
    right = predictions.predicted == labels
    wrong = loaded[~right[loaded]]
    wrong = wrong[np.argsort(-predictions.cross_entropy[wrong], kind="stable")]
    correct = np.random.default_rng(seed).permutation(loaded[right[loaded]])
    kept = wrong[: max(images * 3 // 4, images - len(correct))]
    return [int(i) for i in (*kept, *correct[: images - len(kept)])]


# ------------------------------------------------------------------------- rows and records


def _image_rows(
    folder: ImageFolder, predictions: _Predictions, network: Network
) -> list[dict[str, Any]]:
    classes = network.card.classes
    rows = []
    for i in np.flatnonzero(predictions.loaded):
        record, predicted = folder.records[i], int(predictions.predicted[i])
        rows.append(
            {
                "path": record.path,
                "label": record.label,
                "label_name": classes[record.label],
                "predicted": predicted,
                "predicted_name": classes[predicted],
                "right": predicted == record.label,
                "p_true": float(predictions.p_true[i]),
                "p_predicted": float(predictions.p_predicted[i]),
                "ce": float(predictions.cross_entropy[i]),
                "map_mean": float(predictions.map_mean[i]),
                "map_peak_x": float(predictions.map_peak[i, 0]),
                "map_peak_y": float(predictions.map_peak[i, 1]),
                "split": record.split,
                "sha256": record.sha256,
            }
        )
    return rows


def _layer_rows(
    layers: tuple[Layer, ...],
    evidence: Sequence[LayerEvidence],
    trials: Sequence[TrialRepair],
    channel_trials: Sequence[TrialRepair],
) -> list[dict[str, Any]]:
    blame = shares_of_blame(evidence, trials, channel_trials) if trials else {}
    by_gain = [trial.layer.name for trial in ranking(trials)]
    order = sorted(by_gain, key=lambda name: -blame[name])  # stable: ties stay in order of gain
    ranks = {name: rank for rank, name in enumerate(order, start=1)}
    tried = {trial.layer.name: trial for trial in trials}
    channels = {trial.layer.name: trial.gain for trial in channel_trials}
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
            "silent_channels": scores.silent_channels,
            "blame": blame.get(layer.name),
        }
        if layer.name in channels:
            gain = channels[layer.name]
            row |= {
                "channel_gain": gain.value,
                "channel_gain_low": gain.low,
                "channel_gain_high": gain.high,
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


def _metrics(
    folder: ImageFolder,
    predictions: _Predictions,
    labels: np.ndarray,
    network: Network,
    seed: int,
) -> dict[str, Any]:
    splits = np.array([record.split for record in folder.records])
    metrics = {}
    for name in ("all", *SPLITS):
        chosen = predictions.loaded & ((splits == name) | (name == "all"))
        if chosen.any():
            metrics[name] = classification_metrics(
                labels[chosen],
                predictions.predicted[chosen],
                predictions.cross_entropy[chosen],
                network.card.classes,
                seed=seed,
            )
    return metrics


def _cases(
    folder: ImageFolder,
    masks: ObjectMasks | None,
    shown: str | None,
    predictions: _Predictions,
    scores: MapScores,
    accuracy: MapAccuracy | None,
    right: np.ndarray,
    seed: int,
) -> dict[str, Any] | None:
    """Return the cases for run.json, None where the network has no layer with maps."""
    if shown is None or accuracy is None:
        return None
    return case_record(
        scores,
        accuracy,
        loaded=predictions.loaded,
        right=right,
        class_names=[record.class_name for record in folder.records],
        paths=[record.path for record in folder.records],
        masks=masks,
        layer=shown,
        seed=seed,
    )


def _opening_info(
    request: ScanRequest, config: ScanConfig, network: Network, device: str
) -> dict[str, Any]:
    settings = network.card.preprocessing
    return {
        "command": list(request.command),
        "config": asdict(config),
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
            "preprocessing": asdict(settings),
        },
    }


def _data_info(
    request: ScanRequest, folder: ImageFolder, predictions: _Predictions, skipped: dict[int, str]
) -> dict[str, Any]:
    kept = [r for r, loaded in zip(folder.records, predictions.loaded, strict=True) if loaded]
    files = [{"path": s.path, "reason": s.reason} for s in folder.skipped]
    files += [{"path": folder.records[i].path, "reason": why} for i, why in skipped.items()]
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


# ------------------------------------------------------------------------- small decisions


def _chosen_layers(network: Network, pattern: str | None) -> tuple[Layer, ...]:
    layers = network.program.layers
    if pattern is None:
        return layers
    return match_layers(layers, pattern, network=network.card.arch or network.source)


def _shown_layer(network: Network) -> str | None:
    """The layer whose maps are shown first: the last convolution."""
    with_maps = [layer.name for layer in network.program.layers if layer.has_maps]
    return with_maps[-1] if with_maps else None


def _model_name(source: str) -> str:
    name = source.partition(":")[2] if ":" in source and not Path(source).exists() else source
    return Path(name).stem or "model"


def _workers(asked: int | None, device: torch.device) -> int:
    if asked is not None:
        return asked
    # On a CPU the network itself keeps the cores busy; a GPU has to be fed.
    return 8 if device.type == "cuda" else 0
