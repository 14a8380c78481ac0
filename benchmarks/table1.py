r"""The paper's Table 1 on cats and dogs: a new head under frozen ImageNet features, with penalty.

Seven rows: plain cross entropy, and the penalty with both terms, without R1, without R2, on
Grad-CAM and on Guided Grad-CAM maps; 50 epochs, batches of 32, learning rate 0.01, lambda 0.9, the
paper's scaling by the number of classes. Two rows more: the penalty as layermend bounds it. Every
row starts from the same weights as the baseline of its seed and sees the same batches, so the test
against the baseline is paired. `--photos` trains on fewer photographs, where differences are
larger than the noise.

Guided Grad-CAM needs the frozen features' backward pass in every step, so on a CPU it has a table
of its own, all rows of which see fewer and smaller photographs for fewer epochs, and are judged on
fewer (`--guided --size 64 --epochs 10 --val 200 --test 400`). Its SSIM is
that of the Grad-CAM maps, as in all rows; `ssim_guided` compares the Guided Grad-CAM maps of some
test photographs.

Rows are kept as they come in WORK/rows.jsonl; a run goes on where the last one stopped. The report
joins them with the rows of the results file that is there. Intervals of accuracy, precision and
recall are over the test photographs, the mean of the seeds'; those of the difference over seeds.

    LAYERMEND_DATA=... python benchmarks/table1.py train --photos 50 200 1000 4000
    LAYERMEND_DATA=... python benchmarks/table1.py train --guided --size 64 --photos 50 \
        --epochs 10 --val 200 --test 400
    LAYERMEND_DATA=... python benchmarks/table1.py report

`--backbone` takes any other network: a checkpoint, or a name like torchvision:mobilenet_v2 whose
weights are at hand. It is used at its own input size, and has a results file of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cats_dogs
import efficientnet_lite0
import numpy as np
import torch
from results_file import RESULTS, configuration, print_table, write_results
from scipy.stats import binomtest
from torch import nn

from audit.files import read_json
from audit.images import ImageFolder, Split, open_image_folder
from audit.networks import Network, open_network
from audit.networks import Split as NetworkSplit
from audit.saliency import normalize_maps, trainable_guided_maps
from audit.statistics import bootstrap_mean, classification_metrics, mcnemar
from repair.cache import CrossingBatch, CrossingTensors, DiskSpace, cross_tensors
from repair.config import RepairConfig
from repair.maps import map_similarity, true_class_maps
from repair.new_head import CLASSIFIER, CONVOLUTION, head_split, with_new_head
from repair.sources import positions
from repair.transfer import Transferred, transfer

SEEDS = (0, 1, 2, 3, 4)
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SIDE = 112
WHOLE = 4000
TEST = 1000
LEARNED = {f"{layer}.{kind}" for layer in (CONVOLUTION, CLASSIFIER) for kind in ("weight", "bias")}
MAPPED = 100
"""Test photographs whose Guided Grad-CAM maps are compared."""
BACKBONE = "EfficientNet-Lite0"
PENALTY = RepairConfig(
    loss="trust", scale="classes", balance=0.9, learning_rate=0.01, epochs=50, controls=()
)
GRADCAM_ROWS = {
    "baseline": replace(PENALTY, loss="ce"),
    "gradcam": PENALTY,
    "gradcam, R1 = 0": replace(PENALTY, r1=False),
    "gradcam, R2 = 0": replace(PENALTY, r2=False),
    "gradcam, bounded": replace(PENALTY, scale="bounded"),
}
GUIDED_ROWS = {
    name.replace("gradcam", "guided"): replace(config, saliency="guided-gradcam")
    for name, config in GRADCAM_ROWS.items()
    if config.loss != "ce"
}
ROWS = {**GRADCAM_ROWS, **GUIDED_ROWS}
PAPER = {  # MobileNetV2, accuracy in %, and SSIM to the baseline's maps
    "baseline": (97.6, None),
    "gradcam": (98.4, 0.78),
    "gradcam, R1 = 0": (98.3, 0.76),
    "gradcam, R2 = 0": (98.5, 0.85),
    "guided": (98.7, 0.64),
    "guided, R1 = 0": (98.6, 0.5),
    "guided, R2 = 0": (98.4, 0.94),
}
Key = tuple[int, int, int, str]  # side, photographs, seed, row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["train", "report"])
    parser.add_argument("--photos", type=int, nargs="+", default=[WHOLE], help="to train on")
    parser.add_argument("--size", type=int, default=SIDE, help="side of the photographs in pixels")
    parser.add_argument("--val", type=int, default=TEST, help="photographs that choose the epoch")
    parser.add_argument("--test", type=int, default=TEST, help="photographs to judge on")
    parser.add_argument("--guided", action="store_true", help="rows of Guided Grad-CAM too")
    parser.add_argument("--epochs", type=int, default=PENALTY.epochs)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--work", type=Path, default=Path("local/table1"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    name = "table1"
    if options.backbone != BACKBONE:
        name += "-" + re.sub(r"[^A-Za-z0-9]+", "-", Path(options.backbone).stem).strip("-")
    kept = options.work / ("rows.jsonl" if name == "table1" else f"{name}.jsonl")
    rows = _joined(_committed(name), _read(kept))
    if options.action == "train":
        _check_alike(options, rows.values())
        _train(options, kept, set(rows))
    else:
        _report(name, options, list(rows.values()))


def _check_alike(options: argparse.Namespace, rows: Iterable[Mapping[str, Any]]) -> None:
    """End the script where rows of the same table were made by other settings."""
    for row in rows:
        if row["size"] == options.size and row["photos"] in options.photos:
            was = (row["epochs"], row["validated"], row["tested"])
            if was != (options.epochs, options.val, options.test):
                raise SystemExit(
                    f"error: there are rows of {row['photos']} photographs of {row['size']} px by "
                    f"--epochs {was[0]} --val {was[1]} --test {was[2]}; rows of one table have to "
                    "be alike, so give the same, or another --size or --photos"
                )


def _train(options: argparse.Namespace, kept: Path, done: set[Key]) -> None:
    network = _backbone(options)
    side = network.card.preprocessing.input_size[0]
    wanted = ROWS if options.guided else GRADCAM_ROWS
    folder = open_image_folder(cats_dogs.data_root() / "cats-dogs", cats_dogs.CLASSES)
    started = time.perf_counter()
    first = with_new_head(network, cats_dogs.CLASSES)
    draws = _draws(folder, options)
    drawn = sorted({row for rows in draws.values() for row in rows.tolist()})
    everywhere = {
        "train": [positions(folder, "train")[row] for row in drawn],
        "val": _equally(folder, "val", options.val, seed=0),
        "test": _equally(folder, "test", options.test, seed=0),
    }
    crossing = {
        name: cross_tensors(
            first,
            head_split(first)[0],
            folder,
            everywhere[name],
            budget_bytes=0,
            # What is there already is taken over, so that a run goes on at once.
            disk=DiskSpace(folder=options.work / f"features-{side}" / name, budget_bytes=2**36),
            beside="gates" if options.guided and name != "val" else None,
        )
        for name in SPLITS
    }
    seconds = time.perf_counter() - started
    print(f"features of {sum(map(len, crossing.values()))} photographs in {seconds:.0f} s")
    for photos in options.photos:
        for seed in options.seeds:
            missing = {
                name: replace(config, epochs=options.epochs)
                for name, config in wanted.items()
                if (side, photos, seed, name) not in done
            }
            if not missing:
                continue
            start = first.with_state(_first_weights(first, seed))
            rows = torch.tensor([drawn.index(row) for row in draws[photos, seed].tolist()])
            own = {**crossing, "train": _Some(crossing["train"], rows)}
            for row in _rows(start, own, missing, seed, side):
                print(row, flush=True)
                with kept.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


def _backbone(options: argparse.Namespace) -> Network:
    if options.backbone != BACKBONE:
        return open_network(options.backbone, device=options.device)
    size = (options.size, options.size)
    checkpoint = efficientnet_lite0.write_checkpoint(
        options.work, replace(efficientnet_lite0.PREPROCESSING, input_size=size, crop=1.0)
    )
    return open_network(str(checkpoint), device=options.device)


def _rows(
    start: Network,
    crossing: Mapping[str, CrossingTensors],
    wanted: Mapping[str, RepairConfig],
    seed: int,
    side: int,
) -> Iterator[dict[str, Any]]:
    """Yield the wanted rows of one seed and one number of photographs."""
    split, _ = head_split(start)
    plain: _Judged | None = None
    epochs = next(iter(wanted.values())).epochs
    baseline = replace(ROWS["baseline"], epochs=epochs)
    for name, config in {"baseline": baseline, **wanted}.items():
        started = time.perf_counter()
        found = transfer(start, crossing, replace(config, seed=seed))
        seconds = time.perf_counter() - started
        judged = _Judged.of(split, crossing["test"], found)
        plain = plain or judged
        if name not in wanted:  # the baseline of a seed that was begun earlier
            continue
        test = mcnemar(plain.right, judged.right)
        changed = _changed(start, found.network)
        charged = [
            round(float(epoch["saliency_mean"]), 5)
            for epoch in found.trained.history
            if "saliency_mean" in epoch
        ]
        guided = None
        if plain.guided is not None and judged.guided is not None:
            guided = round(float(map_similarity(plain.guided, judged.guided).mean()), 4)
        yield {
            "row": name,
            "size": side,
            "epochs": config.epochs,
            "photos": len(crossing["train"]),
            "validated": len(crossing["val"]),
            "tested": len(crossing["test"]),
            "seed": seed,
            **_intervals(found.test.metrics(cats_dogs.CLASSES, seed=0)),
            "cross_entropy": round(float(found.test.cross_entropies.mean()), 4),
            "mean_saliency": round(float(judged.maps.mean()), 4),
            "charged_first_epoch": charged[0] if charged else None,
            "charged_last_epoch": charged[-1] if charged else None,
            "ssim": round(float(map_similarity(plain.maps, judged.maps).mean()), 4),
            "ssim_guided": guided,
            "fixed": test.fixed,
            "broken": test.broken,
            "p_value": round(test.p_value, 4),
            "best_epoch": found.trained.best_epoch,
            "stopped": found.trained.stopped,
            "tensors": len(start.program.state) - len(LEARNED),
            "identical": len(start.program.state) - len(changed | LEARNED),
            "seconds": round(seconds, 1),
        }


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What a trained head says about the test photographs, and where it looks."""

    right: np.ndarray
    maps: torch.Tensor
    guided: torch.Tensor | None

    @classmethod
    def of(cls, split: NetworkSplit, test: CrossingTensors, found: Transferred) -> _Judged:
        parameters = found.trained.parameters
        return cls(
            right=found.test.right,
            maps=true_class_maps(split, test, parameters),
            guided=_guided_maps(split, test, parameters),
        )


def _guided_maps(
    split: NetworkSplit, test: CrossingTensors, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """Return Guided Grad-CAM of the true class of some test photographs, where gates are kept."""
    found = []
    spread = torch.linspace(0, len(test) - 1, MAPPED).long()
    for rows in spread.split(50):
        batch = test.batch(rows)
        if batch.gates is None:
            return None
        maps, _ = trainable_guided_maps(
            split, None, batch.crossing, parameters, batch.labels, gates=batch.gates
        )
        found.append(normalize_maps(maps.detach()).float().cpu())
    return torch.cat(found)


def _intervals(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return accuracy, macro precision and recall, each with its interval over photographs."""
    return {
        f"{name}{suffix}": round(float(metrics[name][end]), 4)
        for name in ("accuracy", "precision", "recall")
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def _changed(one: Network, other: Network) -> set[str]:
    before, after = one.program.state, other.program.state
    return {name for name in before if not torch.equal(before[name], after[name])}


def _draws(folder: ImageFolder, options: argparse.Namespace) -> dict[tuple[int, int], torch.Tensor]:
    """Return the rows of the train split to learn from, as many of each class, drawn by seed."""
    labels = torch.tensor([folder.records[i].label for i in positions(folder, "train")])
    draws = {}
    for photos in options.photos:
        for seed in options.seeds:
            order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
            rows = [order[labels[order] == label][: photos // 2] for label in labels.unique()]
            draws[photos, seed] = torch.cat(rows)
    return draws


def _equally(folder: ImageFolder, split: Split, count: int, *, seed: int) -> list[int]:
    """Return the positions of so many images of a split, as many of each class."""
    everything = np.array(positions(folder, split))
    labels = np.array([folder.records[i].label for i in everything])
    order = np.random.default_rng(seed).permutation(len(everything))
    rows = [order[labels[order] == label][: count // 2] for label in np.unique(labels)]
    return sorted(everything[np.concatenate(rows)].tolist())


def _first_weights(network: Network, seed: int) -> dict[str, torch.Tensor]:
    """Return the head that `with_new_head` draws by this seed, without opening the network anew."""
    state = network.program.state
    filters, channels = state[f"{CONVOLUTION}.weight"].shape[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = {
            CONVOLUTION: nn.Conv2d(channels, filters, kernel_size=1),
            CLASSIFIER: nn.Linear(filters, len(cats_dogs.CLASSES)),
        }
    return {
        f"{layer}.{name}": value.detach()
        for layer, module in head.items()
        for name, value in module.named_parameters()
    }


class _Some:
    """Some of the photographs."""

    def __init__(self, whole: CrossingTensors, rows: torch.Tensor) -> None:
        self._rows = rows
        self._whole = whole
        self.kind, self.tensors = whole.kind, whole.tensors
        self.bytes, self.seconds = whole.bytes, whole.seconds

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: torch.Tensor) -> CrossingBatch:
        return self._whole.batch(self._rows[rows])


# --------------------------------------------------------------------------------- tables


def _report(name: str, options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise SystemExit("there is no row yet; run the train action first")
    rows = [row if "precision_low" in row else _with_intervals(row) for row in rows]
    tables = []
    for side, photos in sorted({(row["size"], row["photos"]) for row in rows}):
        of_table = [row for row in rows if (row["size"], row["photos"]) == (side, photos)]
        of_table = [row for row in of_table if row["seed"] in options.seeds]
        one = []
        for label in ROWS:
            own = [row for row in of_table if row["row"] == label]
            if own:
                one.append({"size": side, "photos": photos, "row": label, **_means(own, of_table)})
                one[-1]["paper_accuracy"], one[-1]["paper_ssim"] = PAPER.get(label, (None, None))
        print_table(
            f"{photos} photographs of {side} px; means over the seeds",
            [_shown(row) for row in one],
        )
        tables += one
    summary = {_flat(table): table["accuracy"] for table in tables}
    largest = [row for row in rows if (row["size"], row["photos"]) == (SIDE, WHOLE)]
    if largest:
        summary["minutes_largest"] = round(sum(row["seconds"] for row in largest) / 60, 1)
    config = configuration(
        "cpu",
        "timm",
        seeds=options.seeds,
        sizes=sorted({row["size"] for row in rows}),
        backbone=efficientnet_lite0.ARCH if options.backbone == BACKBONE else options.backbone,
        settings={label: value.as_dict() for label, value in ROWS.items()},
        photographs_of_guided_maps=MAPPED,
    )
    print(write_results(name, summary=summary, config=config, rows=[*tables, *rows]))


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is printed of a row: figures in per cent, each with its interval."""

    def interval(name: str) -> str:
        value, low, high = (100 * row[name + end] for end in ("", "_low", "_high"))
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"

    names = ("accuracy", "precision", "recall", "difference")
    others = ("fixed", "broken", "p_value", "ssim", "ssim_guided", "mean_saliency", "diverged")
    paper = ("paper_accuracy", "paper_ssim")
    return {
        "row": row["row"],
        **{name: interval(name) for name in names},
        **{name: row[name] for name in (*others, *paper)},
        "seconds": row["seconds"],
    }


def _means(own: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; the test against the baseline counts the images of all seeds together."""
    fixed, broken = sum(row["fixed"] for row in own), sum(row["broken"] for row in own)
    accuracies = [row["accuracy"] for row in own]
    paired = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    by_seed = {row["seed"]: row["accuracy"] for row in rows if row["row"] == "baseline"}
    differences = np.array([row["accuracy"] - by_seed[row["seed"]] for row in own])
    spread = bootstrap_mean(differences, seed=0)

    def mean(name: str, digits: int = 4) -> float | None:
        values = [row[name] for row in own if row.get(name) is not None]
        return round(float(np.mean(values)), digits) if values else None

    return {
        "seeds": len(own),
        "epochs": own[0]["epochs"],
        "tested": own[0]["tested"],
        "accuracy": mean("accuracy"),
        "accuracy_low": mean("accuracy_low"),
        "accuracy_high": mean("accuracy_high"),
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "precision": mean("precision"),
        "precision_low": mean("precision_low"),
        "precision_high": mean("precision_high"),
        "recall": mean("recall"),
        "recall_low": mean("recall_low"),
        "recall_high": mean("recall_high"),
        "cross_entropy": mean("cross_entropy"),
        "difference": round(spread.value, 4),
        "difference_low": round(spread.low, 4),
        "difference_high": round(spread.high, 4),
        "fixed": fixed,
        "broken": broken,
        "p_value": round(float(paired), 4),
        "ssim": mean("ssim", 3),
        "ssim_guided": mean("ssim_guided", 3),
        "mean_saliency": mean("mean_saliency", 3),
        "charged_first_epoch": mean("charged_first_epoch", 5),
        "charged_last_epoch": mean("charged_last_epoch", 5),
        "diverged": sum(row["stopped"] is not None for row in own),
        "seconds": mean("seconds", 1),
        "tensors": sum(row["tensors"] for row in own),
        "identical": sum(row["identical"] for row in own),
    }


def _with_intervals(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row that was kept without intervals, with those of its confusion matrix.

    With as many photographs of each class, accuracy and macro precision determine the matrix but
    for the order of the classes, which none of the three depends on.
    """
    right = round(row["accuracy"] * TEST)
    half = TEST // 2

    def precision(cats: int) -> float:
        dogs = right - cats
        called = (cats + half - dogs, dogs + half - cats)
        return float(
            np.mean([n / c if c else 0.0 for n, c in zip((cats, dogs), called, strict=True)])
        )

    cats = min(
        range(max(0, right - half), min(half, right) + 1),
        key=lambda n: abs(precision(n) - row["precision"]),
    )
    labels = np.repeat([0, 1], half)
    places = np.arange(half)
    predicted = np.concatenate([(places >= cats), (places < right - cats)]).astype(int)
    metrics = classification_metrics(labels, predicted, np.zeros(TEST), cats_dogs.CLASSES, seed=0)
    found = {key: value for key, value in _intervals(metrics).items() if key not in row}
    return {**row, **found}


def _flat(table: Mapping[str, Any]) -> str:
    name = str(table["row"]).replace(", ", "_").replace(" = ", "").lower()
    if table["photos"] != WHOLE:
        name += f"_{table['photos']}"
    return name if table["size"] == SIDE else f"{name}_{table['size']}px"


# --------------------------------------------------------------------------------- rows


def _committed(name: str) -> list[dict[str, Any]]:
    """Return the rows of single seeds in the results file, if there is one."""
    path = RESULTS / f"{name}.json"
    rows = read_json(path)["rows"] if path.exists() else []
    # The first rows were all of one size, and of 50 epochs.
    old = {"size": SIDE, "epochs": 50, "validated": TEST, "tested": TEST}
    return [{**old, **row} for row in rows if "seed" in row]


def _joined(*parts: Sequence[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Return all rows by their key; of two that have the same one, the later."""
    return {
        (row["size"], row["photos"], row["seed"], row["row"]): row for part in parts for row in part
    }


def _read(kept: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


if __name__ == "__main__":
    main()
