"""Repair of planted shortcuts: every loss and control, by what is regained and what is harmed.

`shortcut_cases.py` has the networks (EfficientNet-Lite0, ResNet-18, VGG), the shortcuts (watermark,
border color, background) and the photographs. A repair learns from 300 photos as `repair layer`
does unless told otherwise: SGD, of six learning rates the one that does best (`repair.rates`), 10
epochs, batches of 32, lambda 0.9. Every row has these settings, but for what its name says; the
controls choose among the same rates.

    recovered    share of the accuracy on conflicting photos that the shortcut cost and that came
                 back
    damage       accuracy lost on unaffected photos against the faulty network, in points. In the
                 unaffected pictures of backgrounds the shortcut is right, and what it gave the
                 faulty network there is not the network's own: against the one before the fault,
                 at least nought

The losses that must know where a map may lie, and counterfactual photos, are told what a user
could know: for marks what the first error group of a scan shares (`audit.artefacts`), found for
each fault, in every photo alike; for backgrounds the mask. `trust` is the paper's loss, bounded.
`answers` is cross entropy on counterfactuals, for four fifths with what the faulty network says
itself where the mark, or the background, is another photo's (`repair.teaching`). `planted` is the
layer at fault, the other rows are of the layer that the scan would have repaired. `default` is what
`repair layer` does then (`repair.defaults`): for marks `answers` where the photos are biased, which
a scan of them counts, and `trust` where they are balanced or a scan found no group, cross entropy
in a layer that has no maps; for backgrounds, since masks say nothing about that, cross entropy on
counterfactuals, where in turn several photos lend each what lies around its object (`one donor`:
always the same), of logits at the temperature of the validation photos (`tempered`;
`repair.temperature`); where the scan names no layer, in the one that short repairs choose
(`chosen`; `repair.layer_choice`), as `repair layer` tells to. Controls: plain cross entropy
(`ce`), the maps of other photos (`shuffled`), the last linear layer (`dfr`; Kirichenko et al.
2022), all layers (`full`), all layers by relative gradient norm (`auto-rgn`; Lee et al. 2022).
Tests are McNemar's against `ce` on the same layer, all faults and draws together, corrected after
Holm. What the table's claims are of is done with three draws of photos, the other losses and
controls with the first; EfficientNet-Lite0 has the first alone. Where the scan names the planted
layer, a repair of both is one. `right_around`: how often the faulty network is right on photos
with the objects painted over, which would tell biased backgrounds from balanced ones; nothing goes
by it.

That share, and cross entropy for `energy`, were chosen on faults of other planting seeds (104 to
126, VGG) and another draw of photos, at a learning rate of 0.01: `tune` repeats that, and keeps its
rows in WORK/tuned.jsonl. What is done with masks was chosen on backgrounds of other layers, which
`tune` repairs too; `check` repairs those of a third set, planted after it was chosen. The photos
are other draws, the results files `repair_shortcut_tuning.json` and `repair_shortcut_check.json`.

Rows are kept as they come in WORK/rows.jsonl; a run goes on where the last one stopped. Faults that
have no row there keep those of the results file.

    LAYERMEND_DATA=... python benchmarks/repair_shortcut.py train [--part 0 --parts 2]
    LAYERMEND_DATA=... python benchmarks/repair_shortcut.py report
    LAYERMEND_DATA=... python benchmarks/repair_shortcut.py tune --networks vgg --kinds watermark
    LAYERMEND_DATA=... python benchmarks/repair_shortcut.py tune --kinds background
    LAYERMEND_DATA=... python benchmarks/repair_shortcut.py check --kinds background
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from faults import Pool, predictions_right
from results_file import configuration, print_table, read_rows, write_results
from scipy.stats import binomtest
from shortcut_cases import (
    KINDS,
    MARKS,
    REGIMES,
    Case,
    Lessons,
    all_cases,
    background_cases,
    lessons,
    mark_cases,
)
from torch import Tensor

from audit.chance import holm
from audit.networks.program import Program, Split
from audit.parallel import ALONE
from repair.cache import CacheKind, CrossingBatch
from repair.config import AUTO, RepairConfig
from repair.crossing import further_versions, version_name
from repair.defaults import ARTEFACT_LOSS, DISTILL
from repair.image_masks import ImageMasks
from repair.layer_choice import best_layer, short_repair
from repair.rates import TRIED_EPOCHS, best_rate, try_rates
from repair.teaching import mixed_targets
from repair.temperature import fit_temperature
from repair.training import Trained, train_layer

SEEDS = (0, 1, 2)
Place = Literal["flagged", "chosen", "planted", "last", "all"]
TRUST = RepairConfig(learning_rate=AUTO, controls=())


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to repair: which layer, and how."""

    place: Place
    config: RepairConfig
    shuffled: bool = False
    surgical: bool = False
    changed: bool = False  # learns from counterfactuals
    masked: bool = False  # tried where there are masks alone
    one_donor: bool = False  # of what lies around an object
    every_draw: bool = False  # of photos, or the first one alone


def _settings(**changes: Any) -> RepairConfig:
    return replace(TRUST, **changes)


ENERGY, CE = _settings(loss="energy"), _settings(loss="ce")
TEMPERED = replace(CE, temperature=AUTO)
ANSWERS = _settings(loss=ARTEFACT_LOSS, distill=DISTILL)
METHODS: dict[str, Method] = {
    "trust": Method(place="flagged", config=TRUST, every_draw=True),
    "ce": Method(place="flagged", config=CE, every_draw=True),
    "energy": Method(place="flagged", config=ENERGY, every_draw=True),
    "energy, counterfactuals": Method(
        place="flagged", config=ENERGY, changed=True, every_draw=True
    ),
    "energy, one donor": Method(
        place="flagged",
        config=ENERGY,
        changed=True,
        masked=True,
        one_donor=True,
        every_draw=True,
    ),
    "ce, tempered": Method(place="flagged", config=TEMPERED, masked=True, every_draw=True),
    "ce, counterfactuals, tempered": Method(
        place="flagged", config=TEMPERED, changed=True, masked=True, every_draw=True
    ),
    "chosen ce, counterfactuals, tempered": Method(
        place="chosen", config=TEMPERED, changed=True, masked=True, every_draw=True
    ),
    "energy, counterfactuals, tempered": Method(
        place="flagged",
        config=replace(TEMPERED, loss="energy"),
        changed=True,
        masked=True,
        every_draw=True,
    ),
    "ce, counterfactuals": Method(place="flagged", config=CE, changed=True, every_draw=True),
    "trust, counterfactuals": Method(place="flagged", config=TRUST, changed=True),
    "answers": Method(place="flagged", config=ANSWERS, changed=True, every_draw=True),
    "answers, energy": Method(
        place="flagged", config=replace(ANSWERS, loss="energy"), changed=True
    ),
    "answers alone": Method(place="flagged", config=replace(ANSWERS, distill=1.0), changed=True),
    "planted trust": Method(place="planted", config=TRUST),
    "planted trust, classes": Method(place="planted", config=_settings(scale="classes")),
    "planted ce": Method(place="planted", config=CE, every_draw=True),
    "planted shuffled": Method(place="planted", config=TRUST, shuffled=True),
    "planted trust-masks": Method(place="planted", config=_settings(loss="trust-masks")),
    "planted energy": Method(place="planted", config=ENERGY),
    "planted energy, counterfactuals": Method(place="planted", config=ENERGY, changed=True),
    "planted ce, counterfactuals, tempered": Method(
        place="planted", config=TEMPERED, changed=True, masked=True, every_draw=True
    ),
    "planted rrr": Method(place="planted", config=_settings(loss="rrr")),
    "planted answers": Method(place="planted", config=ANSWERS, changed=True, every_draw=True),
    "dfr": Method(place="last", config=CE, every_draw=True),
    "dfr, counterfactuals": Method(place="last", config=CE, changed=True, every_draw=True),
    "dfr, answers": Method(place="last", config=ANSWERS, changed=True, every_draw=True),
    "dfr, counterfactuals, tempered": Method(
        place="last", config=TEMPERED, changed=True, masked=True, every_draw=True
    ),
    "full": Method(place="all", config=CE),
    "auto-rgn": Method(place="all", config=CE, surgical=True),
}


PLACES: tuple[Place, ...] = ("planted", "flagged")
TUNING_DRAW, TUNING_CASES = 10, 4  # of each network and kind
FURTHER_DRAWS = {"tuning": (10, 11, 12), "check": (20, 21)}  # for backgrounds
TUNED_MASKS = {
    **{
        name: METHODS[name]
        for name in (
            "ce, counterfactuals, tempered",
            "chosen ce, counterfactuals, tempered",
            "energy, counterfactuals",
            "planted ce, counterfactuals, tempered",
            "planted energy, counterfactuals",
        )
    },
    "planted ce, counterfactuals": Method(place="planted", config=CE, changed=True),
    "planted energy, counterfactuals, tempered": Method(
        place="planted", config=replace(TEMPERED, loss="energy"), changed=True
    ),
}
TUNED = {
    f"{place} {loss}, {share:.1f}": Method(
        place=place,
        config=_settings(loss=loss, distill=share, learning_rate=0.01),
        changed=True,
        every_draw=True,
    )
    for place in PLACES
    for loss in ("ce", "energy")
    for share in (0.0, 0.5, 0.8, 1.0)
}

DEFAULT = "default"
BY_ARTEFACT: dict[str, str] = {"biased": "answers", "balanced": "trust"}
BY_MASKS = "ce, counterfactuals, tempered"
UNNAMED = f"chosen {BY_MASKS}"
WITHOUT_MAPS = {"trust": "ce"}
EQUAL_DFR = {True: "dfr, counterfactuals, tempered", False: "dfr, counterfactuals"}  # with masks
CONTROLS = ("ce", "planted ce", "dfr", *EQUAL_DFR.values())
SUMMARIZED = {
    "": DEFAULT,
    "_trust": "trust",
    "_ce": "ce",
    "_dfr": "dfr",
    "_dfr_counterfactuals": "dfr, counterfactuals",
    "_full": "full",
}


class Crossing:
    """Photos as they cross a cut, in memory."""

    kind: CacheKind = "memory"
    bytes = 0
    seconds = 0.0

    def __init__(self, split: Split, pool: Pool) -> None:
        parts = [split.prefix(images) for images in pool.images.split(100)]
        self.crossing = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.labels = pool.labels
        self.tensors = len(self.crossing)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> CrossingBatch:
        crossing = tuple(tensor[rows] for tensor in self.crossing)
        return CrossingBatch(crossing=crossing, labels=self.labels[rows], positions=rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["train", "report", "tune", "check"])
    parser.add_argument("--part", type=int, default=0, help="of the cases, to share the work")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument(
        "--networks", nargs="+", default=["resnet", "vgg", "efficientnet"], help="of the cases"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*METHODS, *TUNED, *TUNED_MASKS],
        metavar="NAME",
        help="of those tried",
    )
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument(
        "--training-seed", type=int, default=0, help="of the small networks that were planted in"
    )
    parser.add_argument("--faults", type=Path, default=Path("local/localize"))
    parser.add_argument("--work", type=Path, default=Path("local/repair_shortcut"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.action == "report":
        report(with_committed(_read(options.work)))
        return
    given_faults = (options.faults, options.networks, options.training_seed)
    if options.action == "train":
        cases = all_cases(*given_faults, options.kinds)
        _train(cases, METHODS, options.seeds, f"rows-{options.part}", options)
        return
    if options.action == "tune" and set(MARKS) & set(options.kinds):
        marked = mark_cases(*given_faults, tuning=True, at_most=TUNING_CASES)
        _train(marked, TUNED, [TUNING_DRAW], "tuned", options)
    if "background" in options.kinds:
        which = {"tune": "tuning", "check": "check"}[options.action]
        taught = background_cases(*given_faults, further=which)
        _train(taught, TUNED_MASKS, FURTHER_DRAWS[which], f"{which}-masks", options)
        report_further(_read(options.work, f"{which}-masks"), which)


def _train(
    cases: Sequence[Case],
    tried: Mapping[str, Method],
    draws: Sequence[int],
    name: str,
    options: argparse.Namespace,
) -> None:
    """Repair the cases by the methods, and keep the rows in a file of that name."""
    done = {_key(row) for row in _read(options.work, "rows-*" if tried is METHODS else name)}
    for seed in draws:
        for case in cases[options.part :: options.parts]:
            for regime in case.regimes:
                methods = {
                    which: method
                    for which, method in tried.items()
                    if applies(case, method)
                    and (options.methods is None or which in options.methods)
                    and (method.every_draw or tried is not METHODS or seed == SEEDS[0])
                    and (case.name, regime, seed, which) not in done
                }
                if methods:
                    given = lessons(case, regime, seed, options.faults)
                    for row in repair_all(case, given, methods, {"regime": regime, "seed": seed}):
                        with (options.work / f"{name}.jsonl").open("a") as stream:
                            stream.write(json.dumps(row) + "\n")


def applies(case: Case, method: Method) -> bool:
    """Return whether a method is tried on a case: its layer has the maps it needs, and it is known
    what must not matter where the method is told so."""
    if method.masked and case.kind != "background":
        return False
    if method.place == "chosen":
        return bool(case.candidates)
    place, loss = layer_of(case, method.place), method.config.loss_function
    is_told = method.changed or method.config.distill > 0 or loss.needs_masks
    if is_told and not _known(case):
        return False
    return place == "all" or not loss.needs_maps or case.faulty.layer(place).has_maps


def _known(case: Case) -> bool:
    """Whether a user could say what must not matter: by masks, or by what the scan found."""
    return case.kind == "background" or case.artefact is not None or bool(case.region)


def repair_all(
    case: Case, given: Lessons, methods: Mapping[str, Method], known: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the methods on one case with one draw of photos."""
    known = {"case": case.name, "network": case.network, "kind": case.kind, **known}
    if not _known(case):
        known["told"] = False
    if case.unnamed:
        known["unnamed"] = True
    if given.around_right is not None:
        known["right_around"] = given.around_right
    pools = {"conflicting": case.conflicting, "unaffected": case.unaffected}
    for which, program in (("healthy", case.healthy), ("faulty", case.faulty)):
        for name, pool in pools.items():
            known[f"{which}_{name}"] = round(predictions_right(program, pool), 4)
    crossed: dict[str, dict[str, Crossing]] = {}
    made: dict[tuple[str, Method], dict[str, Any]] = {}
    layers_tried: dict[str, float] = {}
    for name, method in methods.items():
        if method.place == "chosen":
            layers_tried = layers_tried or _try_layers(case, given, int(known["seed"]))
            place = best_layer(layers_tried)
        else:
            place = layer_of(case, method.place)
        repair = (place, replace(method, place="planted", every_draw=False))
        if repair in made:  # the planted layer may be the flagged one
            yield {**made[repair], "method": name, **_tried(method, layers_tried)}
            continue
        split = case.faulty.uncut() if place == "all" else case.faulty.split(place)
        if place not in crossed:
            crossed = {
                place: {
                    part: Crossing(split, pool)
                    for part, pool in {
                        "train": given.train,
                        "validation": given.validation,
                        "validation_changed": given.validation_changed,
                        **{
                            version_name("train_changed", number): pool
                            for number, pool in enumerate(given.train_changed)
                        },
                        **pools,
                    }.items()
                }
            }
        started = time.perf_counter()
        config = replace(method.config, seed=int(known["seed"]))
        row = {**known, "method": name, "layer": place, "planted": case.planted}
        row |= _tried(method, layers_tried)
        if config.temperature == AUTO:
            changed = "_changed" if method.changed else ""
            found = fit_temperature(split, crossed[place][f"validation{changed}"])
            config = replace(config, temperature=found)
            row["temperature"] = round(found, 3)
        train = _training(split, crossed[place], given, method)
        if config.learning_rate == AUTO:
            tried = try_rates(train, config)
            config = replace(config, learning_rate=best_rate(tried))
            row["tried"] = {f"{rate:g}": round(entropy, 4) for rate, entropy in tried.items()}
        row["rate"] = config.rate
        trained = train(config)
        for part in pools:
            right = _right(split, crossed[place][part], trained.parameters)
            row[part] = round(float(right.mean()), 4)
            row[f"{part}_right"] = np.packbits(right).tobytes().hex()
        lost = row["healthy_conflicting"] - row["faulty_conflicting"]
        row["recovered"] = round((row["conflicting"] - row["faulty_conflicting"]) / lost, 4)
        row["damage"] = _damage(row)
        row["best_epoch"], row["stopped"] = trained.best_epoch, trained.stopped
        row["tensors"], row["identical"] = _untouched(case.faulty, split, trained.parameters)
        row["seconds"] = round(time.perf_counter() - started, 1)
        shown = (known["case"], known["regime"], known["seed"], name)
        print(*shown, row["recovered"], row["damage"], flush=True)
        made[repair] = row
        yield row


def _try_layers(case: Case, given: Lessons, seed: int) -> dict[str, float]:
    """Return what short repairs of the layers come to that the scan leaves."""
    reached = {}
    for name in case.candidates:
        split = case.faulty.split(name)
        first, *further = (Crossing(split, one) for one in given.train_changed[:TRIED_EPOCHS])
        validation = Crossing(split, given.validation_changed)
        config = replace(TEMPERED, seed=seed)
        reached[name] = short_repair(split, first, validation, config, versions=further, team=ALONE)
    return reached


def _tried(method: Method, layers: Mapping[str, float]) -> dict[str, Any]:
    if method.place != "chosen":
        return {}
    return {"layers_tried": {name: round(entropy, 4) for name, entropy in layers.items()}}


def _training(
    split: Split, crossed: Mapping[str, Crossing], given: Lessons, method: Method
) -> Callable[[RepairConfig], Trained]:
    """Return what trains a layer by a method's loss and images, and by the settings it is given."""
    changed, share = "_changed" if method.changed else "", method.config.distill
    return partial(
        train_layer,
        split,
        crossed[f"train{changed}"],
        crossed[f"validation{changed}"],
        loss=method.config.loss,
        versions=() if method.one_donor else further_versions(crossed, f"train{changed}"),
        masks=ImageMasks.of_all(given.allowed),
        targets=mixed_targets(given.targets, given.train.labels.tolist(), share) if share else None,
        shuffled=method.shuffled,
        surgical=method.surgical,
    )


def _damage(row: Mapping[str, Any]) -> float:
    if row["kind"] == "background":
        return float(round(max(0.0, row["healthy_unaffected"] - row["unaffected"]), 4))
    return float(round(row["faulty_unaffected"] - row["unaffected"], 4))


def layer_of(case: Case, place: Place) -> str:
    """Return the name of a layer of the case's network, or `all`."""
    if place == "last":
        return [one.name for one in case.faulty.layers if one.kind == "linear"][-1]
    return {"flagged": case.flagged, "planted": case.planted, "all": "all"}[place]


def _right(split: Split, images: Crossing, parameters: Mapping[str, Tensor]) -> np.ndarray:
    with torch.no_grad():
        logits = [
            split.suffix(images.batch(rows).crossing, parameters)
            for rows in torch.arange(len(images)).split(100)
        ]
    return (torch.cat(logits).argmax(dim=1) == images.labels).numpy()


def _untouched(program: Program, split: Split, parameters: Mapping[str, Tensor]) -> tuple[int, int]:
    repaired = program.with_state(parameters)
    others = [name for name in program.state if name not in split.parameter_names]
    same = sum(torch.equal(program.state[name], repaired.state[name]) for name in others)
    return len(others), same


# --------------------------------------------------------------------------------- tables


def with_default(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with those of `default`, which repeat the row that the rule picks."""
    repeated, known = [], {_key(row) for row in rows}
    for row in rows:
        picked = BY_MASKS if row["kind"] == "background" else BY_ARTEFACT[row["regime"]]
        if row.get("unnamed"):
            picked = UNNAMED
        if not row.get("told", True):
            picked = "trust"
        if (*_key(row)[:3], picked) not in known:
            picked = WITHOUT_MAPS[picked]
        if row["method"] == picked:
            repeated.append({**row, "method": DEFAULT})
    return [*repeated, *rows]


def with_committed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with those of the results file, of faults that have none here."""
    own = {row["case"] for row in rows}
    kept = [row for row in read_rows("repair_shortcut") if "case" in row]
    return [*rows, *(row for row in kept if row["case"] not in own)]


def with_counts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with how many conflicting photos each gets right and a control does not,
    and the other way round; committed rows have it already."""
    bits = {_key(row): _bits(row) for row in rows if "conflicting_right" in row}
    counted = []
    for row in rows:
        if "conflicting_right" not in row:
            counted.append(row)
            continue
        ours, against = _bits(row), {}
        for control in CONTROLS:
            theirs = bits.get((*_key(row)[:3], control))
            if theirs is not None:
                fixed, broken = int((~theirs & ours).sum()), int((theirs & ~ours).sum())
                against[control] = [fixed, broken]
        counted.append({**row, "against": against})
    return counted


def _key(row: Mapping[str, Any]) -> tuple[str, str, int, str]:
    return row["case"], row["regime"], row["seed"], row["method"]


def report(rows: Sequence[dict[str, Any]]) -> None:
    repairs, rows = len(rows), with_default(with_counts(rows))
    rows = [{**row, "damage": _damage(row)} for row in rows]
    tables = []
    for regime in REGIMES:
        own = [row for row in rows if row["regime"] == regime]
        found = [_table(regime, "all", name, own) for name in (DEFAULT, *METHODS)]
        _test(found, own)
        tables += found
        print_table(f"Planted shortcuts, {regime} photos; all networks and kinds", found)
    for regime in REGIMES:
        for kind in KINDS:
            own = [r for r in rows if (r["regime"], r["kind"]) == (regime, kind)]
            found = [_table(regime, kind, name, own) for name in (DEFAULT, *METHODS)]
            found = [table for table in found if table["repairs"]]
            tables += found
            if found:
                print_table(f"{kind}, {regime} photos", found)
    by = {(t["regime"], t["kind"], t["method"]): t for t in tables}
    summary: dict[str, float] = {}
    for regime, end in (("balanced", ""), ("biased", "_biased")):
        for name, method in SUMMARIZED.items():
            summary[f"recovered{name}{end}"] = by[regime, "all", method]["recovered"]
            summary[f"damage{name}{end}"] = by[regime, "all", method]["damage"]
        own = [row for row in rows if row["regime"] == regime]
        for name, by_masks in (
            ("ce", dict.fromkeys(EQUAL_DFR, "ce")),
            ("dfr", dict.fromkeys(EQUAL_DFR, "dfr")),
            ("equal_dfr", EQUAL_DFR),
        ):
            counts = [
                _discordant([r for r in own if (r["kind"] == "background") == masked], one, DEFAULT)
                for masked, one in by_masks.items()
            ]
            fixed, broken = map(sum, zip(*counts, strict=True))
            summary[f"fixed_against_{name}{end}"] = fixed
            summary[f"broken_against_{name}{end}"] = broken
        own = [r for r in rows if (r["regime"], r["method"]) == (regime, DEFAULT)]
        from_faulty = [row["faulty_unaffected"] - row["unaffected"] for row in own]
        summary[f"damage_from_faulty{end}"] = round(100 * float(np.mean(from_faulty)), 2)
        marks = _table(regime, "marks", DEFAULT, [r for r in own if r["kind"] != "background"])
        summary[f"recovered_marks{end}"] = marks["recovered"]
        summary[f"damage_marks{end}"] = marks["damage"]
        default = by[regime, "all", DEFAULT]
        summary[f"p_against_ce{end}"] = default["p_value"]
        best = max(
            (by[regime, "all", name] for name in METHODS if name.startswith("planted")),
            key=lambda table: table["recovered"] if table["damage"] <= 1 else -1,
        )
        print(f"{regime}: {best['method']} recovers most with at most a point of damage")
        summary[f"recovered_best_planted{end}"] = best["recovered"]
    summary["cells"] = len({(row["case"], row["regime"], row["seed"]) for row in rows})
    summary["repairs"] = repairs
    summary["repairs_identical"] = sum(
        row["identical"] == row["tensors"] for row in rows if row["method"] != DEFAULT
    )
    config = configuration(
        "cpu",
        "timm",
        seeds=sorted({row["seed"] for row in rows}),
        seeds_planned=list(SEEDS),
        cases=sorted({row["case"] for row in rows}),
        settings={name: method.config.as_dict() for name, method in METHODS.items()},
    )
    bare = [  # those of the default are repetitions
        {key: value for key, value in row.items() if not key.endswith("_right")}
        for row in rows
        if row["method"] != DEFAULT
    ]
    path = write_results("repair_shortcut", summary=summary, config=config, rows=[*tables, *bare])
    print(path)


def report_further(rows: Sequence[dict[str, Any]], which: str) -> None:
    """Say what the repairs by masks were chosen by, or what they do where nothing was chosen."""
    rows = with_default(rows)
    rows = [{**row, "damage": _damage(row)} for row in rows]
    tables = []
    for regime in REGIMES:
        own = [row for row in rows if row["regime"] == regime]
        tables += [_table(regime, "background", name, own) for name in (DEFAULT, *TUNED_MASKS)]
    print_table(f"Backgrounds, {which}", tables)
    summary = {
        f"{key}_{table['method'].replace(',', '').replace(' ', '_')}_{table['regime']}": table[key]
        for table in tables
        for key in ("recovered", "damage")
        if table["repairs"]
    }
    config = configuration(
        "cpu",
        seeds=sorted({row["seed"] for row in rows}),
        cases=sorted({row["case"] for row in rows}),
        settings={name: method.config.as_dict() for name, method in TUNED_MASKS.items()},
    )
    bare = [
        {k: v for k, v in row.items() if not k.endswith("_right")}
        for row in rows
        if row["method"] != DEFAULT
    ]
    name = f"repair_shortcut_{which}"
    print(write_results(name, summary=summary, config=config, rows=[*tables, *bare]))


def _table(regime: str, kind: str, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over faults and seeds; the interval is a bootstrap over faults."""
    own = [row for row in rows if row["method"] == name]
    cases = sorted({row["case"] for row in own})
    table: dict[str, Any] = {"regime": regime, "kind": kind, "method": name, "repairs": len(own)}
    if not own:
        return {**table, "recovered": None, "low": None, "high": None, "damage": None}
    means = np.array([np.mean([r["recovered"] for r in own if r["case"] == c]) for c in cases])
    drawn = np.random.default_rng(0).integers(len(means), size=(2000, len(means)))
    low, high = np.percentile(means[drawn].mean(axis=1), [2.5, 97.5])
    return {
        **table,
        "recovered": round(100 * float(means.mean()), 1),
        "low": round(100 * float(low), 1),
        "high": round(100 * float(high), 1),
        "damage": round(100 * float(np.mean([row["damage"] for row in own])), 2),
        "diverged": sum(row["stopped"] is not None for row in own),
        "best_epoch": round(float(np.mean([row["best_epoch"] for row in own])), 1),
    }


def _test(tables: Sequence[dict[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Hold every method against plain cross entropy on the same layer."""
    tested, p_values = [], []
    for table in tables:
        name = table["method"]
        control = "planted ce" if name.startswith("planted") else "ce"
        fixed, broken = _discordant(rows, control, name)
        table["versus"], table["fixed"], table["broken"] = control, fixed, broken
        table["p_value"] = None
        if name != control and fixed + broken:
            tested.append(table)
            p_values.append(float(binomtest(fixed, fixed + broken).pvalue))
    for table, p_value in zip(tested, holm(p_values, len(p_values)), strict=True):
        table["p_value"] = round(float(p_value), 4)


def _discordant(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> tuple[int, int]:
    """Return how many conflicting photos the second gets right and the first does not, and the
    other way round."""
    known = [r.get("against", {}).get(first, (0, 0)) for r in rows if r["method"] == second]
    return sum(fixed for fixed, _ in known), sum(broken for _, broken in known)


def _bits(row: Mapping[str, Any]) -> np.ndarray:
    packed = np.frombuffer(bytes.fromhex(row["conflicting_right"]), np.uint8)
    return np.unpackbits(packed).astype(bool)


def _read(work: Path, name: str = "rows-*") -> list[dict[str, Any]]:
    found = []
    for path in sorted(work.glob(f"{name}.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


if __name__ == "__main__":
    main()
