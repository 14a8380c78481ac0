"""The paper's Table 1 on cats and dogs: a new head under frozen ImageNet features, with penalty.

Seven rows: plain cross entropy, and the penalty with both terms, without R1, without R2, on
Grad-CAM and on Guided Grad-CAM maps; 50 epochs, batches of 32, learning rate 0.01, lambda 0.9, the
paper's scaling by the number of classes. One row more: the penalty as layermend bounds it. Every
row starts from the same weights as the baseline of its seed and sees the same batches, so the test
against the baseline is paired. `--photos` trains on fewer photographs, where differences are
larger than the noise.

Rows are kept as they come in WORK/rows.jsonl; a run goes on where the last one stopped.

    LAYERMEND_DATA=... python benchmarks/table1.py train --photos 50 200 1000 4000
    LAYERMEND_DATA=... python benchmarks/table1.py report
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cats_dogs
import efficientnet_lite0
import numpy as np
import torch
from results_file import configuration, print_table, write_results
from scipy.stats import binomtest
from sklearn.metrics import precision_score, recall_score

from audit.images import Split, open_image_folder
from audit.networks import Network, open_network
from audit.statistics import bootstrap_mean, mcnemar
from repair.cache import CrossingBatch, CrossingTensors, cross_tensors
from repair.config import RepairConfig
from repair.decision import Predictions
from repair.maps import map_similarity, true_class_maps
from repair.new_head import CLASSIFIER, CONVOLUTION, head_split, with_new_head
from repair.sources import positions
from repair.transfer import transfer

SEEDS = (0, 1, 2, 3, 4)
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SIZE = (112, 112)
WHOLE = 4000
LEARNED = {f"{layer}.{kind}" for layer in (CONVOLUTION, CLASSIFIER) for kind in ("weight", "bias")}
PENALTY = RepairConfig(
    loss="trust", scale="classes", balance=0.9, learning_rate=0.01, epochs=50, controls=()
)
ROWS = {
    "baseline": replace(PENALTY, loss="ce"),
    "gradcam": PENALTY,
    "gradcam, R1 = 0": replace(PENALTY, r1=False),
    "gradcam, R2 = 0": replace(PENALTY, r2=False),
    "gradcam, bounded": replace(PENALTY, scale="bounded"),
}
PAPER = {  # MobileNetV2, accuracy in %, and SSIM to the baseline's maps
    "baseline": (97.6, None),
    "gradcam": (98.4, 0.78),
    "gradcam, R1 = 0": (98.3, 0.76),
    "gradcam, R2 = 0": (98.5, 0.85),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["train", "report"])
    parser.add_argument("--photos", type=int, nargs="+", default=[4000], help="to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=Path("local/table1"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "rows.jsonl"
    if options.action == "train":
        _train(options, kept)
    else:
        _report(_read(kept))


def _train(options: argparse.Namespace, kept: Path) -> None:
    done = {(row["photos"], row["seed"]) for row in _read(kept)}
    checkpoint = efficientnet_lite0.write_checkpoint(
        options.work, replace(efficientnet_lite0.PREPROCESSING, input_size=SIZE, crop=1.0)
    )
    network = open_network(str(checkpoint))
    folder = open_image_folder(cats_dogs.data_root() / "cats-dogs", cats_dogs.CLASSES)
    started = time.perf_counter()
    first = with_new_head(network, cats_dogs.CLASSES)
    crossing = {
        name: cross_tensors(
            first, head_split(first)[0], folder, positions(folder, name), budget_bytes=2**33
        )
        for name in SPLITS
    }
    seconds = time.perf_counter() - started
    print(f"features of {sum(map(len, crossing.values()))} photographs in {seconds:.0f} s")
    for photos in options.photos:
        for seed in options.seeds:
            if (photos, seed) in done:
                continue
            start = with_new_head(network, cats_dogs.CLASSES, seed=seed)
            own = {**crossing, "train": _Some(crossing["train"], photos, seed=seed)}
            rows = _rows(start, own, seed)
            with kept.open("a") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)


def _rows(
    start: Network, crossing: Mapping[str, CrossingTensors], seed: int
) -> list[dict[str, Any]]:
    """Return all rows of one seed and one number of photographs."""
    split, _ = head_split(start)
    rows: list[dict[str, Any]] = []
    baseline: tuple[np.ndarray, torch.Tensor] | None = None
    for name, config in ROWS.items():
        started = time.perf_counter()
        found = transfer(start, crossing, replace(config, seed=seed))
        seconds = time.perf_counter() - started
        maps = true_class_maps(split, crossing["test"], found.trained.parameters)
        right = found.test.right
        baseline = baseline or (right, maps)
        test = mcnemar(baseline[0], right)
        changed = _changed(start, found.network)
        rows.append(
            {
                "row": name,
                "photos": len(crossing["train"]),
                "seed": seed,
                "accuracy": round(float(right.mean()), 4),
                "precision": round(_score(precision_score, found.test), 4),
                "recall": round(_score(recall_score, found.test), 4),
                "cross_entropy": round(float(found.test.cross_entropies.mean()), 4),
                "mean_saliency": round(float(maps.mean()), 4),
                "ssim": round(float(map_similarity(baseline[1], maps).mean()), 4),
                "fixed": test.fixed,
                "broken": test.broken,
                "p_value": round(test.p_value, 4),
                "best_epoch": found.trained.best_epoch,
                "stopped": found.trained.stopped,
                "tensors": len(start.program.state) - len(LEARNED),
                "identical": len(start.program.state) - len(changed | LEARNED),
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _score(metric: Callable[..., float], said: Predictions) -> float:
    return float(metric(said.labels, said.predicted, average="macro", zero_division=0))


def _changed(one: Network, other: Network) -> set[str]:
    before, after = one.program.state, other.program.state
    return {name for name in before if not torch.equal(before[name], after[name])}


class _Some:
    """As many of the photographs as asked for, as many of each class, drawn by a seed."""

    def __init__(self, whole: CrossingTensors, photos: int, *, seed: int) -> None:
        labels = whole.batch(torch.arange(len(whole))).labels
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(whole)))
        rows = [order[labels[order] == label][: photos // 2] for label in labels.unique()]
        self._rows = torch.cat(rows)
        self._whole = whole
        self.kind, self.tensors = whole.kind, whole.tensors
        self.bytes, self.seconds = whole.bytes, whole.seconds

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: torch.Tensor) -> CrossingBatch:
        return self._whole.batch(self._rows[rows])


# --------------------------------------------------------------------------------- tables


def _report(rows: Sequence[Mapping[str, Any]]) -> None:
    tables = []
    for photos in sorted({row["photos"] for row in rows}):
        for name in ROWS:
            own = [row for row in rows if (row["photos"], row["row"]) == (photos, name)]
            if own:
                tables.append({"photos": photos, "row": name, **_means(own, rows)})
                if photos == WHOLE and name in PAPER:
                    tables[-1]["paper_accuracy"], tables[-1]["paper_ssim"] = PAPER[name]
    print_table("Cats and dogs, test photographs; means over the seeds", tables)
    whole = [table for table in tables if table["photos"] == WHOLE]
    summary = {_flat(table["row"]): table["accuracy"] for table in whole}
    for table in tables:
        if table["photos"] != WHOLE:
            summary[f"{_flat(table['row'])}_{table['photos']}"] = table["accuracy"]
    summary["minutes_largest"] = round(
        sum(row["seconds"] for row in rows if row["photos"] == WHOLE) / 60, 1
    )
    config = configuration(
        "cpu",
        "timm",
        seeds=list(SEEDS),
        input_size=list(SIZE),
        backbone=efficientnet_lite0.ARCH,
        settings={name: value.as_dict() for name, value in ROWS.items()},
    )
    print(write_results("table1", summary=summary, config=config, rows=[*tables, *rows]))


def _means(own: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; the test against the baseline counts the images of all seeds together."""
    fixed, broken = sum(row["fixed"] for row in own), sum(row["broken"] for row in own)
    accuracies = [row["accuracy"] for row in own]
    paired = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    by_seed = {
        row["seed"]: row["accuracy"]
        for row in rows
        if (row["photos"], row["row"]) == (own[0]["photos"], "baseline")
    }
    differences = np.array([row["accuracy"] - by_seed[row["seed"]] for row in own])
    spread = bootstrap_mean(differences, seed=0)
    return {
        "seeds": len(own),
        "accuracy": round(float(np.mean(accuracies)), 4),
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "precision": round(float(np.mean([row["precision"] for row in own])), 4),
        "recall": round(float(np.mean([row["recall"] for row in own])), 4),
        "cross_entropy": round(float(np.mean([row["cross_entropy"] for row in own])), 4),
        "difference": round(spread.value, 4),
        "difference_low": round(spread.low, 4),
        "difference_high": round(spread.high, 4),
        "fixed": fixed,
        "broken": broken,
        "p_value": round(float(paired), 4),
        "ssim": round(float(np.mean([row["ssim"] for row in own])), 3),
        "mean_saliency": round(float(np.mean([row["mean_saliency"] for row in own])), 3),
        "diverged": sum(row["stopped"] is not None for row in own),
        "seconds": round(float(np.mean([row["seconds"] for row in own])), 1),
    }


def _flat(row: str) -> str:
    return row.replace(", ", "_").replace(" = ", "").lower()


def _read(kept: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


if __name__ == "__main__":
    main()
