"""Tables and the results file of `localize.py`, and the fit of the weights of blame."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faults
import numpy as np
from results_file import configuration, print_table, read_rows, write_results
from scipy.optimize import minimize

from audit.verdict import BLAME_LEVEL, CHANGED_THRESHOLD, FLAG_THRESHOLD, ONSET_THRESHOLD

Row = Mapping[str, Any]

PUBLISHED = ("gradient_norm", "auto_rgn", "auto_snr", "fisher", "bn_drift")
SCORES = (
    *("random", "last_conv", "deepest_first", *PUBLISHED),
    *("cheap_combined", "onset", "one_step_trial", "weight_trial", "channel_trial"),
    *("channel_moves", "weight_norm", "ours"),
)
RIDGE = 0.1


def report(rows: Sequence[Row], *, work: Path = Path("local/localize"), **settings: Any) -> None:
    """Print the tables and write ``results/localize.json``.

    Rows that stand there already stay unless there are newer ones of the same id.
    """
    rows = _with_committed(rows, None)
    counted = [row for row in rows if row["took"]]
    groups = {
        "all": counted,
        "weight": [row for row in counted if row["kind"] in faults.WEIGHT_KINDS],
        "learned": [row for row in counted if row["kind"] in faults.LEARNED_KINDS],
    }
    for network in faults.SCENES:
        for name in ("weight", "learned"):
            own = [row for row in groups[name] if row["network"] == network]
            groups[f"{network}, {name}"] = own
    groups = {name: chosen for name, chosen in groups.items() if chosen}
    tables = [
        {"faults": name, "n": len(chosen), "score": score, **_hits(chosen, score)}
        for name, chosen in groups.items()
        for score in SCORES
    ]
    print_table("Rank of the planted layer, by score", tables)
    kinds = [
        {"network": network, "kind": kind, "n": len(chosen), **_verdicts(chosen)}
        for network in faults.SCENES
        for kind in faults.KINDS
        if (chosen := [r for r in counted if (r["network"], r["kind"]) == (network, kind)])
    ]
    print_table("The verdict, by network and kind", kinds)
    none_taken = [r for r in rows if r["planted"] is not None and not r["took"]]
    listed = [
        {key: r[key] for key in ("id", "planted", "faulty_accuracy", "clean_accuracy")}
        | {"marked_accuracy": r["marked_accuracy"], "harmless": r["harmless"]}
        for r in none_taken
    ]
    print_table("Faults that did not take", listed)
    alarms = _alarms(rows)
    print_table("Called faulty: healthy networks and harmless faults", alarms)
    repairs = _with_committed(_lines(work / "repairs.jsonl"), "full repairs")
    speeds = _with_committed(_lines(work / "speed.jsonl"), "speed")
    regrets = _regrets(repairs, counted)
    if regrets:
        print_table("Regret, in accuracy, of repairing the layer that a score names", regrets)
    if speeds:
        told = [{k: v for k, v in row.items() if k not in ("gains", "lead")} for row in speeds]
        print_table("Trials by rounds beside all of them, and naive ones", told)
    summary = _summary(groups, rows, regrets, speeds)
    print_table("Summary", [{"name": name, "value": value} for name, value in summary.items()])
    config = configuration(
        "cpu",
        "timm",
        **settings,
        onset_threshold=ONSET_THRESHOLD,
        flag_threshold=FLAG_THRESHOLD,
        changed_threshold=CHANGED_THRESHOLD,
        blame_level=BLAME_LEVEL,
    )
    kept = [{k: v for k, v in row.items() if k != "features"} for row in rows]
    kept += [{"what": "full repairs", **row} for row in repairs]
    kept += [{"what": "speed", **row} for row in speeds]
    print(write_results("localize", summary=summary, config=config, rows=kept))


def _summary(
    groups: Mapping[str, Sequence[Row]],
    rows: Sequence[Row],
    regrets: Sequence[Row],
    speeds: Sequence[Row],
) -> dict[str, float]:
    counted, healthy = groups["all"], _not_faulty(rows)
    summary: dict[str, float] = {"faults": len(counted)}
    for name in ("weight", "learned"):
        chosen = groups.get(name, [])
        if not chosen:
            continue
        own = _hits(chosen, "ours")
        verdicts = _verdicts(chosen)
        best = {at: max(_hits(chosen, s)[at] for s in PUBLISHED) for at in ("top1", "top3")}
        summary |= {
            f"n_{name}": len(chosen),
            f"top1_{name}": own["top1"],
            f"top3_{name}": own["top3"],
            f"mrr_{name}": own["mrr"],
            f"best_published_top1_{name}": best["top1"],
            f"best_published_top3_{name}": best["top3"],
            f"covered_{name}": verdicts["covered"],
            f"set_share_{name}": verdicts["set_share"],
            f"none_{name}": verdicts["none"],
        }
    summary["mrr"] = _hits(counted, "ours")["mrr"]
    summary["best_published_top1"] = max(_hits(counted, score)["top1"] for score in PUBLISHED)
    summary["healthy_draws"] = len(healthy)
    # On marked photographs a trial does repair something, though no layer was damaged.
    for name, marked in (("false_alarm_rate", False), ("called_faulty_on_marks", True)):
        own = [row for row in healthy if _on_marks(row) == marked]
        called = [row["verdict"] != "none" for row in own]
        summary[f"{name}_of"] = len(own)
        summary[name] = round(float(np.mean(called)), 3) if called else float("nan")
    own_regret = [row for row in regrets if (row["faults"], row["score"]) == ("all", "ours")]
    if own_regret:
        summary["median_regret"] = own_regret[0]["median"]
        summary["p90_regret"] = own_regret[0]["p90"]
        summary["repaired_faults"] = own_regret[0]["n"]
    if speeds:
        ratios = [row["naive_s"] / row["ours_s"] for row in speeds if "naive_s" in row]
        summary["trial_speedup"] = round(float(np.median(ratios)), 2)
        for name in ("same_choice", "tied", "same_blamed"):
            known = [row[name] for row in speeds if name in row]
            if known:
                summary[f"trial_{name}"] = round(float(np.mean(known)), 3)
        summary["trial_compared"] = len(speeds)
    cost = Path(__file__).parent / "results" / "evidence_cost.json"
    if cost.exists():
        summary["evidence_cost"] = json.loads(cost.read_text())["summary"]["largest_ratio"]
    return summary


def _hits(rows: Sequence[Row], score: str) -> dict[str, float]:
    known = [row for row in rows if f"rank_{score}" in row]  # of some networks it would take hours
    if not known:
        return {"ranked": 0, "top1": float("nan"), "top3": float("nan"), "mrr": float("nan")}
    ranks = np.array([row[f"rank_{score}"] for row in known], dtype=float)
    return {
        "ranked": len(known),
        "top1": round(float((ranks == 1).mean()), 3),
        "top3": round(float((ranks <= 3).mean()), 3),
        "mrr": round(float((1 / ranks).mean()), 3),
    }


def _verdicts(rows: Sequence[Row]) -> dict[str, float]:
    """``covered`` counts a verdict of none as a miss; ``set_share`` is the median of the others."""
    shares = [len(row["named"]) / row["layers"] for row in rows if row["named"]]
    return {
        **_hits(rows, "ours"),
        "localized": round(float(np.mean([row["verdict"] == "localized" for row in rows])), 3),
        "none": round(float(np.mean([row["verdict"] == "none" for row in rows])), 3),
        "covered": round(float(np.mean([row["covered"] for row in rows])), 3),
        "set_share": round(float(np.median(shares)), 3) if shares else float("nan"),
        "evidence_s": round(float(np.median([row["evidence_s"] for row in rows])), 1),
        "trials_s": round(float(np.median([row["trials_s"] for row in rows])), 1),
    }


def _not_faulty(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if not r["took"] and (r["planted"] is None or r["harmless"])]


def _on_marks(row: Row) -> bool:
    """Whether photographs with marks were scanned: where a network is wrong about a mark it was
    never shown, a trial repairs that, whether or not a layer was taught the mark as well."""
    return row["kind"] in ("watermark", "border")


def _alarms(rows: Sequence[Row]) -> list[dict[str, Any]]:
    tables = []
    for network in faults.SCENES:
        for name, planted, marked in (
            ("healthy", False, False),
            ("healthy, on marks", False, True),
            ("harmless", True, False),
            ("harmless, on marks", True, True),
        ):
            own = [
                row
                for row in _not_faulty(rows)
                if row["network"] == network
                and (row["planted"] is not None, _on_marks(row)) == (planted, marked)
            ]
            if own:
                called = [row["verdict"] != "none" for row in own]
                lows = [row["best_gain"][1] for row in own]
                tables.append(
                    {
                        "network": network,
                        "what": name,
                        "n": len(own),
                        "called_faulty": sum(called),
                        "largest_gain_low": round(max(lows), 3),
                    }
                )
    return tables


def to_repair(row: Row) -> str:
    """Return the layer that a row's verdict says to repair; the most blamed one where it names
    none, and of rows from before verdicts said it."""
    return str(row.get("flagged") or row["first_blamed"])


def _regrets(repairs: Sequence[Row], counted: Sequence[Row]) -> list[dict[str, Any]]:
    known = {row["id"]: row for row in counted}
    found: list[dict[str, Any]] = []
    for row in repairs:
        if row["id"] not in known:
            continue
        fault = known[row["id"]]
        right = {name: value for name, value in row["accuracies"].items() if name}
        best = max(right.values())
        group = "weight" if fault["kind"] in faults.WEIGHT_KINDS else "learned"
        chosen = {
            "ours": to_repair(fault),
            "most_blamed": fault["first_blamed"],
            "weight_trial": fault["first_by_trial"],
            "planted": fault["planted"],
            "last_layer": list(right)[-1],
        }
        found += [
            {"faults": group, "score": score, "regret": best - right[name]}
            for score, name in chosen.items()
        ]
        found.append(
            {"faults": group, "score": "random", "regret": best - np.mean([*right.values()])}
        )
    tables = []
    for group in ("all", "weight", "learned"):
        for score in dict.fromkeys(one["score"] for one in found):
            own = [
                one["regret"]
                for one in found
                if one["score"] == score and group in ("all", one["faults"])
            ]
            if own:
                tables.append(
                    {
                        "faults": group,
                        "score": score,
                        "n": len(own),
                        "median": round(float(np.median(own)), 4),
                        "p90": round(float(np.quantile(own, 0.9)), 4),
                    }
                )
    return tables


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _with_committed(rows: Sequence[Row], what: str | None) -> list[Row]:
    """Return the rows of this kind in the results file, by id replaced and followed by these."""
    earlier = [row for row in read_rows("localize") if row.get("what") == what]
    found = {row["id"]: {k: v for k, v in row.items() if k != "what"} for row in earlier}
    return list((found | {row["id"]: row for row in rows}).values())


# ----------------------------------------------------------------------------------- fit


def fit(rows: Sequence[Row]) -> None:
    """Print the conditional logit's weights for networks with memory and without."""
    for memory, names in (
        (True, ("onset", "trial", "moves")),
        (False, ("silent", "channels", "moves", "norm")),
    ):
        chosen = [row for row in rows if row["took"] and row["features"]["memory"] == memory]
        if not chosen:
            continue
        weights = _fitted(chosen, names)
        print(f"{'with' if memory else 'without'} memory, {len(chosen)} faults:")
        print({name: round(float(w), 2) for name, w in zip(names, weights, strict=True)})


def _fitted(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    """Maximize the mean log share of the planted layers, less a ridge on the weights."""
    tables = [np.array([row["features"][name] for name in names]).T for row in rows]

    def loss(weights: np.ndarray) -> float:
        total = 0.0
        for row, table in zip(rows, tables, strict=True):
            scores = table @ weights
            total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[row["at"]]
        return float(total + RIDGE * (weights**2).sum())

    return np.asarray(minimize(loss, np.zeros(len(names))).x)
