"""Which layer is at fault? Cheap scores and the onset of drift, against planted faults.

Faults of seven kinds (`faults.py`) are planted in layers drawn at random; the evidence pass of
`audit scan` looks at photographs that neither training nor planting used, and every score ranks the
layers. Ranks count ties against the score. A layer without batch norm has no drift: it ranks last.
Trial repairs take no part here; they decide whether a scan flags anything at all, and alone where a
network has no batch norm. Healthy networks, and faults too small to count, stand in rows of their
own: how often the onset would name a layer of theirs.

Rows are kept as they come in WORK/rows.jsonl, and a run goes on where the last one stopped. The
threshold and the floor of the onset were set on the seeds TUNED_ON; none of those is reported.

    LAYERMEND_DATA=... python benchmarks/localize.py plant efficientnet resnet --faults 24
    LAYERMEND_DATA=... python benchmarks/localize.py report
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faults
import numpy as np
import torch
from results_file import configuration, print_table, write_results

from audit.evidence import LayerEvidence, gather_evidence
from audit.networks.program import Program
from audit.verdict import ONSET_THRESHOLD, drift_origin

TUNED_ON = (5, 100)
SEEDS = {"plant": 200, "healthy": 300}
SCANNED = 256
TRIES = 3
PUBLISHED = ("gradient_norm", "auto_rgn", "auto_snr")
SCORES = ("random", "last_conv", "deepest_first", *PUBLISHED, "bn_drift", "bn_drift_onset")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["plant", "healthy", "report"])
    parser.add_argument("scenes", nargs="*", metavar="NETWORK", default=[])
    parser.add_argument("--work", type=Path, default=Path("local/localize"))
    parser.add_argument("--faults", type=int, default=24, help="planted in each network")
    parser.add_argument("--draws", type=int, default=10, help="healthy draws of each network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = options.work / "rows.jsonl"
    for name in options.scenes:
        if options.action == "plant":
            _plant(name, options.work, rows, options.faults)
        else:
            _healthy(name, options.work, rows, options.draws)
    if options.action == "report":
        _report(_read(rows))


def _plant(name: str, work: Path, rows: Path, count: int) -> None:
    done = {row["id"] for row in _read(rows)}
    where = faults.scene(name, work)
    layers = [layer.name for layer in where.program.layers]
    for at in range(count):
        kind = faults.KINDS[at % len(faults.KINDS)]
        seed = SEEDS["plant"] + at
        draw = np.random.default_rng([seed, faults.SCENES.index(name)]).permutation(layers)
        for tried, layer in enumerate(draw[:TRIES]):
            identity = f"{name}-{kind}-{seed}-{tried}"
            if identity not in done:
                started = time.perf_counter()
                fault = faults.plant(where, str(layer), kind, seed=seed)
                planted_s = time.perf_counter() - started
                row = _row(where.program.with_state(fault.state), where, kind, seed, fault)
                _append(rows, {"id": identity, **row, "planted_s": round(planted_s, 1)})
            if _find(rows, identity)["took"]:
                break


def _healthy(name: str, work: Path, rows: Path, draws: int) -> None:
    """The network as it is, on other photographs each time, in turn with no mark and with one."""
    done = {row["id"] for row in _read(rows)}
    training_seeds = (0,) if name == "efficientnet" else (0, 1)
    for training_seed in training_seeds:
        where = faults.scene(name, work, training_seed=training_seed)
        for at in range(draws):
            seed, kind = SEEDS["healthy"] + at, ("none", "watermark", "border")[at % 3]
            identity = f"{name}-healthy-{kind}-{training_seed}-{seed}"
            if identity not in done:
                row = _row(where.program, where, kind, seed, None)
                _append(rows, {"id": identity, **row, "training_seed": training_seed})


def _row(
    program: Program, where: faults.Scene, kind: str, seed: int, fault: faults.Fault | None
) -> dict[str, Any]:
    pool = faults.presented(where.scanned, kind, seed=seed)
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(pool.labels))[:SCANNED])
    scanned = pool.rows(chosen)
    started = time.perf_counter()
    batches = zip(scanned.images.split(32), scanned.labels.split(32), strict=True)
    evidence = gather_evidence(program, batches, list(program.layers), seed=seed)
    origin = drift_origin(evidence)
    row: dict[str, Any] = {
        "network": where.name,
        "kind": kind,
        "seed": seed,
        "evidence_s": round(time.perf_counter() - started, 2),
        "named": origin.layer.name if origin else None,
        "highest_onset": _highest(evidence),
    }
    if fault is None:
        return {**row, "took": False, "planted": None}
    scores = _scores(evidence, seed)
    at = next(i for i, one in enumerate(evidence) if one.layer.name == fault.layer)
    ranks = {score: _rank(values, at) for score, values in scores.items()}
    return {
        **row,
        "planted": fault.layer,
        "depth": round(at / max(len(evidence) - 1, 1), 3),
        "layers": len(evidence),
        "severity": fault.severity,
        "took": fault.took,
        "healthy_accuracy": fault.healthy_accuracy,
        "faulty_accuracy": fault.faulty_accuracy,
        "clean_accuracy": fault.clean_accuracy,
        "marked_accuracy": None if math.isnan(fault.marked_accuracy) else fault.marked_accuracy,
        "onset": _number(evidence[at].drift_onset),
        **{f"rank_{score}": rank for score, rank in ranks.items()},
    }


def _scores(evidence: Sequence[LayerEvidence], seed: int) -> dict[str, list[float]]:
    convolutions = [i for i, one in enumerate(evidence) if one.layer.has_maps]
    return {
        "random": np.random.default_rng(seed).random(len(evidence)).tolist(),
        "last_conv": [float(i == convolutions[-1]) for i in range(len(evidence))],
        "deepest_first": [float(i) for i in range(len(evidence))],
        "gradient_norm": [one.gradient_norm for one in evidence],
        "auto_rgn": [one.relative_gradient_norm for one in evidence],
        "auto_snr": [one.gradient_snr for one in evidence],
        "bn_drift": [one.drift for one in evidence],
        "bn_drift_onset": [one.drift_onset for one in evidence],
    }


def _rank(values: Sequence[float], at: int) -> int:
    """Return the planted layer's rank, 1 the highest; ties count against it, NaN is lowest."""
    known = [-math.inf if math.isnan(value) else value for value in values]
    return sum(value >= known[at] for value in known)


def _highest(evidence: Sequence[LayerEvidence]) -> float | None:
    inner = [one.drift_onset for one in evidence if not one.first_in_line]
    return _number(max(inner, default=math.nan))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


# ----------------------------------------------------------------------------------- report


def _report(rows: Sequence[Mapping[str, Any]]) -> None:
    counted = [row for row in rows if row["took"]]
    without = [row for row in rows if not row["took"]]
    groups = {
        "weight": [row for row in counted if row["kind"] in faults.WEIGHT_KINDS],
        "learned": [row for row in counted if row["kind"] in faults.LEARNED_KINDS],
    }
    for network in dict.fromkeys(row["network"] for row in counted):
        for kind in faults.KINDS:
            chosen = [r for r in counted if (r["network"], r["kind"]) == (network, kind)]
            if chosen:
                groups[f"{network}, {kind}"] = chosen
    table = [
        {"faults": name, "n": len(chosen), "score": score, **_hits(chosen, score)}
        for name, chosen in groups.items()
        if chosen
        for score in (SCORES if name in ("weight", "learned") else ("auto_snr", "bn_drift_onset"))
    ]
    print_table("Rank of the planted layer", table)
    healthy = [row for row in without if row["planted"] is None]
    harmless = [row for row in without if row["planted"] is not None]
    summary: dict[str, float] = {
        "faults": len(counted),
        "healthy_draws": len(healthy),
        "healthy_named": sum(row["named"] is not None for row in healthy),
        "harmless": len(harmless),
        "harmless_named": sum(row["named"] is not None for row in harmless),
        "named_right": sum(row["named"] == row["planted"] for row in counted),
        "named_wrong": sum(row["named"] not in (None, row["planted"]) for row in counted),
    }
    for name in ("weight", "learned"):
        if groups[name]:
            best = max(_hits(groups[name], score)["top1"] for score in PUBLISHED)
            summary |= {f"n_{name}": len(groups[name]), f"best_published_top1_{name}": best}
            own = _hits(groups[name], "bn_drift_onset")
            summary |= {f"onset_{key}_{name}": value for key, value in own.items()}
    print_table("Summary", [summary])
    config = configuration(
        "cpu",
        "timm",
        seeds=SEEDS,
        tuned_on=TUNED_ON,
        scanned=SCANNED,
        onset_threshold=ONSET_THRESHOLD,
        efficientnet_size=faults.EFFICIENTNET_SIZE,
    )
    print(write_results("localize", summary=summary, config=config, rows=rows))


def _hits(rows: Sequence[Mapping[str, Any]], score: str) -> dict[str, float]:
    ranks = np.array([row[f"rank_{score}"] for row in rows], dtype=float)
    return {
        "top1": round(float((ranks == 1).mean()), 3),
        "top3": round(float((ranks <= 3).mean()), 3),
        "mrr": round(float((1 / ranks).mean()), 3),
    }


def _read(rows: Path) -> list[dict[str, Any]]:
    if not rows.exists():
        return []
    return [json.loads(line) for line in rows.read_text().splitlines()]


def _find(rows: Path, identity: str) -> dict[str, Any]:
    return next(row for row in _read(rows) if row["id"] == identity)


def _append(rows: Path, row: Mapping[str, Any]) -> None:
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print({key: row.get(key) for key in ("id", "planted", "took", "onset", "named")}, flush=True)


if __name__ == "__main__":
    main()
