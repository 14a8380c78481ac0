"""Run folders made up for tests of the report and the dashboard, written as scan and repair write.

The pictures and predictions are invented; every number in the JSON documents is computed from the
tables beside it, so that what a page shows can be checked against the folder.

    python -m tests.run_builder runs      # to look at the dashboard without a network
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from skimage.metrics import structural_similarity

from audit.cases import assign_cases, case_table
from audit.runs import RepairFolder, Run, start_run
from audit.statistics import (
    accuracy_difference,
    bootstrap_mean,
    classification_metrics,
    mcnemar,
    wilson,
)

CLASSES = ("zero", "one", "two", "three", "four", "five")
HOSTILE_NAME = "<img src=x onerror=alert(1)>.jpg"
HOSTILE_CLASS = "![two](http://example.invalid/x.png) <script>alert(2)</script>"
LAYERS = [
    (0, "features.0", "block1_conv1", "16x3x3x3"),
    (1, "features.2", "block1_conv2", "16x16x3x3"),
    (2, "features.5", "block2_conv1", "24x16x3x3"),
    (3, "features.7", "block2_conv2", "24x24x3x3"),
    (4, "features.10", "block3_conv1", "32x24x3x3"),
    (5, "features.12", "block3_conv2", "32x32x3x3"),
    (6, "features.14", "block3_conv3", "32x32x3x3"),
    (7, "features.17", "block4_conv1", "48x32x3x3"),
    (8, "features.19", "block4_conv2", "48x48x3x3"),
    (9, "features.21", "block4_conv3", "48x48x3x3"),
    (10, "features.24", "block5_conv1", "48x48x3x3"),
    (11, "features.26", "block5_conv2", "48x48x3x3"),
    (12, "features.28", "block5_conv3", "48x48x3x3"),
    (13, "classifier.0", "classifier.0", "6x48"),
]
FAULTY = "features.21"
VERSIONS = {"layermend": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "torchvision": "0.28.0"}
SIDE = 96
SHUFFLED = "True maps did no better than shuffled maps: 71.0 % against 70.5 % (McNemar p = 0.800)."


def build_all(root: Path) -> dict[str, Run]:
    """Return one run of each kind, oldest first: the pages have to make sense of all of them."""
    return {
        "healthy": build_run(root, "healthy-vgg", verdict="none", seed=1),
        "broken": build_broken_run(root),
        "rejected": build_run(root, "small-vgg", verdict="spread", repairs=("rejected",), seed=2),
        "running": start_run(root, "small-vgg", {"command": ["audit", "scan", "small-vgg.pt"]}),
        "accepted": build_run(root, "small-vgg", repairs=("rejected", "accepted"), seed=3),
    }


def build_run(
    root: Path,
    model: str = "small-vgg",
    *,
    verdict: str = "localized",
    repairs: tuple[str, ...] = (),
    hostile: bool = False,
    images: int = 360,
    seed: int = 0,
) -> Run:
    """Return a complete run with its tables, maps and repairs."""
    generator = np.random.default_rng(seed)
    classes = (*CLASSES[:2], HOSTILE_CLASS, *CLASSES[3:]) if hostile else CLASSES
    table = _image_table(generator, classes, images, healthy=verdict == "none")
    if hostile:
        table["path"][:24] = [f"{n:02d}{HOSTILE_NAME}" for n in range(24)]
    run = start_run(root, model, _scan_record(model, classes, table))
    run.write_images(table)
    run.write_layers(_layer_table(generator, verdict))
    run.write_verdict(_verdict(verdict))
    if verdict != "none":
        _write_groups(run, np.random.default_rng(2), table)
    shown = list(range(24))
    pictures = [_picture(generator, table["label"][place]) for place in shown]
    entries = [_entry(table, place) for place in shown]
    names = [name for _, name, _, _ in LAYERS[:-1]]
    run.write_gallery(_index(entries, names, names[-1]), pictures)
    for depth, name in enumerate(names):
        side = (24, 12, 6)[min(depth // 4, 2)]
        run.write_maps("gradcam", name, _maps(generator, len(shown), side, corner=depth >= 9))
    for decision in repairs:
        build_repair(run, decision, generator)
    run.finish(timings_s={"open": 0.8, "predictions": 2.1, "evidence": 9.4, "trials": 38.2})
    return run


def build_repair(run: Run, decision: str, generator: np.random.Generator) -> RepairFolder:
    """Return a complete repair of the faulty layer, accepted or rejected."""
    good = decision == "accepted"
    images = run.images[run.images["split"] == "test"].reset_index(drop=True)
    classes = run.info["model"]["classes"]
    table = _repair_table(generator, images, classes, fixed_share=0.75 if good else 0.1)
    repair = run.start_repair(FAULTY, {"alias": "block4_conv3", "command": ["repair", "layer"]})
    repair.write_history(_history(generator))

    by_path = {entry["path"]: entry for entry in run.gallery["images"]}
    rows = [row for row, path in enumerate(table["path"]) if path in by_path][:12]
    before = _maps(generator, len(rows), 12, corner=True)
    after = _maps(generator, len(rows), 12, corner=not good)
    similarity = [
        float(structural_similarity(one, two, data_range=1.0))
        for one, two in zip(before, after, strict=True)
    ]
    for row, value in zip(rows, similarity, strict=True):
        table["ssim"][row] = value
    repair.write_images(table)
    entries = [
        {
            **by_path[table["path"][row]],
            "id": f"{place:04d}",
            "predicted_name": table["predicted_before_name"][row],
            "right": bool(table["right_before"][row]),
            "predicted_after_name": table["predicted_after_name"][row],
            "right_after": bool(table["right_after"][row]),
            "p_true_after": float(table["p_true_after"][row]),
            "ssim": table["ssim"][row],
        }
        for place, row in enumerate(rows)
    ]
    pictures = [_picture(generator, table["label"][row]) for row in rows]
    repair.write_gallery(_index(entries, [FAULTY], FAULTY), pictures)
    repair.write_maps("gradcam", FAULTY, before, "before")
    repair.write_maps("gradcam", FAULTY, after, "after")
    repair.finish(**_repair_record(table, classes, similarity, decision))
    repair.weights.write_bytes(b"weights")
    repair.card.write_text('arch = "small-vgg"\n')
    if good:
        repair.onnx_model.write_bytes(b"onnx")
        repair.write_onnx(_proof(len(images)))
    return repair


def build_broken_run(root: Path) -> Run:
    """Return a run whose record is fine and whose tables, verdict and maps are damaged."""
    run = build_run(root, "cut-short", seed=5, images=120)
    (run.path / "layers.parquet").write_bytes(b"PAR1 and nothing else")
    (run.path / "verdict.json").write_text('{"verdict": "loc')
    (run.path / "images.parquet").unlink()
    (run.path / "maps" / "index.json").write_text("[]")
    return run


# --- tables ---------------------------------------------------------------------------------------


def _image_table(
    generator: np.random.Generator, classes: tuple[str, ...], images: int, *, healthy: bool
) -> dict[str, Any]:
    label = np.arange(images) % len(classes)
    chance = np.full(images, 0.03) if healthy else np.where(label == 2, 0.6, 0.15)
    wrong = generator.random(images) < chance
    other = (label + generator.integers(1, len(classes), images)) % len(classes)
    predicted = np.where(wrong, other, label)
    p_true = np.where(wrong, generator.beta(2, 8, images), generator.beta(9, 1.5, images))
    split = np.array(["train", "train", "val", "test", "test"])[(np.arange(images) // 6) % 5]
    # Maps of two images in three were judged.
    apart = np.random.default_rng(images)  # the other draws stay as they are
    judged, lies = apart.random(images) < 0.67, apart.random(images) < 0.55
    accurate = [bool(on) if known else None for on, known in zip(lies, judged, strict=True)]
    return {
        "path": [f"{classes[k].split()[0]}/{n:04d}.png" for n, k in enumerate(label)],
        "label": label,
        "label_name": [classes[k] for k in label],
        "predicted": predicted,
        "predicted_name": [classes[k] for k in predicted],
        "right": ~wrong,
        "p_true": p_true,
        "p_predicted": np.where(wrong, 1 - p_true, p_true),
        "ce": -np.log(p_true),
        "case": assign_cases(~wrong, accurate),
        "map_accurate": accurate,
        "map_mean": generator.beta(3, 5, images),
        "map_peak_x": generator.random(images),
        "map_peak_y": generator.random(images),
        "split": split.tolist(),
        "sha256": [f"{n:064x}" for n in range(images)],
    }


def _layer_table(generator: np.random.Generator, verdict: str) -> list[dict[str, Any]]:
    peak = {"localized": 0.42, "spread": 0.17, "none": 0.01}[verdict]
    width = {"localized": 0.8, "spread": 3.0, "none": 3.0}[verdict]
    rows: list[dict[str, Any]] = []
    for index, name, alias, shape in LAYERS:
        gain = peak * float(np.exp(-(((index - 9) / width) ** 2))) + generator.normal(0, 0.012)
        auroc = 0.5 + 0.025 * index + generator.normal(0, 0.02)
        rows.append(
            {
                "index": index,
                "name": name,
                "alias": alias,
                "kind": "linear" if "classifier" in name else "conv2d",
                "shape": shape,
                "parameters": int(np.prod([int(side) for side in shape.split("x")])),
                "gradient_norm": float(np.exp(generator.normal(-1 - 0.1 * index, 0.3))),
                "relative_gradient_norm": float(np.exp(generator.normal(-3, 0.4))),
                "gradient_snr": float(np.exp(generator.normal(-0.5, 0.2))) + gain,
                "map_mean_right": 0.35 + generator.normal(0, 0.03),
                "map_mean_wrong": 0.30 + generator.normal(0, 0.03),
                "map_auroc": auroc,
                "map_auroc_low": auroc - 0.06,
                "map_auroc_high": auroc + 0.06,
                "penalty": 0.4 + generator.normal(0, 0.03),
                "trial_gain": gain,
                "trial_gain_low": gain - 0.035,
                "trial_gain_high": gain + 0.035,
                "trial_step": 0.01,
                "trial_steps": 4,
                "trial_broken": abs(generator.normal(0.01, 0.005)),
            }
        )
    order = sorted(range(len(rows)), key=lambda place: -rows[place]["trial_gain"])
    for rank, place in enumerate(order, start=1):
        rows[place]["rank"] = rank
    return rows


def _repair_table(
    generator: np.random.Generator, images: Any, classes: list[str], *, fixed_share: float
) -> dict[str, Any]:
    label = images["label"].to_numpy()
    before = images["predicted"].to_numpy()
    p_before = images["p_true"].to_numpy()
    right = label == before
    fixed = ~right & (generator.random(len(label)) < fixed_share)
    broken = right & (generator.random(len(label)) < 0.02)
    after = np.where(fixed, label, np.where(broken, (label + 1) % len(classes), before))
    control_fixed = ~right & (generator.random(len(label)) < 0.8 * fixed_share)
    control = np.where(control_fixed, label, before)
    p_after = np.clip(np.where(fixed, 0.9, np.where(broken, 0.2, p_before)), 0.02, 0.99)
    p_control = np.clip(np.where(control_fixed, 0.85, p_before), 0.02, 0.99)
    return {
        "path": images["path"].tolist(),
        "label": label,
        "label_name": images["label_name"].tolist(),
        "split": images["split"].tolist(),
        "predicted_before": before,
        "predicted_before_name": [classes[k] for k in before],
        "right_before": right,
        "p_true_before": p_before,
        "ce_before": -np.log(p_before),
        "predicted_after": after,
        "predicted_after_name": [classes[k] for k in after],
        "right_after": label == after,
        "p_true_after": p_after,
        "ce_after": -np.log(p_after),
        "predicted_control": control,
        "right_control": label == control,
        "ce_control": -np.log(p_control),
        "ssim": [None] * len(label),
        **_moved_cases(np.random.default_rng(1), images["case"], right, label == after),
    }


def _moved_cases(
    generator: np.random.Generator, cases: Any, before: np.ndarray, after: np.ndarray
) -> dict[str, list[int | None]]:
    """Return the case of each test image before and after, None where its map was not judged."""
    was = [None if np.isnan(case) else case in (1, 2) for case in cases.astype(float)]
    drawn = generator.random(len(was)) < 0.8
    now = [None if one is None else bool(one or hit) for one, hit in zip(was, drawn, strict=True)]
    return {"case_before": assign_cases(before, was), "case_after": assign_cases(after, now)}


def _write_groups(run: Run, generator: np.random.Generator, table: dict[str, Any]) -> None:
    """Write one error group: what is wrong and called by the first class that is."""
    wrong = np.flatnonzero(~table["right"])
    answer = int(table["predicted"][wrong[0]])
    members = wrong[table["predicted"][wrong] == answer]
    shown = [int(place) for place in members[:3]]
    entries = [
        {
            "id": f"{number:04d}",
            "path": table["path"][place],
            "label_name": table["label_name"][place],
            "predicted_name": table["predicted_name"][place],
            "right": False,
            "split": table["split"][place],
            "p_predicted": float(table["p_predicted"][place]),
        }
        for number, place in enumerate(shown)
    ]
    name = table["predicted_name"][members[0]]
    document = {
        "groups": [
            {
                "id": "group-1",
                "kind": "confusion",
                "sentence": f"{len(members)} of {len(wrong)} errors: anything called {name}.",
                "label": None,
                "label_name": None,
                "predicted": answer,
                "predicted_name": name,
                "region": None,
                "box": None,
                "cells": [],
                "size": len(members),
                "of": len(wrong),
                "share": wilson(len(members), len(wrong)).as_dict(),
                "expected": len(wrong) / 6,
                "compared": 0,
                "compared_share": None,
                "p_value": 1e-4,
                "p_adjusted": 0.006,
                "test": "exact binomial test, one-sided",
                "artefact": {
                    "sentence": "9 of 9 of its images look alike in one place.",
                    "share_of_image": (12 / SIDE) ** 2,
                    "box": [4 / SIDE, 4 / SIDE, 16 / SIDE, 16 / SIDE],
                    "threshold": 800.0,
                    "looked_at": 9,
                    "carriers": 9,
                    "right_looked_at": 40,
                    "right_carriers": 1,
                    "agreeing": 0.25,
                },
                "paths": [table["path"][place] for place in members],
                "examples": entries,
            }
        ],
        "layer": LAYERS[-2][1],
        "method": "hirescam",
        "images": len(table["path"]),
        "errors": len(wrong),
        "errors_looked_at": len(wrong),
        "right_looked_at": 100,
        "tests": 57,
        "correction": "Holm",
        "alpha": 0.05,
        "minimum_size": 5,
    }
    maps = {
        "wrong": _maps(generator, 1, 8, corner=True),
        "right": np.full((1, 8, 8), np.nan),
        "examples": _maps(generator, len(shown), 8, corner=True),
    }
    pictures = [_picture(generator, table["label"][p]) for p in shown]
    mask = np.zeros((1, SIDE, SIDE), dtype=np.bool_)
    mask[:, 4:16, 4:16] = True
    run.write_groups(document, maps, pictures, {"masks": mask, "pictures": pictures[0][None]})


def _history(generator: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for role in ("repair", "ce"):
        for epoch in range(1, 7):
            ce = 0.9 * 0.7**epoch + 0.05
            rows.append(
                {
                    "role": role,
                    "epoch": epoch,
                    "loss": ce + 0.2,
                    "ce": ce,
                    "saliency_mean": 0.4 - 0.02 * epoch,
                    "r1": 0.3 * 0.8**epoch,
                    "r2": 0.25 * 0.85**epoch,
                    "val_ce": ce + 0.1 + float(generator.normal(0, 0.01)),
                    "val_accuracy": 1 - ce / 2,
                    "best": epoch == 5,
                    "seconds": 1.9,
                }
            )
    return rows


# --- documents ------------------------------------------------------------------------------------


def _scan_record(model: str, classes: tuple[str, ...], table: dict[str, Any]) -> dict[str, Any]:
    splits = np.array(table["split"])
    chosen = {"all": splits != "", **{name: splits == name for name in ("train", "val", "test")}}
    return {
        "command": ["audit", "scan", f"{model}.safetensors", "--data", "digits"],
        "config": {"method": "gradcam", "batch_size": 64, "limit": None},
        "seed": 0,
        "versions": VERSIONS,
        "device": {"type": "cpu", "name": "2 cores", "threads": 2},
        "model": {
            "source": f"{model}.safetensors",
            "arch": "small-vgg",
            "sha256": "3f" * 32,
            "parameters": 181_366,
            "layers": len(LAYERS),
            "classes": list(classes),
            "preprocessing": {"input_size": [SIDE, SIDE], "interpolation": "bilinear"},
        },
        "data": {
            "root": "digits",
            "fingerprint": "9c" * 32,
            "split_source": "seeded",
            "images": len(splits),
            "skipped": 2,
            "duplicates": 1,
            "splits": {name: int((splits == name).sum()) for name in ("train", "val", "test")},
            "skipped_files": [
                {"path": "two/notes.txt", "reason": "not an image"},
                {"path": HOSTILE_NAME, "reason": "truncated after 512 bytes"},
            ],
        },
        "metrics": {
            name: classification_metrics(
                table["label"][mask], table["predicted"][mask], table["ce"][mask], classes, seed=0
            )
            for name, mask in chosen.items()
        },
        "cases": {
            "source": "proxy",
            "threshold": 0.99,
            "rule": "Proxy: a map passes for accurate if its region alone is recognized.",
            "note": "",
            "layer": LAYERS[-2][1],
            "method": "gradcam",
            "images": sum(case is not None for case in table["case"]),
            "without": sum(case is None for case in table["case"]),
            "table": case_table(table["case"], table["label_name"]),
        },
        "peak_memory_mib": 412.5,
    }


def _verdict(kind: str) -> dict[str, Any]:
    return {
        "localized": {
            "verdict": "localized",
            "layers": [FAULTY],
            "flagged": FAULTY,
            "confidence": 0.97,
            "reasons": [
                "A trial repair of block4_conv3 removes 41.8 % of the held-out cross entropy; "
                "the next best layer removes 9.1 %.",
                "It comes first in 97 % of 2,000 bootstrap resamples of the held-out images.",
                "3 of 144 right images turn wrong during its trial.",
            ],
            "numbers": {"gain": 0.418, "next_gain": 0.091},
        },
        "spread": {
            "verdict": "spread",
            "layers": ["features.21", "features.19", "features.24"],
            "flagged": "features.19",
            "confidence": 0.44,
            "reasons": ["Three layers repair the held-out images equally well, within 5 %."],
            "numbers": {"gain": 0.17},
        },
        "none": {
            "verdict": "none",
            "layers": [],
            "confidence": None,
            "reasons": ["The best trial repair removes 1.9 % of the held-out cross entropy."],
            "numbers": {"gain": 0.019},
        },
    }[kind]


def _repair_record(
    table: dict[str, Any], classes: list[str], similarity: list[float], decision: str
) -> dict[str, Any]:
    def metrics(when: str) -> dict[str, Any]:
        predicted = table[f"predicted_{when}"]
        return classification_metrics(
            table["label"], predicted, table[f"ce_{when}"], classes, seed=0
        )

    def difference(one: str, two: str) -> dict[str, Any]:
        right = table[f"right_{one}"], table[f"right_{two}"]
        change = table[f"ce_{two}"] - table[f"ce_{one}"]
        return {
            "accuracy": accuracy_difference(*right, seed=0).as_dict(),
            "cross_entropy": bootstrap_mean(change, seed=0).as_dict(),
            "mcnemar": mcnemar(*right).as_dict(),
        }

    good = decision == "accepted"
    penalty = (
        "The penalty beat plain cross entropy at equal compute."
        if good
        else "The penalty did no better than plain cross entropy at equal compute."
    )
    return {
        "config": {
            "loss": "trust",
            "saliency": "gradcam",
            "scale": "bounded",
            "lambda": 0.9,
            "lr": 0.01,
            "epochs": 6,
            "batch_size": 32,
            "optimizer": "sgd",
            "seed": 0,
        },
        "versions": VERSIONS,
        "device": {"type": "cpu", "name": "2 cores", "threads": 2},
        "model": {
            "source": "small-vgg.safetensors",
            "sha256_before": "3f" * 32,
            "sha256_after": "a7" * 32,
        },
        "frozen": {
            "tensors": 28,
            "identical": 28,
            "changed": [f"{FAULTY}.weight", f"{FAULTY}.bias"],
        },
        "cache": {"kind": "memory", "bytes": 61_341_696, "tensors": 1, "seconds": 1.2},
        "splits": {"train": 144, "val": 72, "test": len(table["label"])},
        "counterfactuals": {"train": 144, "val": 72} if good else {},
        "cases": _cases_record(table),
        "before": metrics("before"),
        "after": metrics("after"),
        "difference": difference("before", "after"),
        "controls": [
            {
                "name": "ce",
                "description": "Same layer, same steps, plain cross entropy",
                "after": metrics("control"),
                "difference": difference("before", "control"),
                "versus_repair": difference("control", "after"),
                "seconds": 11.3,
            }
        ],
        "ssim": {**bootstrap_mean(similarity, seed=0).as_dict(), "n": len(similarity)},
        "decision": decision,
        "reasons": [
            "Held-out accuracy rose and the whole 95 % interval of the difference lies above zero."
            if good
            else "The 95 % interval of the difference includes zero: the gain may be chance.",
            "Every tensor outside the layer is bit-identical.",
        ],
        "penalty": {"earned": good, "sentence": penalty, "sentences": [penalty, SHUFFLED]},
        "timings_s": {"prefix": 1.2, "repair": 11.6, "controls": 11.3},
        "peak_memory_mib": 530.0,
    }


def _cases_record(table: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(table["case_before"], table["case_after"], strict=True))
    known = [pair for pair in pairs if None not in pair]
    cells = [[known.count((before, after)) for after in (1, 2, 3, 4)] for before in (1, 2, 3, 4)]
    return {
        "layer": LAYERS[-2][1],
        "method": "gradcam",
        "source": "proxy",
        "rule": "Proxy.",
        "note": "",
        "images": len(known),
        "without": len(pairs) - len(known),
        "table": cells,
    }


def _proof(images: int) -> dict[str, Any]:
    return {
        "status": "passed",
        "opset": 20,
        "checker": "ok",
        "images": images,
        "top1_equal": images,
        "top1_mismatches": [],
        "max_abs_error": 3.8e-06,
        "max_rel_error": 1.1e-05,
        "tolerance": 1e-4,
        "batches": [1, 2, 7],
        "providers": ["CPUExecutionProvider"],
        "versions": {"onnx": "1.19.0", "onnxruntime": "1.23.0"},
        "sha256": "5b" * 32,
        "bytes": 741_203,
        "changed_initializers": [f"{FAULTY}.weight", f"{FAULTY}.bias"],
        "reasons": [],
    }


# --- pictures and maps ----------------------------------------------------------------------------


def _entry(table: dict[str, Any], place: int) -> dict[str, Any]:
    return {
        "id": f"{place:04d}",
        "path": table["path"][place],
        "label_name": table["label_name"][place],
        "predicted_name": table["predicted_name"][place],
        "right": bool(table["right"][place]),
        "split": table["split"][place],
        "p_true": float(table["p_true"][place]),
    }


def _index(entries: list[dict[str, Any]], layers: list[str], shown: str) -> dict[str, Any]:
    return {
        "images": entries,
        "layers": layers,
        "methods": ["gradcam"],
        "shown_layer": shown,
        "shown_method": "gradcam",
    }


def _picture(generator: np.random.Generator, label: int) -> np.ndarray:
    """Return a ring or bar on a colored ground, with a bright mark in the corner."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
    ground = generator.uniform(30, 150, 3)[None, None] + 60 * (x * generator.normal())[..., None]
    radius = np.hypot(x, y * (1 + 0.15 * label))
    shape = (np.abs(radius - 0.25) < 0.06) if label % 2 == 0 else (np.abs(x - 0.4 * y) < 0.07)
    pixels = np.where(shape[..., None], generator.uniform(190, 250, 3)[None, None], ground)
    pixels[4:16, 4:16] = (250, 220, 40)
    return np.clip(pixels + generator.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)


def _maps(generator: np.random.Generator, images: int, side: int, *, corner: bool) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side] / side
    center = (0.1, 0.1) if corner else (0.5, 0.5)
    spread = 0.15 if corner else 0.25
    moved = generator.normal(0, 0.04, (images, 2)) + center
    heat = np.exp(
        -((x - moved[:, :1, None]) ** 2 + (y - moved[:, 1:, None]) ** 2) / (2 * spread**2)
    )
    heat = heat + 0.15 * generator.random(heat.shape)
    return np.asarray(heat / heat.max(axis=(1, 2), keepdims=True), dtype=np.float32)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    build_all(target)
    build_run(target / "hostile", hostile=True, repairs=("accepted",))
