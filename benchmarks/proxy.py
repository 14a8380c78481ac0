"""Does the proxy for map accuracy agree with true masks? Cut-outs pasted over photographs.

Without masks and votes a scan judges maps by deletion and insertion (`audit.faithfulness`). Here
the truth is known: cut-out objects, whose alpha channel is their exact mask, lie on photographs of
cats and dogs, and a network names the object's category. Its features are EfficientNet-Lite0's, cut
at stride 16; a 1x1 convolution and a linear layer above them are trained here, twice a seed:

- `honest`: nothing but the object tells the category;
- `shortcut`: most training pictures carry a colored badge that tells it as well. Of the pictures
  judged a half carry the badge of their own category, a quarter that of another, a quarter none.

No object is both in training and judged. Every method's map of the true class, from the last
convolution, is accurate or not by the shipped rule for masks (energy inside >= 0.5). Each variant
of the proxy is set against that: AUROC, and Cohen's kappa at a threshold. Variant and threshold are
those that were best for Grad-CAM, the map that a scan scores, on the tuning seed; the figures are
those of the other seeds, intervals from a bootstrap over images.

Beside the variants stands a control, `p_true`: the probability of the true class on the whole
picture, which knows nothing of the map. A proxy that does no better tells how sure the network is,
not where it looks. Figures of right and of wrong pictures alone say the same: cases 1 and 3, and
cases 2 and 4, are told apart by the map and nothing else.

What came out: insertion over a blur agrees best and agrees poorly, and the control beats it. Cases
by the proxy are no substitute for masks or votes.

    LAYERMEND_DATA=... python benchmarks/proxy.py [--work local/proxy]

Judged pictures are kept in the work folder; another start goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cats_dogs
import efficientnet_lite0
import numpy as np
import torch
from PIL import Image
from results_file import configuration, print_table, write_results
from sklearn.metrics import cohen_kappa_score
from torch import Tensor, nn

from audit.faithfulness import (
    BASELINE,
    FAITHFULNESS_THRESHOLD,
    FRACTIONS,
    Baseline,
    region_evidence,
)
from audit.files import read_json, write_json
from audit.map_accuracy import ENERGY_THRESHOLD, energy_inside, mask_areas, pointing_hits
from audit.networks import Program
from audit.saliency import INPUT, METHODS, layer_maps
from audit.statistics import auroc

CATEGORIES = ("animals", "food", "household", "plants", "vehicles")
COLORS = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48))
SIDE = 112
BADGE = 22
LAYER = "transfer"
TUNING_SEED = 0
REPORTING_SEEDS = (1, 2, 3)
BASELINES: tuple[Baseline, ...] = ("blur", "mean")
SCORES = ("insertion", "deletion", "difference", "log_difference")
SHIPPED = f"insertion/{BASELINE}"
CONTROL = "p_true"
GROUPS = ("all", "right", "wrong", "honest", "shortcut_own", "shortcut_other", "shortcut_none")
BATCH = 40
RESAMPLES = 2000

Head = Literal["honest", "shortcut"]


@dataclass(frozen=True, kw_only=True)
class Composites:
    """Pictures (N, 3, S, S) normalized, masks (N, S, S) of the visible object, labels, and which
    category's badge each carries (-1: none)."""

    images: Tensor
    masks: Tensor
    labels: Tensor
    badges: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("local/proxy"))
    parser.add_argument("--judged", type=int, default=160, help="pictures a seed and head")
    parser.add_argument("--trained", type=int, default=1000, help="pictures to train a head on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    images: list[dict[str, Any]] = []
    networks = []
    for seed in (TUNING_SEED, *REPORTING_SEEDS):
        for head in ("honest", "shortcut"):
            kept = options.work / f"{head}-seed{seed}-{options.judged}-{options.trained}.json"
            if not kept.exists():
                found, accuracy = judge(head, seed, options)
                write_json(kept, {"accuracy": accuracy, "rows": found})
            document = read_json(kept)
            images += document["rows"]
            networks.append({"seed": seed, "head": head, "accuracy": document["accuracy"]})
            print(networks[-1], flush=True)
    tuning = [row for row in images if row["seed"] == TUNING_SEED]
    reporting = [row for row in images if row["seed"] != TUNING_SEED]
    choice = tune(tuning)
    rows = [
        {"seeds": seeds, **row}
        for seeds, chosen in (("tuning", tuning), ("reporting", reporting))
        for row in agreement(chosen, choice["thresholds"])
        if row["group"] == "all" or row["variant"] in (choice["best"], CONTROL)
    ]
    summary = summarize(rows, choice, reporting)
    config = configuration(
        "cpu",
        "timm",
        "scikit-learn",
        judged=options.judged,
        trained=options.trained,
        threads=options.threads,
        side=SIDE,
        layer=LAYER,
        fractions=FRACTIONS,
        tuning_seed=TUNING_SEED,
        reporting_seeds=REPORTING_SEEDS,
        energy_threshold=ENERGY_THRESHOLD,
        chosen=choice["best"],
        thresholds=choice["thresholds"],
        shipped={"variant": SHIPPED, "threshold": FAITHFULNESS_THRESHOLD},
        networks=networks,
    )
    variant = choice["best"]
    shown = ("group", "method", "n", "accurate", "auroc", "auroc_low", "auroc_high", "kappa")
    print_table(
        f"reporting seeds, {variant}",
        [
            {name: row[name] for name in shown}
            for row in rows
            if row["seeds"] == "reporting" and row["variant"] == variant
        ],
    )
    print_table("summary", [{"claim": name, "figure": value} for name, value in summary.items()])
    print(write_results("proxy", summary=summary, config=config, rows=rows))


# ------------------------------------------------------------------------------ pictures


def composites(
    stamps: Sequence[Sequence[Image.Image]],
    photos: Sequence[Path],
    count: int,
    head: Head,
    *,
    judged: bool,
    seed: int,
) -> Composites:
    """Return pictures in equal shares of the categories, each stamp at a random size and place."""
    generator = np.random.default_rng([seed, judged, head == "shortcut"])
    labels = np.arange(count) % len(CATEGORIES)
    badges = _badges(labels, judged, generator) if head == "shortcut" else np.full(count, -1)
    pixels = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    masks = np.empty((count, SIDE, SIDE), dtype=bool)
    for i, label in enumerate(labels):
        with Image.open(photos[int(generator.integers(len(photos)))]) as opened:
            photo = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        stamp = stamps[label][int(generator.integers(len(stamps[label])))]
        photo, masks[i] = _paste(photo, stamp, generator)
        pixels[i] = np.asarray(photo)
        if badges[i] >= 0:
            top, left = (int(edge) for edge in generator.choice([2, SIDE - BADGE - 2], 2))
            place = (i, slice(top, top + BADGE), slice(left, left + BADGE))
            pixels[place] = COLORS[badges[i]]
            masks[place] = False
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return Composites(
        images=(images - cats_dogs.MEAN) / cats_dogs.STD,
        masks=torch.from_numpy(masks).float(),
        labels=torch.from_numpy(labels),
        badges=torch.from_numpy(badges),
    )


def _badges(labels: np.ndarray, judged: bool, generator: np.random.Generator) -> np.ndarray:
    other = (labels + generator.integers(1, len(CATEGORIES), len(labels))) % len(CATEGORIES)
    draw = generator.random(len(labels))
    if not judged:
        return np.where(draw < 0.8, labels, -1)
    return np.where(draw < 0.5, labels, np.where(draw < 0.75, other, -1))


def _paste(
    photo: Image.Image, stamp: Image.Image, generator: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    long_side = generator.uniform(0.6, 1.0) * SIDE
    scale = long_side / max(stamp.size)
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = stamp.resize(size, Image.Resampling.LANCZOS)
    if generator.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (int(generator.integers(SIDE - side + 1)) for side in size)
    photo.paste(stamp, (left, top), stamp)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top : top + size[1], left : left + size[0]] = np.asarray(stamp)[..., 3] > 127
    return photo, mask


def load_stamps(seed: int) -> tuple[list[list[Image.Image]], list[list[Image.Image]]]:
    """Return the cut-outs of each category in two halves: to train on and to judge on."""
    halves: tuple[list[list[Image.Image]], list[list[Image.Image]]] = ([], [])
    for number, name in enumerate(CATEGORIES):
        paths = sorted((cats_dogs.data_root() / "stamps" / name).glob("*.png"))
        order = np.random.default_rng([seed, number]).permutation(len(paths))
        for half, chosen in zip(halves, np.array_split(order, 2), strict=True):
            half.append([_cut_out(paths[i]) for i in chosen])
    return halves


def _cut_out(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        stamp = opened.convert("RGBA")
    return stamp.crop(stamp.getchannel("A").getbbox())


# ------------------------------------------------------------------------------ networks


def new_network() -> nn.Sequential:
    """Return EfficientNet-Lite0 up to stride 16 under a fresh 1x1 convolution and linear layer."""
    whole: Any = cats_dogs.with_head(efficientnet_lite0.pretrained_state()).features
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(whole.conv_stem, whole.bn1, *whole.blocks[:5]),
            transfer=nn.Conv2d(112, 128, kernel_size=1),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(128, len(CATEGORIES)),
        )
    ).eval()


def train(network: nn.Sequential, pictures: Composites, *, seed: int, epochs: int = 20) -> None:
    """Train what lies above the features, on features computed once."""
    torch.manual_seed(seed)
    for module in network[1:]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    with torch.no_grad():
        features = torch.cat([network[0](part) for part in pictures.images.split(BATCH)])
    optimizer = torch.optim.Adam(network[1:].parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(features)).split(50):
            optimizer.zero_grad()
            logits = network[1:](features[batch])
            nn.functional.cross_entropy(logits, pictures.labels[batch]).backward()
            optimizer.step()


# ------------------------------------------------------------------------------ judging


def judge(head: Head, seed: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """Return one row per judged picture and method, and the network's accuracy on the pictures."""
    to_train, to_judge = load_stamps(seed)
    root = cats_dogs.data_root() / "cats-dogs"
    pictures = {
        split: composites(
            stamps,
            sorted(path for name in ("cat", "dog") for path in (root / split / name).iterdir()),
            count,
            head,
            judged=split == "test",
            seed=seed,
        )
        for split, stamps, count in (
            ("train", to_train, options.trained),
            ("test", to_judge, options.judged),
        )
    }
    network = new_network()
    train(network, pictures["train"], seed=seed)
    program = Program.capture(network, (SIDE, SIDE))
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(_batches(pictures["test"])):
        rows += _judge_batch(program, batch, head, seed, first=number * BATCH)
    right = [row["right"] for row in rows if row["method"] == METHODS[0]]
    return rows, float(np.mean(right))


def _batches(pictures: Composites) -> Iterator[Composites]:
    for start in range(0, len(pictures.labels), BATCH):
        rows = slice(start, start + BATCH)
        yield Composites(
            images=pictures.images[rows],
            masks=pictures.masks[rows],
            labels=pictures.labels[rows],
            badges=pictures.badges[rows],
        )


def _judge_batch(
    program: Program, batch: Composites, head: Head, seed: int, *, first: int
) -> list[dict[str, Any]]:
    with torch.no_grad():
        logits = program.logits(batch.images).double()
    whole = logits.log_softmax(dim=1).gather(1, batch.labels.unsqueeze(1)).squeeze(1)
    rows = []
    for method in METHODS:
        found = layer_maps(program, batch.images, batch.labels, layers=[LAYER], method=method)
        maps = found[INPUT if method == "gradients" else LAYER]
        energy = energy_inside(maps, batch.masks)
        hits = pointing_hits(maps, batch.masks)
        areas = mask_areas(batch.masks)
        scores: dict[str, Tensor] = {CONTROL: whole.exp()}
        for baseline in BASELINES:
            evidence = region_evidence(
                program.logits,
                batch.images,
                batch.labels,
                maps,
                fractions=FRACTIONS,
                baseline=baseline,
            )
            kept, removed = evidence.kept.exp(), evidence.removed.exp()
            of = {
                "insertion": kept.mean(dim=0),
                "deletion": (whole.exp() - removed).mean(dim=0),
                "difference": (kept - removed).mean(dim=0),
                "log_difference": (evidence.kept - evidence.removed).mean(dim=0),
            }
            scores |= {f"{name}/{baseline}": of[name] for name in SCORES}
        for i, (label, badge) in enumerate(zip(batch.labels, batch.badges, strict=True)):
            group = "honest" if head == "honest" else _group(int(label), int(badge))
            rows.append(
                {
                    "seed": seed,
                    "picture": first + i,
                    "group": group,
                    "method": method,
                    "right": bool(logits[i].argmax() == label),
                    "energy": float(energy[i]),
                    "area": float(areas[i]),
                    "hit": bool(hits[i]),
                    "accurate": bool(energy[i] >= ENERGY_THRESHOLD),
                    "scores": {variant: float(values[i]) for variant, values in scores.items()},
                }
            )
    return rows


def _groups_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return "all", row["group"], "right" if row["right"] else "wrong"


def _group(label: int, badge: int) -> str:
    return "shortcut_none" if badge < 0 else f"shortcut_{'own' if badge == label else 'other'}"


# ------------------------------------------------------------------------------ agreement


def tune(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the variant of the highest AUROC for Grad-CAM, and each variant's threshold: that of
    the highest kappa for Grad-CAM among its 2 %, 4 %, ... quantiles. The control is no choice."""
    ours = [row for row in rows if row["method"] == "gradcam"]
    accurate = np.array([row["accurate"] for row in ours])
    thresholds, areas = {}, {}
    for variant in ours[0]["scores"]:
        values = np.array([row["scores"][variant] for row in ours])
        candidates = np.quantile(values, np.arange(0.02, 1, 0.02)).round(2)
        kappas = [_kappa(accurate, values >= candidate) for candidate in candidates]
        thresholds[variant] = float(candidates[int(np.argmax(kappas))])
        areas[variant] = auroc(values, accurate, seed=0, resamples=1).value
    best = max(areas.keys() - {CONTROL}, key=lambda variant: areas[variant])
    return {"best": best, "thresholds": thresholds}


def agreement(
    rows: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return AUROC and kappa of every method, variant and kind of picture, with intervals."""
    table = []
    for group in GROUPS:
        for method in METHODS:
            chosen = [row for row in rows if row["method"] == method and group in _groups_of(row)]
            accurate = np.array([row["accurate"] for row in chosen])
            for variant, threshold in thresholds.items():
                values = np.array([row["scores"][variant] for row in chosen])
                area = auroc(values, accurate, seed=0, resamples=RESAMPLES)
                kappa = _kappa_interval(accurate, values >= threshold)
                table.append(
                    {
                        "group": group,
                        "method": method,
                        "variant": variant,
                        "threshold": threshold,
                        "n": len(chosen),
                        "accurate": float(accurate.mean()),
                        "energy": float(np.mean([row["energy"] for row in chosen])),
                        "area": float(np.mean([row["area"] for row in chosen])),
                        "hits": float(np.mean([row["hit"] for row in chosen])),
                        "called_accurate": float((values >= threshold).mean()),
                        "auroc": area.value,
                        "auroc_low": area.low,
                        "auroc_high": area.high,
                        **kappa,
                    }
                )
    return table


def summarize(
    rows: Sequence[Mapping[str, Any]],
    choice: Mapping[str, Any],
    reporting: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Return the chosen variant's figures on the reporting seeds, flat."""
    variant = choice["best"]
    summary: dict[str, float] = {
        "pictures": len({(row["seed"], row["group"][0], row["picture"]) for row in reporting}),
        "seeds": len(REPORTING_SEEDS),
        "threshold": choice["thresholds"][choice["best"]],
    }
    for row in rows:
        if row["seeds"] != "reporting" or row["variant"] not in (variant, CONTROL):
            continue
        if row["variant"] == CONTROL:
            if row["group"] in ("all", "right", "wrong") and row["method"] == "gradcam":
                suffix = "" if row["group"] == "all" else f"_{row['group']}"
                ends = ("auroc", "auroc_low", "auroc_high", "kappa")
                summary |= {f"gradcam_control{suffix}_{name}": row[name] for name in ends}
            continue
        prefix = row["method"].replace("-", "_")
        if row["group"] == "all":
            names = ("auroc", "auroc_low", "auroc_high", "kappa", "kappa_low", "kappa_high")
            summary |= {f"{prefix}_{name}": row[name] for name in (*names, "accurate")}
        elif row["method"] == "gradcam":
            summary |= {
                f"{prefix}_{row['group']}_{name}": row[name]
                for name in ("auroc", "kappa", "accurate", "called_accurate")
            }
    return summary


def _kappa(truth: np.ndarray, answer: np.ndarray) -> float:
    if truth.all() or not truth.any():  # one kind only: there is nothing to agree on
        return float("nan")
    return float(cohen_kappa_score(truth, answer))


def _kappa_interval(truth: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    """Return kappa with its percentile bootstrap interval over images, by their 2x2 table."""
    cells = np.bincount(2 * truth + answer, minlength=4)
    drawn = np.random.default_rng(0).multinomial(len(truth), cells / len(truth), RESAMPLES)
    table = drawn.reshape(-1, 2, 2) / len(truth)
    observed = table[:, 0, 0] + table[:, 1, 1]
    chance = (table.sum(axis=1) * table.sum(axis=2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        kappas = (observed - chance) / (1 - chance)
    low, high = (
        np.nanpercentile(kappas, [2.5, 97.5]) if np.isfinite(kappas).any() else (np.nan,) * 2
    )
    return {"kappa": _kappa(truth, answer), "kappa_low": float(low), "kappa_high": float(high)}


if __name__ == "__main__":
    main()
