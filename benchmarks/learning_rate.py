"""A learning rate chosen for the layer, as `repair layer` does, beside the paper's 0.01.

Watermarks and borders planted by `localize.py` in the small networks are repaired in the layer that
the scan would have repaired, from 300 photos: where the mark is wrong half of the time by the loss
`energy` and by cross entropy, on the photos as they are; where it is nearly always right from
counterfactual photos and the network's own answers, as `repair layer` does then
(`repair_shortcut.py` has the cases, the photos and the measures). Both learning rates have the same
10 epochs; `auto` tries each of its rates for two epochs before.

    LAYERMEND_DATA=... python benchmarks/learning_rate.py train resnet --training-seed 2 \
        --faults local/localize
    LAYERMEND_DATA=... python benchmarks/learning_rate.py report
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repair_shortcut import ANSWERS, CE, ENERGY, Method, repair_all
from results_file import configuration, print_table, write_results
from shortcut_cases import Regime, lessons, mark_cases

from repair.config import AUTO, RepairConfig
from repair.rates import RATES

SEED = 0
FIXED = RepairConfig().rate
TRIED: dict[Regime, dict[str, Method]] = {
    "balanced": {
        "energy": Method(place="flagged", config=ENERGY),
        "ce": Method(place="flagged", config=CE),
    },
    "biased": {"answers": Method(place="flagged", config=ANSWERS, changed=True)},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["train", "report"])
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--training-seed", type=int, default=0)
    parser.add_argument("--faults", type=Path, default=Path("local/localize"))
    parser.add_argument("--work", type=Path, default=Path("local/learning_rate"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.work / "rows.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if options.action == "report":
        report(rows)
        return
    done = {(row["case"], row["regime"], row["loss"]) for row in rows}
    for case in mark_cases(options.faults, options.networks, options.training_seed):
        for regime, methods in TRIED.items():
            given = lessons(case, regime, SEED, options.work)
            for name, method in methods.items():
                if (case.name, regime, name) in done:
                    continue
                by_rate = {
                    which: replace(method, config=replace(method.config, learning_rate=rate))
                    for which, rate in (("fixed", FIXED), ("auto", AUTO))
                }
                known = {"regime": regime, "loss": name, "seed": SEED}
                with kept.open("a") as stream:
                    for row in repair_all(case, given, by_rate, known):
                        bare = {k: v for k, v in row.items() if not k.endswith("_right")}
                        stream.write(json.dumps(bare) + "\n")


def report(rows: list[dict[str, Any]]) -> None:
    """Print the tables and write ``results/learning_rate.json``."""
    told = ("case", "layer", "regime", "loss", "method", "rate", "recovered", "damage")
    print_table("Every repair", [{key: row[key] for key in told} for row in rows])
    means, summary = [], {}
    for regime, methods in TRIED.items():
        for loss in methods:
            for name in ("fixed", "auto"):
                own = [
                    row
                    for row in rows
                    if (row["regime"], row["loss"], row["method"]) == (regime, loss, name)
                ]
                if not own:
                    continue
                recovered = [100 * row["recovered"] for row in own]
                damage = [100 * row["damage"] for row in own]
                means.append(
                    {"regime": regime, "loss": loss, "rate": name, "n": len(own)}
                    | {"recovered": round(float(np.mean(recovered)), 1)}
                    | {"worst": round(min(recovered), 1)}
                    | {"damage": round(float(np.mean(damage)), 2)}
                    | {"most": round(max(damage), 1)}
                )
                key = f"{loss}_{regime}_{name}"
                summary[f"recovered_{key}"] = means[-1]["recovered"]
                summary[f"worst_{key}"] = means[-1]["worst"]
                summary[f"damage_{key}"] = means[-1]["damage"]
                summary[f"most_damage_{key}"] = means[-1]["most"]
    summary["repairs"] = len(rows)
    summary["repairs_identical"] = sum(row["tensors"] == row["identical"] for row in rows)
    print_table("Share of the cost won back, in %, and damage, in points", means)
    config = configuration("cpu", "timm", seeds=[SEED], rates=list(RATES["sgd"]), fixed=FIXED)
    print(write_results("learning_rate", summary=summary, config=config, rows=rows))


if __name__ == "__main__":
    main()
