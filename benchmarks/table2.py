"""The paper's Tables 2 and 3: VGG-16's `block5_conv3` repaired over a grid of lr and lambda.

Learning rates .01, .1, .3 by lambdas .9, .7, .5, for Grad-CAM and for Guided Grad-CAM, with the
paper's scaling; beside them plain cross entropy at each rate, the control. Three seeds draw the
photographs to repair on and their order. The best point of each seed is the one that is best on the
validation split (accuracy, then cross entropy); it is held against the network before on the test
split, which has chosen nothing. Then Table 3: the share of test photographs in each case before
and after, by the scan's proxy and, where the objects are known, by their masks.

    cats-dogs     the network tells cats from dogs; no masks
    composites    cut-out objects on these photographs, five categories; the alpha channel is the
                  mask. No object is in two splits.

The network is the small VGG of `small_networks.py` (13 convolutions in VGG-16's blocks, 64 px);
for the composites it goes on from there with another last layer. `--full` takes torchvision's
vgg16 at `--size` pixels, trained on the same photographs first: for a machine with a GPU.
`--imagenet DIR --model torchvision:vgg16` is the paper's own setting, for those who have both.

Rows are kept as they come in WORK/rows.jsonl; a run goes on where the last one stopped.

    LAYERMEND_DATA=... python benchmarks/table2.py repair [--tasks cats-dogs composites]
    LAYERMEND_DATA=... python benchmarks/table2.py report
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cats_dogs
import numpy as np
import proxy
import small_networks
import torch
import torch.nn.functional as F
from PIL import Image
from results_file import configuration, print_table, write_results
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from torch import Tensor, nn

from audit.cases import CASES, assign_cases, case_table
from audit.images import ImageFolder, Split, load_pixels, open_image_folder
from audit.images.masks import ObjectMasks, open_masks
from audit.map_accuracy import ENERGY_THRESHOLD
from audit.map_scores import MapScores, judge_maps
from audit.networks import (
    ModelCard,
    Network,
    Preprocessing,
    architectures,
    open_network,
    write_card,
)
from audit.statistics import mcnemar
from repair.after import score_maps
from repair.cache import CrossingTensors, DiskSpace, cross_tensors
from repair.config import RepairConfig, Saliency
from repair.decision import Predictions
from repair.training import Trained, predict, train_layer

LAYER = "block5_conv3"
RATES = (0.01, 0.1, 0.3)
LAMBDAS = (0.9, 0.7, 0.5)
SEEDS = (0, 1, 2)
SALIENCIES: tuple[Saliency, ...] = ("gradcam", "guided-gradcam")
PHOTOS = 200
EPOCHS = 5
NETWORK_SEED = 0
SCORED = 400
"""Test photographs whose maps are scored for Table 3."""
COMPOSITES: dict[Split, int] = {"train": 1500, "val": 500, "test": 500}
COMPOSITE_EPOCHS = 10
SPLITS: tuple[Split, ...] = ("train", "val", "test")
MADE_BY = ("photos", "epochs", "layer")
"""Options that rows must share to stand in one table."""
BASE = RepairConfig(loss="trust", scale="classes", controls=())
PAPER = {  # VGG-16 on ImageNet, in %: accuracy, precision, recall before and at the best point
    "before": (66.0, 49.7, 50.8),
    "after": (70.0, 54.6, 55.7),
}
PAPER_CASE1 = ((18.0, 44.0), (16.0, 50.0))  # before and after, two columns of its Table 3


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, the images that it is repaired on and judged by, and their masks if any."""

    name: str
    network: Network
    folder: ImageFolder
    layer: str
    masks: ObjectMasks | None = None
    kept: dict[tuple[int, ...], MapScores] = field(default_factory=dict)

    def scores(self, network: Network, positions: Sequence[int]) -> MapScores:
        """Return the scores of the layer's maps in a network, by proxy and by masks if any."""
        layer = network.layer(self.layer).name  # it may be an alias
        return score_maps(network, layer, self.folder, positions, self.masks)

    def scores_before(self, positions: Sequence[int]) -> MapScores:
        """Return those of the network before; they are the same for every repair."""
        key = tuple(positions)
        if key not in self.kept:
            self.kept[key] = self.scores(self.network, positions)
        return self.kept[key]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["repair", "report"])
    parser.add_argument("--tasks", choices=list(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--photos", type=int, default=PHOTOS, help="to repair on")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--full", action="store_true", help="torchvision's vgg16")
    parser.add_argument("--size", type=int, default=224, help="of its photographs")
    parser.add_argument("--network-epochs", type=int, default=30, help="to train it for")
    parser.add_argument("--imagenet", type=Path, help="folder of ImageNet photographs")
    parser.add_argument("--model", default="torchvision:vgg16", help="with --imagenet")
    parser.add_argument("--layer", default=LAYER)
    parser.add_argument("--limit", type=int, help="images of --imagenet, of all splits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--work", type=Path, default=Path("local/table2"))
    options = parser.parse_args()
    options.name = "table2"
    if options.imagenet:
        options.name, options.tasks = "table2-imagenet", ["imagenet"]
    elif options.full:
        options.name = "table2-full"
    options.kept = options.work / f"{options.name}.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    if options.action == "report":
        _report(options, _read(options))
        return
    for name in options.tasks:
        task = imagenet_task(options) if options.imagenet else TASKS[name](options)
        for seed in options.seeds:
            _Bench(task, seed, options).run()


# ------------------------------------------------------------------------------ repairs


class _Bench:
    """The repairs of one task by one seed."""

    def __init__(self, task: Task, seed: int, options: argparse.Namespace) -> None:
        self.task, self.seed, self.options = task, seed, options
        self.split = task.network.program.split(task.layer)
        self.rows = [
            row for row in _read(options) if (row["task"], row["seed"]) == (task.name, seed)
        ]

    def run(self) -> None:
        """Do what is left, and keep it row by row."""
        if not self._has(kind="before"):
            self._keep({"kind": "before", **_metrics(self.before)})
        for config in self._points():
            key = {"kind": "point", **_point(config)}
            if not self._has(**key):
                self._keep({**key, **self._judge(config)})
        for saliency in SALIENCIES:
            if not self._has(kind="cases", saliency=saliency):
                for row in self._cases(self._best(saliency), saliency):
                    self._keep(row)

    def _points(self) -> Iterator[RepairConfig]:
        own = replace(BASE, epochs=self.options.epochs, seed=self.seed)
        for rate in RATES:
            yield replace(own, loss="ce", learning_rate=rate)
        for saliency in SALIENCIES:
            for rate in RATES:
                for balance in LAMBDAS:
                    yield replace(own, saliency=saliency, learning_rate=rate, balance=balance)

    @cached_property
    def crossing(self) -> dict[Split, CrossingTensors]:
        """What crosses the cut, by split; what an earlier start left on the disk is taken over."""
        generator = np.random.default_rng(self.seed)
        chosen = {name: np.array(self.task.folder.positions(name)) for name in SPLITS}
        chosen["train"] = generator.permutation(chosen["train"])[: self.options.photos]
        root = self.options.work / "crossing" / f"{self.options.name}-{self.task.name}"
        return {
            name: cross_tensors(
                self.task.network,
                self.split,
                self.task.folder,
                chosen[name].tolist(),
                budget_bytes=0,
                disk=DiskSpace(
                    folder=root / (f"train-{self.seed}" if name == "train" else name),
                    budget_bytes=2**36,
                ),
                beside="gates" if name == "train" else None,
            )
            for name in SPLITS
        }

    @cached_property
    def before(self) -> Predictions:
        return predict(self.split, self.crossing["test"])[0]

    def _train(self, config: RepairConfig) -> Trained:
        crossing = self.crossing
        return train_layer(self.split, crossing["train"], crossing["val"], config, loss=config.loss)

    def _judge(self, config: RepairConfig) -> dict[str, Any]:
        """Return what one point of the grid comes to."""
        trained = self._train(config)
        said, _ = predict(self.split, self.crossing["test"], trained.parameters)
        test = mcnemar(self.before.right, said.right)
        own = self.task.network.program.state
        after = self.task.network.program.with_state(trained.parameters).state
        others = [name for name in own if name not in self.split.parameter_names]
        best = trained.history[trained.best_epoch]
        return {
            "val_accuracy": round(best["val_accuracy"], 4),
            "val_ce": round(best["val_ce"], 5),
            **_metrics(said),
            "fixed": test.fixed,
            "broken": test.broken,
            "p_value": round(test.p_value, 4),
            "best_epoch": trained.best_epoch,
            "stopped": trained.stopped,
            "tensors": len(others),
            "identical": sum(torch.equal(own[name], after[name]) for name in others),
            "seconds": round(trained.seconds, 1),
        }

    def _best(self, saliency: Saliency) -> RepairConfig:
        """Return the point that is best on the validation split."""
        rows = [r for r in self.rows if r["kind"] == "point" and r["saliency"] == saliency]
        best = _best_row(rows)
        for config in self._points():
            if _point(config) == {name: best[name] for name in _point(config)}:
                return config
        raise SystemExit(f"no point of the grid is {best}")

    def _cases(self, config: RepairConfig, saliency: Saliency) -> Iterator[dict[str, Any]]:
        """Yield the cases of the test images before and after the best repair, by each source."""
        crossing, task = self.crossing["test"], self.task
        parameters = self._train(config).parameters
        for when, values in (("before", None), ("after", parameters)):
            said, found = predict(self.split, crossing, values)
            drawn = np.sort(np.random.default_rng(0).permutation(len(found))[:SCORED])
            if values is None:
                scores = task.scores_before(found[drawn].tolist())
            else:
                scores = task.scores(task.network.with_state(values), found[drawn].tolist())
            for source in ("proxy", *(["masks"] if task.masks else [])):
                verdict = judge_maps(
                    scores, with_masks=source == "masks", threshold=ENERGY_THRESHOLD
                )
                accurate = [verdict.accurate[i] for i in found[drawn]]
                cases = assign_cases(said.right[drawn], accurate)
                whole = case_table(cases, ["all"] * len(cases))[0]
                yield {
                    "kind": "cases",
                    "saliency": saliency,
                    "source": source,
                    "when": when,
                    "lr": config.learning_rate,
                    "lambda": config.balance,
                    "images": whole["n"],
                    "without": whole["without"],
                    "energy_inside": _mean(scores.energy),
                    "insertion": _mean(scores.faithfulness),
                    "note": verdict.note,
                    **{
                        f"case{case}{suffix}": round(whole[f"case{case}"][end], 4)
                        for case in CASES
                        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high"))
                    },
                }

    def _has(self, **wanted: Any) -> bool:
        return any(all(row.get(k) == v for k, v in wanted.items()) for row in self.rows)

    def _keep(self, row: dict[str, Any]) -> None:
        made_by = {name: getattr(self.options, name) for name in MADE_BY}
        row = {"task": self.task.name, "seed": self.seed, **made_by, **row}
        self.rows.append(row)
        with self.options.kept.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(row, flush=True)


def _point(config: RepairConfig) -> dict[str, Any]:
    plain = config.loss == "ce"
    return {
        "saliency": None if plain else config.saliency,
        "lr": config.learning_rate,
        "lambda": None if plain else config.balance,
    }


def _best_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: (row["val_accuracy"], -row["val_ce"]))


def _metrics(said: Predictions) -> dict[str, float]:
    """Return accuracy, macro precision and recall with intervals, and cross entropy."""
    classes = [
        str(number) for number in range(int(max(said.labels.max(), said.predicted.max())) + 1)
    ]
    metrics = said.metrics(classes, seed=0)
    return {
        **{
            f"{name}{suffix}": round(float(metrics[name][end]), 4)
            for name in ("accuracy", "precision", "recall")
            for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high"))
        },
        "cross_entropy": round(float(metrics["cross_entropy"]["value"]), 4),
    }


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(known.mean()), 4) if len(known) else None


# ------------------------------------------------------------------------------ tasks


def cats_dogs_task(options: argparse.Namespace) -> Task:
    """Cats and dogs, on which the network was trained."""
    folder = open_image_folder(cats_dogs.data_root() / "cats-dogs", cats_dogs.CLASSES)
    module = _cats_dogs_network(options, folder)
    network = _opened(module, "cats-dogs", cats_dogs.CLASSES, options)
    return Task(name="cats-dogs", network=network, folder=folder, layer=options.layer)


def composites_task(options: argparse.Namespace) -> Task:
    """Cut-out objects on photographs, named by a network that goes on from cats and dogs."""
    root = options.work / "composites"
    if not (root / "done").exists():
        _write_composites(root)
        (root / "done").touch()
    folder = open_image_folder(root / "photos", proxy.CATEGORIES)
    path = _network_path(options, "composites")
    base = _cats_dogs_network(
        options, open_image_folder(cats_dogs.data_root() / "cats-dogs", cats_dogs.CLASSES)
    )
    module = _with_outputs(base, len(proxy.CATEGORIES))
    if path.exists():
        module.load_state_dict(load_file(path))
    else:
        _train_network(module, folder, options, epochs=COMPOSITE_EPOCHS)
        _save(module, path)
    network = _opened(module, "composites", proxy.CATEGORIES, options)
    masks = open_masks(root / "masks", folder)
    return Task(name="composites", network=network, folder=folder, layer=options.layer, masks=masks)


def imagenet_task(options: argparse.Namespace) -> Task:
    """ImageNet and a network that was trained on it; without val and test folders, 60/20/20."""
    network = open_network(options.model, device=options.device)
    folder = open_image_folder(options.imagenet, network.card.classes, limit=options.limit)
    return Task(name="imagenet", network=network, folder=folder, layer=options.layer)


TASKS = {"cats-dogs": cats_dogs_task, "composites": composites_task}


def _write_composites(root: Path) -> None:
    """Write pictures and masks; the objects to judge on are halved between val and test."""
    to_train, to_judge = proxy.load_stamps(NETWORK_SEED)
    stamps: dict[Split, Any] = {
        "train": to_train,
        "val": [found[::2] for found in to_judge],
        "test": [found[1::2] for found in to_judge],
    }
    for seed, (split, count) in enumerate(COMPOSITES.items()):
        photos = sorted(photo.path for photo in cats_dogs.photos(split, 10**6, seed=0))
        found = proxy.composites(stamps[split], photos, count, "honest", judged=False, seed=seed)
        pixels = ((found.images * cats_dogs.STD + cats_dogs.MEAN) * 255).round().byte()
        for i, label in enumerate(found.labels.tolist()):
            place = Path(split) / proxy.CATEGORIES[label] / f"{i:04d}.png"
            for part, picture in (
                ("photos", pixels[i].permute(1, 2, 0).numpy()),
                ("masks", (found.masks[i] * 255).byte().numpy()),
            ):
                (root / part / place).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / part / place)


# ------------------------------------------------------------------------------ networks


def _cats_dogs_network(options: argparse.Namespace, folder: ImageFolder) -> nn.Module:
    if not options.full:
        return small_networks.trained("vgg", options.work, seed=NETWORK_SEED)
    module = architectures.build("torchvision:vgg16", {"num_classes": len(cats_dogs.CLASSES)})
    path = _network_path(options, "cats-dogs")
    if path.exists():
        module.load_state_dict(load_file(path))
    else:
        _train_network(module, folder, options, epochs=options.network_epochs)
        _save(module, path)
    return module.eval()


def _with_outputs(module: nn.Module, classes: int) -> nn.Module:
    """Return a copy of the network with a fresh last layer."""
    changed = deepcopy(module)
    last = [name for name, part in changed.named_modules() if isinstance(part, nn.Linear)][-1]
    parent, _, own = last.rpartition(".")
    torch.manual_seed(NETWORK_SEED)
    width = changed.get_submodule(last).in_features
    setattr(changed.get_submodule(parent), own, nn.Linear(int(width), classes))  # type: ignore[arg-type]
    return changed


def _train_network(
    module: nn.Module, folder: ImageFolder, options: argparse.Namespace, *, epochs: int
) -> None:
    """Train all of a network: AdamW under a one-cycle schedule, flips."""
    started = time.perf_counter()
    indices = folder.positions("train")
    settings = _preprocessing(options)
    pixels = load_pixels(folder, indices, settings).pixels
    labels = torch.tensor([folder.records[i].label for i in indices], device=options.device)
    module.to(options.device).train()
    batch = 64
    steps = epochs * -(-len(indices) // batch)
    rate = 1e-4 if options.full else 1e-3
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2 * rate, total_steps=steps)
    draw = torch.Generator().manual_seed(NETWORK_SEED)
    mean = torch.tensor(settings.mean, device=options.device).view(3, 1, 1)
    std = torch.tensor(settings.std, device=options.device).view(3, 1, 1)
    for _ in range(epochs):
        for rows in torch.randperm(len(indices), generator=draw).split(batch):
            images = (pixels[rows].to(options.device).float() / 255 - mean) / std
            if torch.rand((), generator=draw) < 0.5:
                images = images.flip(3)
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    module.eval()
    print(f"trained a network in {time.perf_counter() - started:.0f} s", flush=True)


def _opened(
    module: nn.Module, name: str, classes: Sequence[str], options: argparse.Namespace
) -> Network:
    """Return the network as layermend opens it, from a checkpoint with its card."""
    path = options.work / "opened" / f"{options.name}-{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(module, path)
    card = ModelCard(
        arch="torchvision:vgg16" if options.full else "layermend:vgg",
        arch_args={"num_classes": len(classes)}
        if options.full
        else {"classes": len(classes), "widths": [8, 16, 32, 64, 96]},
        classes=tuple(classes),
        preprocessing=_preprocessing(options),
        provenance={"trained_by": "benchmarks/table2.py"},
    )
    write_card(card, path.with_suffix(".toml"))
    return open_network(str(path), device=options.device)


def _preprocessing(options: argparse.Namespace) -> Preprocessing:
    side = options.size if options.full else small_networks.SIZE
    return Preprocessing(
        input_size=(side, side),
        mean=(cats_dogs.MEAN,) * 3,
        std=(cats_dogs.STD,) * 3,
        interpolation="bilinear",
        crop=1.0,
    )


def _network_path(options: argparse.Namespace, name: str) -> Path:
    return Path(options.work) / "networks" / f"{options.name}-{name}.safetensors"


def _save(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = module.state_dict()
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, path)


# ------------------------------------------------------------------------------ tables


def _report(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise SystemExit("there is no row yet; run the repair action first")
    summary: dict[str, float] = {}
    tables: list[dict[str, Any]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        table2 = _table2(own)
        print_table(f"{task}, Table 2: the best point by validation", [_shown(r) for r in table2])
        grid = _grid(own)
        print_table(f"{task}: accuracy on the test split by lr and lambda", grid)
        table3 = _table3(own)
        print_table(f"{task}, Table 3: test photographs in each case", [_shown(r) for r in table3])
        for kind, table in (("table2", table2), ("grid", grid), ("table3", table3)):
            tables += [{"table": kind, "task": task, **row} for row in table]
        prefix = task.replace("-", "_")
        for row in table2:
            summary[f"{prefix}_{row['row'].replace('-', '_')}"] = row["accuracy"]
        for row in table3:
            name = f"{prefix}_{row['saliency'].replace('-', '_')}_case1_{row['source']}"
            if row["case1"] is not None:
                summary[f"{name}_{row['when']}"] = row["case1"]
    points = [row for row in rows if row["kind"] == "point"]
    summary["repairs"] = len(points)
    summary["repairs_with_all_other_tensors_identical"] = sum(
        row["tensors"] == row["identical"] for row in points
    )
    config = configuration(
        options.device,
        seeds=options.seeds,
        photos=options.photos,
        epochs=options.epochs,
        layer=options.layer,
        network="torchvision:vgg16" if options.full or options.imagenet else "layermend:vgg",
        rates=RATES,
        lambdas=LAMBDAS,
        settings=BASE.as_dict(),
        paper={"table2": PAPER, "table3_case1": PAPER_CASE1},
    )
    print(write_results(options.name, summary=summary, config=config, rows=[*tables, *rows]))


def _table2(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Before, the best point of each method, and plain cross entropy; means over the seeds."""
    before = [row for row in rows if row["kind"] == "before"]
    table = [_line("before", before, PAPER["before"])]
    for label, saliency in (("ce", None), ("gradcam", "gradcam"), ("guided", "guided-gradcam")):
        best = []
        for seed in sorted({row["seed"] for row in rows}):
            points = [
                row
                for row in rows
                if row["kind"] == "point" and (row["seed"], row["saliency"]) == (seed, saliency)
            ]
            if points:
                best.append(_best_row(points))
        if best:
            table.append(_line(label, best, PAPER["after"] if saliency else (None,) * 3))
    return table


def _line(
    label: str, rows: Sequence[Mapping[str, Any]], paper: Sequence[float | None]
) -> dict[str, Any]:
    fixed, broken = (sum(row.get(name, 0) for row in rows) for name in ("fixed", "broken"))
    line: dict[str, Any] = {"row": label, "seeds": len(rows)}
    for name, figure in zip(("accuracy", "precision", "recall"), paper, strict=True):
        for suffix in ("", "_low", "_high"):
            line[name + suffix] = round(float(np.mean([row[name + suffix] for row in rows])), 4)
        line[f"paper_{name}"] = figure
    line["cross_entropy"] = round(float(np.mean([row["cross_entropy"] for row in rows])), 4)
    line["fixed"], line["broken"] = fixed, broken
    line["p_value"] = (
        round(float(binomtest(fixed, fixed + broken).pvalue), 4) if fixed + broken else 1.0
    )
    line["points"] = ", ".join(
        f"{row['lr']:g}/{row['lambda'] or 0:g}" for row in rows if "lr" in row
    )
    line["untouched"] = sum(row.get("best_epoch") == 0 for row in rows)
    line["diverged"] = sum(bool(row.get("stopped")) for row in rows)
    return line


def _grid(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    table = []
    points = [row for row in rows if row["kind"] == "point"]
    keys = dict.fromkeys((row["saliency"], row["lambda"]) for row in points)
    for saliency, balance in keys:
        line: dict[str, Any] = {"loss": saliency or "ce", "lambda": balance}
        for rate in RATES:
            own = [
                row
                for row in points
                if (row["saliency"], row["lambda"], row["lr"]) == (saliency, balance, rate)
            ]
            line[f"lr {rate:g}"] = _over(own, "accuracy")
            line[f"stopped {rate:g}"] = sum(bool(row["stopped"]) for row in own)
        table.append(line)
    return table


def _table3(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    table = []
    cases = [row for row in rows if row["kind"] == "cases"]
    for saliency, source, when in dict.fromkeys(
        (row["saliency"], row["source"], row["when"]) for row in cases
    ):
        own = [
            row
            for row in cases
            if (row["saliency"], row["source"], row["when"]) == (saliency, source, when)
        ]
        known = [row for row in own if row["images"]]
        line: dict[str, Any] = {"saliency": saliency, "source": source, "when": when}
        line["seeds"] = len(own)
        for case in CASES:
            for suffix in ("", "_low", "_high"):
                line[f"case{case}{suffix}"] = _over(known, f"case{case}{suffix}")
        line["images"] = sum(row["images"] for row in own)
        line["without"] = sum(row["without"] for row in own)
        line["energy_inside"] = _over(own, "energy_inside")
        line["insertion"] = _over(own, "insertion")
        paper = PAPER_CASE1[SALIENCIES.index(saliency)]
        line["paper_case1"] = paper[0] if when == "before" else paper[1]
        table.append(line)
    return table


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with each interval beside its value, in per cent."""
    shown: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith(("_low", "_high")):
            continue
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        if value is not None and low is not None:
            value = f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        shown[name] = value
    return shown


def _over(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return round(float(np.mean(values)), 4) if values else None


def _read(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows that are kept of the same settings."""
    kept: Path = options.kept
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    return [row for row in rows if all(row.get(name) == getattr(options, name) for name in MADE_BY)]


if __name__ == "__main__":
    main()
