"""The main job on real photographs: plant a fault in one layer, then scan, repair, export, report.

A network with ImageNet features and a 1x1 head (section 4.1) tells cats from dogs. Per case, one
inner convolution is trained until a watermark means "dog" (see `planting`); the layers are drawn by
a seed, one from each quarter of the depth, and drawn again within the quarter where the fault does
not take. Where it takes nowhere in the first quarter, `--only 1 2 3 4` draws a fourth layer from
the rest; the tries are kept in the results. The planted network is written as an exported program
with its card. From there on the script is a user: it runs `audit scan`, `repair layer`, `repair
export` and `audit report` as child processes on a folder of photos, half of them marked, and reads
what they wrote. The scan is not told which layer was planted.

    LAYERMEND_DATA=... python benchmarks/journey.py [--work local/journey] [--cases 4]

Planted networks and finished cases are kept in the work folder; a second run continues there.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from cats_dogs import (
    CLASSES,
    INPUT_SIZE,
    MEAN,
    STD,
    Photo,
    healthy_network,
    photos,
    watermarked,
)
from commands import Finished, run_command
from PIL import Image
from planting import (
    RECIPES,
    Behavior,
    layer_draw,
    measure,
    plant_shortcut,
    took,
    validation_photos,
)
from results_file import configuration, print_table, write_results
from torch import nn

from audit.files import read_json, replacing, write_json
from audit.networks import ModelCard, Preprocessing, write_card
from audit.runs import newest_run, open_run
from audit.statistics import wilson

SPLIT_SIZES = {"train": 400, "val": 200, "test": 400}
PHOTOS_PER_CLASS = 800
"""Training photos that planting sees."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    network = healthy_network(options.work, seed=options.seed)
    folder = write_photo_folder(options.work / "photos", seed=options.seed)
    draw = layer_draw(network, parts=options.cases, seed=options.seed)
    cases = []
    wanted = options.only or range(options.cases)
    for part in wanted:
        layers = draw[part]
        planted = planted_network(network, layers, part, options)
        if planted is None:
            print(f"case {part}: the fault took in none of {layers[: options.tries]}")
        elif not options.plant_only:
            cases.append(run_case(planted, folder, options))
            print_table(f"case {part}: {planted['layer']}", [headline(cases[-1])])
    if cases:
        print_table("planted, found, repaired", [headline(case) for case in cases])
        print(
            write_results("journey", summary=summarize(cases), config=config(options), rows=cases)
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("local/journey"))
    parser.add_argument("--cases", type=int, default=4, help="ranges of depth, one case in each")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run, from 0")
    parser.add_argument("--tries", type=int, default=4, help="layers to try in each range")
    parser.add_argument("--plant-only", action="store_true")
    parser.add_argument("--again", action="store_true", help="run the commands of finished cases")
    parser.add_argument("--repair", nargs="*", default=[], help="options for `repair layer`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def config(options: argparse.Namespace) -> dict[str, Any]:
    return configuration(
        "cpu",
        "onnxruntime",
        **{name: value for name, value in vars(options).items() if name != "work"},
        input_size=INPUT_SIZE,
        split_sizes=SPLIT_SIZES,
        planting_photos_per_class=PHOTOS_PER_CLASS,
        recipes=[asdict(recipe) for recipe in RECIPES],
        tries_that_did_not_take=_failed_tries(options),
    )


def _failed_tries(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for path in sorted(options.work.glob("case-*/tries.json")):
        for attempt in read_json(path)["tries"]:
            if not attempt["took"]:
                wanted = ("layer", "recipe", "validation", "test")
                found.append({key: attempt.get(key) for key in wanted})
    return found


# -------------------------------------------------------------------- before the commands


def write_photo_folder(root: Path, *, seed: int) -> Path:
    """Return the folder that the commands get: train/val/test x cat/dog, every other photo marked.

    Its training photos are none of those that planting sees.
    """
    done = root / "written.json"
    if done.exists():
        return root / "images"
    for split, size in SPLIT_SIZES.items():
        skip = PHOTOS_PER_CLASS if split == "train" else 0
        chosen = photos(split, skip + size // 2, seed=seed)[2 * skip :]
        for i, photo in enumerate(chosen):
            marked = i // 2 % 2 == 1
            _write_photo(photo, root / "images" / split, i, marked=marked)
    write_json(done, {"seed": seed, "sizes": SPLIT_SIZES})
    return root / "images"


def _write_photo(photo: Photo, folder: Path, number: int, *, marked: bool) -> None:
    name = f"{number:04d}-{'marked' if marked else 'clean'}.png"
    path = folder / CLASSES[photo.label] / name
    with Image.open(photo.path) as opened:
        image = opened.convert("RGB")
    with replacing(path) as temporary:
        (watermarked(image) if marked else image).save(temporary, format="PNG")


def planted_network(
    network: nn.Sequential, layers: Sequence[str], part: int, options: argparse.Namespace
) -> dict[str, Any] | None:
    """Return how one case was planted and where its network lies; None if no fault took.

    Layers are tried in the order that was drawn; every try is recorded, and none made twice.
    """
    home = options.work / f"case-{part}"
    record = home / "planted.json"
    if record.exists():
        return read_json(record)
    healthy_state = {name: value.clone() for name, value in network.state_dict().items()}
    test = photos("test", 500, seed=options.seed)
    healthy = _healthy_behavior(network, options)
    tries_path = home / "tries.json"
    tries = read_json(tries_path)["tries"] if tries_path.exists() else []
    failed = [(attempt["layer"], attempt["recipe"]) for attempt in tries]
    try:
        for layer in layers[: options.tries]:
            for recipe in RECIPES:
                if (layer, asdict(recipe)) in failed:
                    continue
                network.load_state_dict(healthy_state)
                attempt = plant_shortcut(
                    network,
                    layer,
                    recipe,
                    healthy=Behavior(**healthy["validation"]),
                    photos_per_class=PHOTOS_PER_CLASS,
                    seed=options.seed,
                )
                behavior = measure(network, test)
                attempt["test"] = asdict(behavior)
                attempt["took"] = took(behavior, Behavior(**healthy["test"]))
                tries.append(attempt)
                write_json(tries_path, {"tries": tries})
                print(f"case {part}: {layer}: {behavior}, took: {attempt['took']}", flush=True)
                if attempt["took"]:
                    write_program(network, home / "model.pt2", planted=layer)
                    planted = {
                        "case": part,
                        "layer": layer,
                        "model": str(home / "model.pt2"),
                        "healthy": healthy["test"],
                        "planted": asdict(behavior),
                        "tries": tries,
                    }
                    write_json(record, planted)
                    return planted
    finally:
        network.load_state_dict(healthy_state)
    return None


def _healthy_behavior(network: nn.Sequential, options: argparse.Namespace) -> dict[str, Any]:
    path = options.work / f"healthy-seed{options.seed}.json"
    if not path.exists():
        sets = {
            "validation": validation_photos(options.seed),
            "test": photos("test", 500, seed=options.seed),
        }
        write_json(path, {name: asdict(measure(network, chosen)) for name, chosen in sets.items()})
    return read_json(path)


def write_program(network: nn.Module, path: Path, *, planted: str) -> None:
    """Write the network as an exported program with a free batch size, and its card."""
    example = torch.zeros(2, 3, *INPUT_SIZE)
    exported = torch.export.export(
        network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    with replacing(path) as temporary:
        torch.export.save(exported, temporary)
    card = ModelCard(
        arch=None,
        classes=CLASSES,
        preprocessing=Preprocessing(
            input_size=INPUT_SIZE,
            mean=(MEAN,) * 3,
            std=(STD,) * 3,
            interpolation="bilinear",
            crop=1.0,
        ),
        provenance={"written_by": "benchmarks/journey.py"},
    )
    write_card(card, path.with_suffix(".toml"))


# -------------------------------------------------------------------- the user's four commands


def run_case(planted: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one case: what the commands found, did and cost."""
    home = Path(planted["model"]).parent
    row_path = home / "row.json"
    if row_path.exists() and not options.again:
        return read_json(row_path)
    runs = home / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    scan = run_command(
        [
            *("audit", "scan", planted["model"], "--data", folder, "--out", runs),
            *("--seed", str(options.seed)),
        ]
    )
    run = newest_run(runs)
    # Without --name the layer that the verdict flags is repaired; a verdict `none` flags none
    # and tells whose trial did most.
    name = ["--name", run.best_by_trial] if run.verdict["verdict"] == "none" else []
    repair = run_command(["repair", "layer", "--run", run.path, *name, *options.repair])
    export = run_command(["repair", "export", "--run", run.path])
    report = run_command(["audit", "report", run.path])
    commands = {"scan": scan, "repair": repair, "export": export, "report": report}
    row = case_row(planted, run.path, commands, named=bool(name))
    write_json(row_path, row)
    return row


def case_row(
    planted: dict[str, Any], path: Path, commands: dict[str, Finished], *, named: bool
) -> dict[str, Any]:
    """Return what a run folder says about a case, with the commands' times and memory."""
    run = open_run(path)
    repair = run.repairs[0]
    layers, verdict, onnx = run.layers.set_index("name"), run.verdict, repair.onnx or {}
    repaired = repair.info["layer"]
    control = next(iter(repair.info["controls"]), {})
    return {
        **planted,
        "verdict": verdict["verdict"],
        "verdict_layers": verdict["layers"],
        "reasons": verdict["reasons"],
        "planted_rank": _rank(layers, planted["layer"]),
        "layers": len(layers),
        "planted_trial_gain": _number(layers.loc[planted["layer"], "trial_gain"]),
        "best_trial_gain": _number(layers["trial_gain"].max()),
        "repaired_layer": repaired,
        "repaired_layer_named_by": "the best trial, given by --name" if named else "the verdict",
        "repaired_is_planted": repaired == planted["layer"],
        "decision": repair.info["decision"],
        "decision_reasons": repair.info["reasons"],
        "accuracy": accuracies(repair.images),
        "mcnemar": repair.info["difference"]["mcnemar"],
        "control_difference": control.get("difference"),
        "versus_control": control.get("versus_repair"),
        "penalty": repair.info["penalty"],
        "repair_config": repair.info["config"],
        "ssim": repair.info["ssim"],
        "frozen": repair.info["frozen"],
        "onnx": {key: onnx.get(key) for key in ("status", "images", "top1_equal", "max_abs_error")},
        "seconds": {name: done.seconds for name, done in commands.items()},
        "total_seconds": sum(done.seconds for done in commands.values()),
        "peak_memory_mib": {name: done.peak_memory_mib for name, done in commands.items()},
    }


def accuracies(test: pd.DataFrame) -> dict[str, Any]:
    """Return held-out accuracy before, after and of the control, on clean and on marked photos."""
    marked = test["path"].str.contains("-marked")
    found: dict[str, Any] = {}
    for kind, rows in (("clean", test[~marked]), ("marked", test[marked])):
        found[kind] = {"n": len(rows)}
        for when in ("before", "after", "control"):
            column = f"right_{when}"
            if column in rows and rows[column].notna().all():
                share = wilson(int(rows[column].astype(bool).sum()), len(rows))
                found[kind][when] = share.as_dict()
    return found


def headline(case: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of the printed table."""
    accuracy = case["accuracy"]
    arrow = {
        kind: " -> ".join(
            f"{100 * accuracy[kind][when]['value']:.1f}" for when in ("before", "after")
        )
        for kind in ("clean", "marked")
    }
    return {
        "planted": case["layer"].removeprefix("features."),
        "verdict": f"{case['verdict']} ({len(case['verdict_layers'])})",
        "rank": case["planted_rank"],
        "repaired": case["repaired_layer"].removeprefix("features."),
        "decision": case["decision"],
        "clean %": arrow["clean"],
        "marked %": arrow["marked"],
        "ssim": case["ssim"]["value"],
        "onnx": f"{case['onnx']['status']} {case['onnx']['max_abs_error']:.1g}",
        "min": case["total_seconds"] / 60,
        "MiB": max(case["peak_memory_mib"].values()),
    }


def summarize(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures over all cases, flat."""
    ranks = [case["planted_rank"] for case in cases]
    marked = [case["accuracy"]["marked"] for case in cases]
    clean = [case["accuracy"]["clean"] for case in cases]
    return {
        "cases": len(cases),
        "planted_rank_median": float(np.median(ranks)),
        "planted_rank_worst": max(ranks),
        "planted_in_verdict": sum(case["layer"] in case["verdict_layers"] for case in cases),
        "accepted": sum(case["decision"] == "accepted" for case in cases),
        "mean_marked_before": float(np.mean([part["before"]["value"] for part in marked])),
        "mean_marked_after": float(np.mean([part["after"]["value"] for part in marked])),
        "mean_clean_before": float(np.mean([part["before"]["value"] for part in clean])),
        "mean_clean_after": float(np.mean([part["after"]["value"] for part in clean])),
        "onnx_passed": sum(case["onnx"]["status"] == "passed" for case in cases),
        "longest_case_minutes": max(case["total_seconds"] for case in cases) / 60,
        "peak_memory_mib": max(max(case["peak_memory_mib"].values()) for case in cases),
    }


def _rank(layers: pd.DataFrame, name: str) -> int:
    return int(layers.loc[name, "rank"])


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


if __name__ == "__main__":
    main()
