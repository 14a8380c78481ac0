"""Which layer is at fault? Every score, and the verdict of `audit scan`, on planted faults.

Faults of seven kinds (`faults.py`) are planted in layers drawn at random. Photographs that neither
training nor planting used are then scanned as `audit scan` does: evidence, trials, blame, verdict.
Every score ranks the layers; ties count against the score, and a layer without a score ranks last.
Healthy networks, and faults too small to count, stand in rows of their own: how often they are
called faulty. Drift, the published score too, is looked at where the scan looks at it: without the
artefact that failures share. Full repairs of every layer (`full_repairs.py`) say what a wrong
choice costs.

Rows are kept as they come in WORK/rows.jsonl, and a run goes on where the last one stopped. What
the product holds fixed was chosen on the seeds of TUNING alone, with `--tuning`, which keeps its
rows in WORK/tuning.jsonl; `fit` prints the weights of the blame that those rows give.

    LAYERMEND_DATA=... python benchmarks/localize.py plant efficientnet resnet vgg --faults 28
    LAYERMEND_DATA=... python benchmarks/localize.py healthy efficientnet resnet vgg --draws 10
    LAYERMEND_DATA=... python benchmarks/localize.py healthy resnet vgg --draws 15 --unmarked
    LAYERMEND_DATA=... python benchmarks/localize.py repair resnet vgg --faults 12
    LAYERMEND_DATA=... python benchmarks/localize.py speed efficientnet resnet vgg
    LAYERMEND_DATA=... python benchmarks/localize.py report
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import faults
import full_repairs
import localize_report
import numpy as np
import safetensors.torch
import torch
from failures import Shared, what_failures_share, without_artefacts

from audit.blame import has_memory, layer_features, promising, shares_of_blame
from audit.evidence import LayerEvidence, gather_evidence
from audit.moves import ChannelMove, MoveConfig, channel_moves
from audit.networks.program import Program
from audit.trials import (
    CHANNEL_TRIAL,
    TrialConfig,
    TrialRepair,
    error_share_removed,
    ranking,
    trial_repairs,
)
from audit.verdict import drift_origin, judge

TUNING = {"plant": 100, "healthy": 400}
SEEDS = {"plant": 500, "healthy": 600}
ALSO_SEEN = (200, 205)  # silent channels joined the blame beside batch norm after these rows
SCANNED, LEARNING = 256, 64
TRIES = 3
SPEED_SEEDS, SPEED_FAULTS = (500, 700), 3  # so many faults of each network from each seed on
TRIAL = TrialConfig()
BUDGETS_S = {"efficientnet": 75.0}  # on one core; the small networks need none
MOVES_BUDGETS_S = {"efficientnet": 75.0}
ONE_STEP = TrialConfig(rounds=(1,))

TrialImages = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
BesideTrials = tuple[list[LayerEvidence], list[TrialRepair], list[ChannelMove]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    actions = {"plant": _plant, "healthy": _healthy, "repair": _repair, "speed": _speed}
    parser.add_argument("action", choices=[*actions, "fit", "report"])
    parser.add_argument("scenes", nargs="*", metavar="NETWORK", default=[])
    parser.add_argument("--work", type=Path, default=Path("local/localize"))
    parser.add_argument("--faults", type=int, default=28, help="planted in each network")
    parser.add_argument(
        "--kinds", nargs="+", choices=faults.KINDS, default=faults.KINDS, help="of those faults"
    )
    parser.add_argument("--draws", type=int, default=10, help="healthy draws of each network")
    parser.add_argument("--unmarked", action="store_true", help="healthy draws without marks")
    parser.add_argument("--naive", type=int, default=SPEED_FAULTS, help="faults also tried naively")
    parser.add_argument(
        "--training-seed", type=int, default=0, help="of the small networks that faults go into"
    )
    parser.add_argument("--tuning", action="store_true", help="on the seeds for tuning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.rows = options.work / ("tuning.jsonl" if options.tuning else "rows.jsonl")
    options.seeds = TUNING if options.tuning else SEEDS
    for name in options.scenes:
        actions[options.action](name, options)
    if options.action == "fit":
        localize_report.fit(_read(options.rows))
    if options.action == "report":
        localize_report.report(
            _read(options.rows),
            work=options.work,
            seeds=SEEDS,
            also_seen=ALSO_SEEN,
            tuned_on=TUNING,
            scanned=SCANNED,
            learning=LEARNING,
            efficientnet_size=faults.EFFICIENTNET_SIZE,
            border=faults.BORDER,
        )


def _plant(name: str, options: argparse.Namespace) -> None:
    done = {row["id"]: row for row in _read(options.rows)}
    where = faults.scene(name, options.work, training_seed=options.training_seed)
    again = f"-training-{options.training_seed}" if options.training_seed else ""
    layers = [layer.name for layer in where.program.layers]
    for at in range(options.faults):
        kind = faults.KINDS[at % len(faults.KINDS)]
        if kind not in options.kinds:
            continue
        seed = options.seeds["plant"] + at
        for tried, layer in enumerate(_draw(where, layers, seed)):
            identity = f"{name}-{kind}-{seed}-{tried}{again}"
            if identity not in done:
                started = time.perf_counter()
                fault = faults.plant(where, layer, kind, seed=seed)
                planted_s = round(time.perf_counter() - started, 1)
                if fault.took:
                    _keep(options.work, identity, fault.state)
                done[identity] = {
                    "id": identity,
                    "planted_s": planted_s,
                    "training_seed": options.training_seed,
                    **_described(where, kind, seed, fault),
                    **scan_result(where.program.with_state(fault.state), where, kind, seed, fault),
                }
                _append(options.rows, done[identity])
            if done[identity]["took"]:
                break


def _draw(where: faults.Scene, layers: Sequence[str], seed: int) -> list[str]:
    """Return the layers to try a fault in, in turn."""
    generator = np.random.default_rng([seed, faults.SCENES.index(where.name)])
    return [str(layer) for layer in generator.permutation(layers)[:TRIES]]


def _healthy(name: str, options: argparse.Namespace) -> None:
    """The network as it is, on other photographs each time, in turn with no mark and with one.

    With `--unmarked` there is never one.
    """
    kinds = ("none",) if options.unmarked else ("none", "watermark", "border")
    done = {row["id"] for row in _read(options.rows)}
    training_seeds = (0,) if name == "efficientnet" else (0, 1)
    for training_seed in training_seeds:
        where = faults.scene(name, options.work, training_seed=training_seed)
        for at in range(options.draws):
            seed, kind = options.seeds["healthy"] + at, kinds[at % len(kinds)]
            identity = f"{name}-healthy-{kind}-{training_seed}-{seed}"
            if identity not in done:
                row = {"id": identity, "network": name, "kind": kind, "seed": seed}
                row |= {"took": False, "planted": None, "training_seed": training_seed}
                _append(options.rows, row | scan_result(where.program, where, kind, seed, None))


def _repair(name: str, options: argparse.Namespace) -> None:
    """Repair every layer in full, of the first faults that took of every kind."""
    rows = [
        row
        for row in _read(options.rows)
        if (row["network"], row.get("training_seed", 0)) == (name, options.training_seed)
        and row["took"]
    ]
    kept = options.rows.with_name("repairs.jsonl")
    done = {row["id"] for row in _read(kept)}
    where = faults.scene(name, options.work, training_seed=options.training_seed)
    for row in sorted(rows, key=lambda row: row["seed"])[: options.faults]:
        if row["id"] not in done:
            state = safetensors.torch.load_file(_path(options.work, row["id"]))
            started = time.perf_counter()
            right = full_repairs.accuracies(
                where.program.with_state(state), where, row["kind"], seed=row["seed"]
            )
            spent = round(time.perf_counter() - started, 1)
            found = {"id": row["id"], "network": name, "accuracies": right, "repairs_s": spent}
            _append(kept, found)


def _speed(name: str, options: argparse.Namespace) -> None:
    """Compare trials by rounds with trials that drop no layer, and with naive ones.

    Those that drop none choose as naive ones do (`tests/audit/test_trials.py` compares each with a
    plain loop), so that the naive ones, which take longest, are only made of the first `--naive`
    faults from each seed on. The trials' choice is the layer whose trial leaves least; another one
    is a tie where the bootstrap of what the right one's trial removes of the other's error includes
    nothing. The scan's choice is the layer with most of the blame, in which trials are one part.
    Seconds are the process's own on its one thread, so that other work does not count.
    """
    kept = options.work / "speed.jsonl"
    done = {row["id"] for row in _read(kept)}
    where = faults.scene(name, options.work)
    for first_seed in SPEED_SEEDS:
        chosen = islice(_taken(where, first_seed), min(options.faults, SPEED_FAULTS))
        for at, (identity, kind, seed, fault) in enumerate(chosen):
            if identity not in done:
                program = where.program.with_state(fault.state)
                given = _trial_images(program, where, kind, seed)
                found = {"id": identity, "network": name, "planted": fault.layer}
                beside = _beside_trials(program, where, kind, seed, given)
                found |= _compared(program, given, seed, beside, naively=at < options.naive)
                _append(kept, found)


def _taken(where: faults.Scene, first_seed: int) -> Iterator[tuple[str, str, int, faults.Fault]]:
    """Yield faults that took, drawn as `plant` draws them, from a seed on."""
    layers = [layer.name for layer in where.program.layers]
    for at in count():
        kind, seed = faults.KINDS[at % len(faults.KINDS)], first_seed + at
        for tried, layer in enumerate(_draw(where, layers, seed)):
            fault = faults.plant(where, layer, kind, seed=seed)
            if fault.took:
                yield f"{where.name}-{kind}-{seed}-{tried}", kind, seed, fault
                break


def _beside_trials(
    program: Program, where: faults.Scene, kind: str, seed: int, given: TrialImages
) -> BesideTrials:
    """Return what a scan blames a layer by beside the trials of its weights: evidence, trials of
    the channels, and moves."""
    scanned = _drawn(where, kind, seed)
    evidence, _ = _of_plain_photos(
        _evidence(program, scanned, seed),
        program,
        scanned,
        what_failures_share(program, scanned),
    )
    channels: list[TrialRepair] = []
    if not has_memory(evidence):
        channels = trial_repairs(program, *given, program.layers, CHANNEL_TRIAL, seed=seed)
    moves = channel_moves(program, *given, program.layers, MoveConfig(), seed=seed)
    return evidence, channels, moves


def _compared(
    program: Program,
    given: TrialImages,
    seed: int,
    beside: BesideTrials,
    *,
    naively: bool,
) -> dict[str, Any]:
    images, labels, held_out, held_out_labels = given
    found: list[list[TrialRepair]] = []
    seconds: list[float] = []
    for config in (TRIAL, replace(TRIAL, keep=1.0)):
        started = time.process_time()
        found.append(
            trial_repairs(
                program,
                images,
                labels,
                held_out,
                held_out_labels,
                program.layers,
                config,
                seed=seed,
            )
        )
        seconds.append(round(time.process_time() - started, 2))
    own, whole = found
    chosen, best = (ranking(trials)[0].layer.name for trials in found)
    left = {trial.layer.name: trial.cross_entropies_after for trial in whole}
    lead = error_share_removed(left[chosen], left[best], seed=seed)
    evidence, channels, moves = beside
    shares = [shares_of_blame(evidence, trials, channels, moves) for trials in found]
    blamed, blamed_of_all = (max(of, key=lambda name: of[name]) for of in shares)
    row = {
        "layers": len(whole),
        "chosen": chosen,
        "choice_of_all": best,
        "same_choice": chosen == best,
        "tied": chosen != best and lead.low <= 0,
        "blamed": blamed,
        "same_blamed": blamed == blamed_of_all,
        "in_last_round": best in {t.layer.name for t in own if t.steps == TRIAL.rounds[-1]},
        "gain_lost": round(
            float((left[chosen] - left[best]).sum() / whole[0].cross_entropies_before.sum()), 4
        ),
        "lead": [round(value, 4) for value in (lead.value, lead.low, lead.high)],
        "gains": {t.layer.name: [round(gain, 4) for gain in t.gains] for t in whole},
        "ours_s": seconds[0],
        "all_s": seconds[1],
    }
    if naively:
        started = time.process_time()
        after = full_repairs.naive_trials(program, *given, TRIAL, seed=seed)
        row["naive_s"] = round(time.process_time() - started, 2)
        row["naive_choice"] = min(after, key=lambda name: float(after[name][-1].sum()))
    return row


# ----------------------------------------------------------------------------------- one row


def _described(where: faults.Scene, kind: str, seed: int, fault: faults.Fault) -> dict[str, Any]:
    names = [layer.name for layer in where.program.layers]
    at = names.index(fault.layer)
    return {
        "network": where.name,
        "kind": kind,
        "seed": seed,
        "planted": fault.layer,
        "depth": round(at / max(len(names) - 1, 1), 3),
        "severity": fault.severity,
        "took": fault.took,
        "harmless": fault.healthy_accuracy - fault.faulty_accuracy < faults.MINIMUM_COST,
        "healthy_accuracy": fault.healthy_accuracy,
        "faulty_accuracy": fault.faulty_accuracy,
        "clean_accuracy": fault.clean_accuracy,
        "marked_accuracy": None if math.isnan(fault.marked_accuracy) else fault.marked_accuracy,
    }


def _drawn(where: faults.Scene, kind: str, seed: int) -> faults.Pool:
    pool = faults.presented(where.scanned, kind, seed=seed)
    # Another stream than that of the marks: half of the photographs scanned are to carry one.
    order = np.random.default_rng([seed, SCANNED]).permutation(len(pool.labels))[:SCANNED]
    return pool.rows(torch.from_numpy(order))


def _trial_images(program: Program, where: faults.Scene, kind: str, seed: int) -> TrialImages:
    """Return learning images with labels and held-out ones, wrong ones shared as a scan does."""
    scanned = _drawn(where, kind, seed)
    with torch.no_grad():
        said = torch.cat([program.logits(part).argmax(dim=1) for part in scanned.images.split(64)])
    order = np.random.default_rng(seed).permutation(SCANNED)
    right = (said == scanned.labels).numpy()[order]
    wrong_ones, right_ones = order[~right], order[right]
    share = min(LEARNING // 2, len(wrong_ones) // 3)
    learning = np.concatenate([wrong_ones[:share], right_ones[: LEARNING - share]])
    judging = np.setdiff1d(order, learning)
    one, other = (scanned.rows(torch.from_numpy(rows)) for rows in (learning, judging))
    return one.images, one.labels, other.images, other.labels


def scan_result(
    program: Program, where: faults.Scene, kind: str, seed: int, fault: faults.Fault | None
) -> dict[str, Any]:
    """Return what a scan finds; of a fault that took, every score's rank of its layer too."""
    scanned = _drawn(where, kind, seed)
    started = time.perf_counter()
    evidence = _evidence(program, scanned, seed)
    evidence_s = time.perf_counter() - started
    shared = what_failures_share(program, scanned)
    evidence, plain = _of_plain_photos(evidence, program, scanned, shared)
    given = _trial_images(program, where, kind, seed)
    origin = drift_origin(evidence)
    favored = () if origin is None else (origin.layer.name,)
    started = time.perf_counter()
    moves = channel_moves(
        program,
        *given,
        program.layers,
        MoveConfig(budget_s=MOVES_BUDGETS_S.get(where.name)),
        seed=seed,
    )
    moves_s = time.perf_counter() - started
    started = time.perf_counter()
    trials = trial_repairs(
        program,
        *given,
        program.layers,
        replace(TRIAL, budget_s=BUDGETS_S.get(where.name)),
        seed=seed,
        promising=promising(evidence, moves),
        favored=favored,
    )
    channels: list[TrialRepair] = []
    if not has_memory(evidence):
        channels = trial_repairs(program, *given, program.layers, CHANNEL_TRIAL, seed=seed)
    trials_s = time.perf_counter() - started
    with torch.no_grad():
        said = torch.cat([program.logits(part).argmax(dim=1) for part in given[2].split(64)])
    verdict = judge(
        trials,
        evidence,
        channels,
        moves,
        wrong=int((said != given[3]).sum()),
        images=len(given[3]),
        artefacts=shared.called_alike,
        plain=plain,
    )
    shares = shares_of_blame(evidence, trials, channels, moves)
    best = ranking(trials)[0].gain
    row: dict[str, Any] = {
        "layers": len(evidence),
        "tried": len(trials),
        "evidence_s": round(evidence_s, 2),
        "artefacts": len(shared.artefacts),
        "plain_photos": plain,
        "trials_s": round(trials_s, 2),
        "moves_s": round(moves_s, 2),
        "verdict": verdict.verdict,
        "named": list(verdict.layers),
        "confidence": verdict.confidence,
        "wrong": verdict.numbers["held_out_wrong"],
        "best_gain": [round(value, 4) for value in (best.value, best.low, best.high)],
        "highest_onset": _highest(evidence),
        "most_silent": round(max(one.silent_channels for one in evidence), 3),
        "first_blamed": max(shares, key=lambda name: shares[name]),
        "flagged": verdict.flagged,
        "first_by_trial": ranking(trials)[0].layer.name,
    }
    if fault is None or not fault.took:
        return row
    names = [one.layer.name for one in evidence]
    at = names.index(fault.layer)
    scores = _scores(evidence, trials, channels, moves, shares, seed)
    if where.name not in BUDGETS_S:
        first = trial_repairs(program, *given, program.layers, ONE_STEP, seed=seed)
        scores["one_step_trial"] = [trial.gain.value for trial in first]
    features: dict[str, Any] = {"memory": has_memory(evidence)}
    for name, values in layer_features(evidence, trials, channels, moves).items():
        features[name] = [round(value, 4) for value in values]
    return {
        **row,
        "at": at,
        "share": round(shares[fault.layer], 4),
        "covered": fault.layer in verdict.layers,
        "features": features,
        **{f"rank_{score}": _rank(values, at) for score, values in scores.items()},
    }


def _evidence(program: Program, scanned: faults.Pool, seed: int) -> list[LayerEvidence]:
    batches = zip(scanned.images.split(32), scanned.labels.split(32), strict=True)
    return gather_evidence(program, batches, list(program.layers), seed=seed)


def _of_plain_photos(
    evidence: list[LayerEvidence], program: Program, scanned: faults.Pool, shared: Shared
) -> tuple[list[LayerEvidence], int | None]:
    """Return the evidence with the drift of photos without what failures share, where a batch norm
    tells drift, and how many those are."""
    if not has_memory(evidence):
        return evidence, None
    return without_artefacts(evidence, program, scanned, shared.artefacts)


def _scores(
    evidence: Sequence[LayerEvidence],
    trials: Sequence[TrialRepair],
    channels: Sequence[TrialRepair],
    moves: Sequence[ChannelMove],
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, list[float]]:
    names = [one.layer.name for one in evidence]
    convolutions = [i for i, one in enumerate(evidence) if one.layer.has_maps]
    scores = {
        "random": np.random.default_rng(seed).random(len(evidence)).tolist(),
        "last_conv": [float(i == convolutions[-1]) for i in range(len(evidence))],
        "deepest_first": [float(i) for i in range(len(evidence))],
        "gradient_norm": [one.gradient_norm for one in evidence],
        "auto_rgn": [one.relative_gradient_norm for one in evidence],
        "auto_snr": [one.gradient_snr for one in evidence],
        "fisher": [_fisher(one) for one in evidence],
        "bn_drift": [one.drift for one in evidence],
    }
    inner = [math.nan if one.first_in_line else one.drift_onset for one in evidence]
    cheap = {
        **{key: scores[key] for key in ("auto_rgn", "auto_snr")},
        "agreement": [one.gradient_agreement for one in evidence],
        "conflict": [one.gradient_conflict for one in evidence],
        "onset": inner,
        "silent": [one.silent_channels or math.nan for one in evidence],
    }
    scores["cheap_combined"] = [
        sum(1 / _rank(values, i) for values in cheap.values()) for i in range(len(names))
    ]
    scores["onset"] = inner
    features = layer_features(evidence, trials, channels)
    scores["weight_trial"], scores["channel_trial"] = features["trial"], features["channels"]
    by_moves = {one.layer.name: one.gain.value for one in moves if one.move}
    scores["channel_moves"] = [by_moves.get(name, math.nan) for name in names]
    scores["weight_norm"] = [one.norm_outlier for one in evidence]
    scores["ours"] = [shares[name] for name in names]
    return scores


def _fisher(one: LayerEvidence) -> float:
    """Mean squared norm of an image's gradient: the trace of the empirical Fisher matrix."""
    signal = one.gradient_norm**2
    noise = signal / one.gradient_snr if one.gradient_snr > 0 else 0.0
    return signal + noise * (SCANNED - 1) / SCANNED


def _rank(values: Sequence[float], at: int) -> int:
    """Return the planted layer's rank, 1 the highest; ties count against it, NaN is lowest."""
    known = [-math.inf if math.isnan(value) else value for value in values]
    return sum(value >= known[at] for value in known)


def _highest(evidence: Sequence[LayerEvidence]) -> float | None:
    inner = [one.drift_onset for one in evidence if not one.first_in_line]
    highest = max((value for value in inner if not math.isnan(value)), default=math.nan)
    return None if math.isnan(highest) else round(highest, 4)


# ----------------------------------------------------------------------------------- files


def _path(work: Path, identity: str) -> Path:
    return work / "planted" / f"{identity}.safetensors"


def _keep(work: Path, identity: str, state: Mapping[str, torch.Tensor]) -> None:
    path = _path(work, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: v.contiguous() for name, v in state.items()}, path)


def _read(rows: Path) -> list[dict[str, Any]]:
    if not rows.exists():
        return []
    return [json.loads(line) for line in rows.read_text().splitlines()]


def _append(rows: Path, row: Mapping[str, Any]) -> None:
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    told = (
        "id",
        "planted",
        "took",
        "verdict",
        "first_blamed",
        "rank_ours",
        "trials_s",
        "repairs_s",
    )
    print({key: row[key] for key in told if key in row}, flush=True)


if __name__ == "__main__":
    main()
