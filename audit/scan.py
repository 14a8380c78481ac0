"""The scan: what a model gets wrong, where it looks, and which layer is at fault.

It reads like the method. Open the network and the images; predict every image and gather evidence
on every layer in one pass; try a repair of every layer on some images and judge it on others; add
that up to a verdict; keep everything in a run folder. The test split takes no part in choosing the
layer: it is predicted and nothing else, so that a repair can be judged on it later.

Several processes share the passes over all images; groups, trials, verdict and writing, which look
at a bounded number of them, are the first one's. A scan that was interrupted goes on where its
checkpoints end.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from audit import console
from audit.artefacts import Artefact
from audit.batches import BatchLimit
from audit.blame import has_memory, promising
from audit.checkpoints import Checkpoints
from audit.environment import choose_device, peak_memory_mib
from audit.errors import ImageError
from audit.evidence import LayerEvidence
from audit.group_artefacts import find_group_artefact
from audit.grouping import error_groups, pixel_loader, positions_looked_at
from audit.images import ImageFolder, load_pixels, open_image_folder
from audit.images.masks import open_masks
from audit.map_scores import judge_maps
from audit.moves import ChannelMove, MoveConfig, channel_moves
from audit.networks import Network, open_network
from audit.networks.layers import Layer, match_layers
from audit.observing import Findings, Predictions, Subject, loading_workers, observe, score_maps
from audit.parallel import ALONE, Team
from audit.plain_images import drift_without_artefacts
from audit.resuming import check_same_images, unfinished_scan
from audit.runs import Run, start_run
from audit.saliency import METHODS, Method, layer_maps, normalize_maps
from audit.scan_config import ScanConfig, ScanRequest
from audit.scan_record import (
    case_info,
    data_info,
    image_table,
    layer_rows,
    metrics_info,
    opening_info,
)
from audit.trials import CHANNEL_TRIAL, TrialRepair, planned_steps, trial_repairs
from audit.verdict import drift_origin, judge

__all__ = ["ScanConfig", "ScanRequest", "scan_model"]

GALLERY_IMAGES = 32

MOVES_SHARE = 0.25
"""Of the budget of the trials, what moves of channels may take."""

T = TypeVar("T")


class _Timings(dict[str, float]):
    """Seconds by step, those before an interruption included."""

    checkpoints: Checkpoints | None = None

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        started_s, earlier_s = time.perf_counter(), self.earlier_s
        yield
        taken_s = time.perf_counter() - started_s + self.earlier_s - earlier_s
        self[step] = round(taken_s, 3)

    @property
    def earlier_s(self) -> float:
        return self.checkpoints.earlier_s if self.checkpoints else 0.0


def scan_model(request: ScanRequest, config: ScanConfig, *, team: Team = ALONE) -> Run:
    """Scan a model and return the finished run; to other processes than the first, as it is.

    Args:
        team: Processes that share the passes over the images; the first one alone writes.

    Raises:
        NetworkError: The model cannot be opened or traced.
        ImageError: The images cannot be matched to the model's classes, or none is usable; or no
            mask belongs to any of them.
        LayerNotFoundError: A pattern of ``config.layers`` matches nothing.
        RunError: No scan can be resumed, or its images have changed.
        UsageError: A stated setting is not that of the scan to be resumed.
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
            device=team.device or device,
        )
    resumed: Run | None = None
    if request.resume:
        found = team.decided(lambda: unfinished_scan(network, config, request))
        resumed, config, request = found
    layers = _chosen_layers(network, config.layers)
    with timings.measure("open_images"), console.progress("reading images", None) as bar:
        folder = team.decided(
            lambda: open_image_folder(
                request.data,
                network.card.classes,
                seed=config.seed,
                limit=config.limit,
                progress=bar.advance,
            )
        )
    masks = open_masks(request.masks, folder) if request.masks else None
    if resumed is None:
        record = opening_info(request, config, network, folder, device)
        name = _model_name(request.model)
        run = team.decided(lambda: start_run(request.out, name, record))
        if team.leads:
            run.claim()
    else:
        check_same_images(resumed, folder)
        run = resumed
    checkpoints = timings.checkpoints = Checkpoints(run.path, team)
    subject = Subject(
        network=network,
        folder=folder,
        masks=masks,
        layers=layers,
        shown=_shown_layer(network),
        config=config,
        team=team,
        checkpoints=checkpoints,
    )
    try:
        if team.leads:
            run.begin()
        _fill_run(run, subject, request, timings)
    except KeyboardInterrupt:
        command = shlex.join(_resuming_command(request))
        if team.leads:
            run.fail(f"interrupted; `{command}` goes on")
        console.say(f"stopped; go on with `{command}`")
        raise
    except BaseException as error:
        if team.leads:
            run.fail(str(error) or type(error).__name__)
        raise
    else:
        if team.leads:
            timings["total"] = round(time.perf_counter() - started + timings.earlier_s, 3)
            run.finish(timings_s=dict(timings), peak_memory_mib=peak_memory_mib())
            checkpoints.remove()
    finally:
        run.release()
    return run


def _fill_run(run: Run, subject: Subject, request: ScanRequest, timings: _Timings) -> None:
    folder, labels = subject.folder, subject.labels
    fitting = _Fitting(subject)
    findings = Findings.empty(len(folder.records))
    predictions = findings.predictions
    with timings.measure("evidence"):
        evidence = fitting.run(lambda smaller: observe(smaller, findings))
    with timings.measure("cases"):
        fitting.run(lambda smaller: score_maps(smaller, findings))
    if not subject.team.leads:
        return
    subject.team.dismiss_others()
    if not predictions.loaded.any():
        raise ImageError(
            f"none of the {len(folder.records)} images in {request.data} could be decoded"
        )
    with timings.measure("groups"):
        fitting.run(lambda smaller: _write_groups(run, smaller, predictions))
        found = [
            (group, artefact)
            for group in run.groups["groups"]
            if (artefact := find_group_artefact(run, group)) is not None
        ]
        artefacts = [artefact for _, artefact in found]
        called_alike = sum(group["kind"] != "artefact" for group, _ in found)
        evidence, plain = fitting.run(
            lambda smaller: _without_artefacts(smaller, artefacts, evidence, predictions)
        )
    with timings.measure("trials"):
        trials, channel_trials, moves, held_out = fitting.run(
            lambda smaller: _try_repairs(smaller, evidence, predictions, labels)
        )
    wrong = int((predictions.predicted[held_out] != labels[held_out]).sum())
    verdict = judge(
        trials,
        evidence,
        channel_trials,
        moves,
        wrong=wrong,
        images=len(held_out),
        artefacts=called_alike,
        plain=plain,
    )
    with timings.measure("gallery"):
        fitting.run(lambda smaller: _write_gallery(run, smaller, predictions, labels))
    accuracy = None
    if subject.shown is not None:
        accuracy = judge_maps(
            findings.scores,
            with_masks=subject.masks is not None,
            threshold=subject.config.map_threshold,
        )
    run.write_images(image_table(subject, findings, accuracy))
    run.write_layers(layer_rows(subject.layers, evidence, trials, channel_trials, moves))
    run.write_verdict(verdict.as_dict())
    run.write_info(
        data=data_info(request, folder, findings),
        metrics=metrics_info(subject, findings),
        cases=case_info(subject, findings, accuracy),
    )


class _Fitting:
    """Runs the steps of a scan with batches that fit in memory; what one step learns, all keep.

    A step that fails begins anew, from its last checkpoint. Processes of a team wait for each
    other, so none of them may begin anew alone.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._limit = BatchLimit(subject.config.batch_size)

    def run(self, step: Callable[[Subject], T]) -> T:
        if not self._subject.team.alone:
            return step(self._subject)
        return self._limit.whole(lambda size: step(self._with_batches(size)))

    def _with_batches(self, size: int) -> Subject:
        config = self._subject.config
        if size == config.batch_size:
            return self._subject
        trial = replace(config.trial, batch_size=min(config.trial.batch_size, size))
        return replace(self._subject, config=replace(config, batch_size=size, trial=trial))


def _write_groups(run: Run, subject: Subject, predictions: Predictions) -> None:
    """Look at wrong images beside right ones; keep the groups that chance does not explain."""
    step = subject.checkpoints.step("groups", shared=False)
    if step.finished:
        return
    with console.progress("looking at wrong images", None) as bar:
        found = error_groups(
            subject.network,
            subject.folder,
            predictions.predicted,
            predictions.p_predicted,
            seed=subject.config.seed,
            batch_size=subject.config.batch_size,
            workers=loading_workers(subject.config.workers, subject.network.program.device),
            progress=bar.advance,
        )
    run.write_groups(found.document, found.maps, found.pictures, found.artefacts)
    step.finish({})


def _without_artefacts(
    subject: Subject,
    artefacts: Sequence[Artefact],
    evidence: list[LayerEvidence],
    predictions: Predictions,
) -> tuple[list[LayerEvidence], int | None]:
    """Return the evidence with the drift of images that carry no group's artefact, how many those
    are, and of first layers with what no change of such images explains."""
    if not has_memory(evidence):
        return evidence, None
    network, folder, config = subject.network, subject.folder, subject.config
    positions = positions_looked_at(folder, predictions.predicted)
    return drift_without_artefacts(
        evidence,
        network.program,
        network.normalize,
        pixel_loader(network, folder, positions),
        np.arange(len(positions)),
        artefacts,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _try_repairs(
    subject: Subject,
    evidence: Sequence[LayerEvidence],
    predictions: Predictions,
    labels: np.ndarray,
) -> tuple[list[TrialRepair], list[TrialRepair], list[ChannelMove], np.ndarray]:
    """Return trials of weights and of channels, moves of channels, and the positions of the images
    that judged them.

    Channels are tried where no batch norm remembers the training. Moves have a part of the budget,
    both kinds of trials share the rest; a layer whose moves stand out is tried first.
    """
    network, folder, layers = subject.network, subject.folder, subject.layers
    config = subject.config
    learning, judging = _trial_positions(folder, predictions, labels, config)
    if not len(learning) or not len(judging):
        return [], [], [], judging
    device = network.program.device
    pixels = load_pixels(
        folder, [*learning, *judging], network.card.preprocessing, batch_size=config.batch_size
    ).pixels
    images = network.normalize(pixels)
    cut = len(learning)
    targets = torch.from_numpy(labels).to(device)
    given = (images[:cut], targets[learning], images[cut:], targets[judging])
    channels = replace(CHANNEL_TRIAL, batch_size=config.trial.batch_size)
    kinds = (config.trial,) if has_memory(evidence) else (config.trial, channels)
    origin = drift_origin(evidence)
    favored = () if origin is None else (origin.layer.name,)
    moving = MoveConfig(batch_size=config.trial.batch_size, budget_s=MOVES_SHARE * config.budget_s)
    with console.progress("moves of channels", len(layers)) as bar:
        moves = channel_moves(
            network.program,
            *given,
            layers,
            moving,
            seed=config.seed,
            on_layer=bar.advance,
            checkpoint=subject.checkpoints.step("moves", shared=False),
        )
    order = promising(evidence, moves)
    found: list[list[TrialRepair]] = []
    with console.progress(
        "trial repairs", sum(planned_steps(len(layers), k) for k in kinds)
    ) as bar:
        for kind in kinds:
            trials = trial_repairs(
                network.program,
                *given,
                layers,
                replace(kind, budget_s=(1 - MOVES_SHARE) * config.budget_s / len(kinds)),
                seed=config.seed,
                promising=order,
                favored=favored,
                on_steps=bar.advance,
                checkpoint=subject.checkpoints.step(f"trials-{kind.kind}", shared=False),
            )
            found.append(trials)
    return found[0], found[1] if len(found) > 1 else [], moves, judging


def _trial_positions(
    folder: ImageFolder, predictions: Predictions, labels: np.ndarray, config: ScanConfig
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
    run: Run, subject: Subject, predictions: Predictions, labels: np.ndarray
) -> None:
    """Keep maps of the true class for some images: wrong ones by confidence, then right ones."""
    network, folder, shown, config = (
        subject.network,
        subject.folder,
        subject.shown,
        subject.config,
    )
    positions = _gallery_positions(predictions, labels, config.seed)
    if shown is None or not positions:
        return
    method: Method = next(m for m in METHODS if m == config.method)
    loaded = load_pixels(folder, positions, network.card.preprocessing)
    images = network.normalize(loaded.pixels)
    targets = torch.from_numpy(labels[positions]).to(images.device)
    names = [layer.name for layer in subject.layers if layer.has_maps]
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
    predictions: Predictions, labels: np.ndarray, seed: int, images: int = GALLERY_IMAGES
) -> list[int]:
    loaded = np.flatnonzero(predictions.loaded)
    right = predictions.predicted == labels
    wrong = loaded[~right[loaded]]
    wrong = wrong[np.argsort(-predictions.cross_entropy[wrong], kind="stable")]
    correct = np.random.default_rng(seed).permutation(loaded[right[loaded]])
    kept = wrong[: max(images * 3 // 4, images - len(correct))]
    return [int(i) for i in (*kept, *correct[: images - len(kept)])]


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


def _resuming_command(request: ScanRequest) -> list[str]:
    if request.command:
        return [*(word for word in request.command if word != "--resume"), "--resume"]
    where = [] if request.out == Path("runs") else ["--out", str(request.out)]
    return ["audit", "scan", request.model, "--data", str(request.data), *where, "--resume"]
