"""One run as one HTML file: to mail, to print, to keep beside the model.

The file loads nothing from anywhere: styles are inline, pictures are data URIs, charts are markup.
It shows what lies in the run folder and computes nothing of its own; parts that are missing or
damaged are named at the top and left out.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from audit import __version__
from audit.after_section import after_sentences
from audit.case_grid import moves_grid, scan_grid
from audit.cases_section import NUMBERS as CASE_NUMBERS
from audit.cases_section import cases_section
from audit.errors import RunError
from audit.files import write_text
from audit.gallery import Card, card
from audit.group_cards import GroupCard, group_cards, groups_note
from audit.layers_section import layers_section
from audit.open_points import open_points
from audit.record_shapes import reading
from audit.rendering import Forest, forest, page
from audit.runs import RepairFolder, Run
from audit.training_curves import Curves, training_curves
from audit.wording import (
    byte_size,
    comparison_rows,
    count,
    decision_headline,
    export_headline,
    layer_title,
    method_title,
    model_title,
    moment,
    number,
    p_value,
    penalty_sentences,
    percent,
    points,
    proof_rows,
    repair_figures,
    scan_figures,
    span,
    verdict_headline,
)

__all__ = [
    "appendix",
    "class_rows",
    "classes_note",
    "export_summary",
    "material_sentences",
    "repair_facts",
    "repair_tone",
    "test_rows",
    "write_report",
]

GALLERY_LIMIT = 12
CLASS_LIMIT = 40
CLASSES_SHOWN = 20
SKIPPED_LIMIT = 200
COMPARISON_NUMBERS = (
    "Accuracy",
    "95 % interval",
    "Cross entropy",
    "Worst class",
    "Difference",
    "McNemar",
)
TEST_NUMBERS = ("Difference", "95 % interval", "Fixed", "Broken", "McNemar")
T = TypeVar("T")


def write_report(run: Run, output: Path | None = None) -> Path:
    """Write the report of a run and its newest decided repair; return where it lies.

    Args:
        output: The file to write; `report.html` in the run folder where none is given.
    """
    output = output or run.path / "report.html"
    with reading(run.path):
        text = page("report.html", **_context(run))
    write_text(output, text)
    return output


# --- rows that the dashboard shows too ------------------------------------------------------------


def class_rows(before: Mapping[str, Any], after: Mapping[str, Any] | None = None) -> Forest:
    """Return the accuracy of the lowest classes, before and after where there is one."""
    later = {row["name"]: row for row in (after or {}).get("per_class") or []}
    first = sorted(before.get("per_class") or [], key=lambda row: row["value"] or 0)
    shown = first[:CLASS_LIMIT]
    return forest(_class_row(row, later.get(row["name"]), after is not None) for row in shown)


def classes_note(metrics: Mapping[str, Any]) -> str:
    """Return which classes `class_rows` shows, and of how many images."""
    classes = len(metrics.get("per_class") or [])
    shown = f", the {CLASS_LIMIT} lowest of {classes} classes" if classes > CLASS_LIMIT else ""
    return f"{count(metrics.get('n'), 'images')}{shown}."


def _class_row(
    before: Mapping[str, Any], after: Mapping[str, Any] | None, repaired: bool
) -> dict[str, Any]:
    value, marks = percent(before["value"], 0), [(before, "good", False)]
    if repaired:
        value += f" \N{RIGHTWARDS ARROW} {percent((after or {}).get('value'), 0)}"
        marks = [(before, "bad", True), (after or {}, "good", False)]
    detail = count(before["n"], "images")
    return {"label": before["name"], "detail": detail, "value": value, "marks": marks}


def test_rows(info: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the paired tests of a repair: against the network before, then against each control.

    Args:
        info: `repair.json`.
    """
    compared = [("Repair against the network before", info.get("difference"))]
    compared += [
        (f"Repair against control {control.get('name')}", control.get("versus_repair"))
        for control in info.get("controls") or []
    ]
    return [_test_row(name, difference) for name, difference in compared if difference]


def _test_row(name: str, difference: Mapping[str, Any]) -> dict[str, str]:
    accuracy, test = difference.get("accuracy") or {}, difference.get("mcnemar") or {}
    return {
        "Comparison": name,
        "Difference": points(accuracy.get("value")),
        "95 % interval": span(accuracy, "points"),
        "Fixed": count(test.get("fixed")),
        "Broken": count(test.get("broken")),
        "McNemar": p_value(test.get("p_value")),
    }


def material_sentences(info: Mapping[str, Any]) -> list[str]:
    """Return what a repair learned from beside the images themselves, and which loss it had."""
    config, sentences = info.get("config") or {}, []
    tried = info.get("layers_tried") or {}
    if tried:
        sentences.append(
            f"Of {count(len(tried))} layers that the scan blames it repaired the one whose short "
            "repair did most for the validation images."
        )
    if config.get("loss"):
        sentences.append(f"The loss was {config['loss']}.")
    rate = (info.get("rates") or {}).get("repair")
    if rate:
        sentences.append(
            f"The learning rate was {rate['chosen']:g}, of {count(len(rate['val_ce']))} tried for "
            "a few epochs the one with the lowest validation cross entropy."
        )
    divisor = float(info.get("temperature") or 1)
    if divisor != 1:
        sentences.append(
            f"The loss divided logits by {divisor:.3g}, so that it charges for errors and not for "
            "how sure the network is."
        )
    guidance = info.get("guidance") or {}
    if guidance.get("sentence"):
        sentences.append(str(guidance["sentence"]))
    made = {name: n for name, n in (info.get("counterfactuals") or {}).items() if n}
    if made:
        parts = [f"{count(number)} of {name}" for name, number in made.items()]
        donors = int(config.get("donors") or 1)
        lent = f"{donors} others each, in turn" if donors > 1 else "other images"
        sentences.append(
            f"It learned from counterfactual images, {' and '.join(parts)}: what must not matter "
            f"was taken from {lent}."
        )
    if config.get("distill"):
        rest = " and the labels for the rest" if config["distill"] < 1 else ""
        sentences.append(
            f"It learned the network's own answers, where what misleads it is hidden, for "
            f"{percent(config['distill'], 0)}{rest}."
        )
    return sentences


def repair_tone(repair: RepairFolder) -> str:
    """Return how a repair's banner is colored."""
    decided = {"accepted": "good", "rejected": "bad"}.get(repair.decision or "", "open")
    return "bad" if repair.status == "failed" else decided


# --- what the template is given -------------------------------------------------------------------


def _context(run: Run) -> dict[str, Any]:
    notices = _status_notices(run)

    def attempt(read: Callable[[], T], otherwise: T) -> T:
        try:
            with reading(run.path):
                return read()
        except RunError as error:
            notices.append(str(error))
            return otherwise

    verdict: dict[str, Any] = attempt(lambda: run.verdict, {})
    table = attempt(lambda: run.layers, None)
    aliases = run.aliases if table is not None else {}
    repairs = run.repairs
    chosen = next((one for one in repairs if one.decision), repairs[0] if repairs else None)
    source = _gallery_source(run, chosen)
    no_cards: list[Card] = []
    no_groups: list[GroupCard] = []
    network = model_title((run.info.get("model") or {}).get("source", run.name))
    return {
        "layermend": __version__,
        "title": f"{network}: layermend report",
        "folder": run.name,
        "eyebrow": f"{network}, scanned {moment(run.created_utc)}",
        "headline": verdict_headline(verdict, aliases),
        "reasons": _strings(verdict.get("reasons")),
        "decision": _decision(chosen) if chosen else None,
        "scan": scan_figures(run.info) if run.info.get("metrics") else [],
        "layers": layers_section(table, aliases, verdict) if table is not None else None,
        "groups": attempt(lambda: group_cards(run), no_groups),
        "groups_note": attempt(lambda: groups_note(run.groups), ""),
        "open_points": open_points(run, chosen),
        "repair": _repair(chosen, attempt(lambda: _curves(chosen), None)) if chosen else None,
        "comparison_numbers": COMPARISON_NUMBERS,
        "test_numbers": TEST_NUMBERS,
        "case_grid": scan_grid(run.info),
        "cases": cases_section(run.info, aliases),
        "case_numbers": CASE_NUMBERS,
        "cards": attempt(lambda: _cards(source), no_cards),
        "cards_caption": _cards_caption(source),
        "export": attempt(lambda: export_summary(chosen), None) if chosen else None,
        "earlier": [
            _repair(one, attempt(partial(_curves, one), None))
            for one in repairs
            if one is not chosen
        ],
        "appendix": appendix(run, chosen),
        "skipped": _skipped(run.info),
        # Last, when every reader above had its say.
        "notices": notices + [found.reason for found in run.damaged_repairs],
    }


def _status_notices(run: Run) -> list[str]:
    if run.status == "running":
        return ["This scan has not finished; what follows is what it has written so far."]
    if run.status == "failed":
        return [f"This scan failed: {run.info.get('failure') or 'no reason was recorded'}."]
    return []


def _gallery_source(run: Run, repair: RepairFolder | None) -> Run | RepairFolder:
    if repair is None:
        return run
    try:
        return repair if repair.gallery["images"] else run
    except RunError:  # reported when its cards are read
        return repair


def _decision(repair: RepairFolder) -> dict[str, Any]:
    """Return the outcome for the report's first lines, a penalty that did no good included."""
    said = penalty_sentences(repair.info)[:1]
    return {"tone": repair_tone(repair), "headline": decision_headline(repair.info), "said": said}


def _repair(repair: RepairFolder, curves: Curves | None) -> dict[str, Any]:
    info = repair.info
    finished = bool(info.get("after"))
    return {
        "title": layer_title(repair.layer, info.get("alias")),
        "when": f"Started {moment(repair.created_utc)}",
        "images": count((info.get("after") or {}).get("n"), "images"),
        "tone": repair_tone(repair),
        "headline": decision_headline(info),
        "reasons": _strings(info.get("reasons")),
        "figures": repair_figures(info) if finished else [],
        "penalty": penalty_sentences(info),
        "earned": (info.get("penalty") or {}).get("earned"),
        "comparison": comparison_rows(info) if finished else [],
        "learned_from": material_sentences(info) if finished else [],
        "tests": test_rows(info) if finished else [],
        "curves": curves,
        "after": after_sentences(info),
        "cases": moves_grid(info),
        "classes": class_rows(info.get("before") or {}, info.get("after") or {}),
        "classes_note": classes_note(info.get("before") or {}),
        "facts": repair_facts(info),
    }


def repair_facts(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a repair trained, what it left alone, and what it cost."""
    frozen, cache = info.get("frozen") or {}, info.get("cache") or {}
    config = info.get("config") or {}
    facts = []
    if frozen:
        facts.append(("Changed tensors", ", ".join(_strings(frozen.get("changed"))) or "none"))
        same = f"{count(frozen.get('identical'))} of {count(frozen.get('tensors'))} bit-identical"
        facts.append(("Tensors outside the layer", same))
    if cache:
        held = f"{cache.get('kind')}, {byte_size(cache.get('bytes'))}"
        facts.append(("Frozen prefix", held))
    if config:
        facts.append(("Settings", _settings(config)))
    if info.get("timings_s"):
        facts.append(("Time", _timings(info["timings_s"])))
    if info.get("peak_memory_mib") is not None:
        facts.append(("Peak memory", f"{number(info['peak_memory_mib'], 0)} MiB"))
    return facts


def _cards(folder: Run | RepairFolder) -> list[Card]:
    index = folder.gallery
    layer, method = index.get("shown_layer"), index.get("shown_method")
    if not layer or not method:
        return []
    places = range(len(index["images"]))
    # What a reader looks for first: images that changed sides, then wrong ones.
    rank = {"broken": 0, "fixed": 1, "wrong": 2, "right": 3, "unknown": 4}
    cards = [card(folder, place, method, layer) for place in places]
    return sorted(cards, key=lambda one: rank[one.outcome])[:GALLERY_LIMIT]


def _cards_caption(folder: Run | RepairFolder) -> str:
    try:
        index = folder.gallery
    except RunError:
        return ""
    which = ", before and after the repair" if isinstance(folder, RepairFolder) else ""
    held = len(index["images"])
    shown = count(held, "images") if held <= GALLERY_LIMIT else f"{GALLERY_LIMIT} of {held} images"
    method = method_title(str(index.get("shown_method", "")))
    return f"{method} maps of {index.get('shown_layer', '')} for the true class{which}; {shown}."


def export_summary(repair: RepairFolder) -> dict[str, Any]:
    """Return the state of a repair's export: `tone`, `headline`, `reasons` and `rows` of proof."""
    proof = repair.onnx
    passed = proof is not None and proof.get("status") == "passed"
    return {
        "tone": "good" if passed else "open" if proof is None else "bad",
        "headline": export_headline(proof),
        "reasons": _strings((proof or {}).get("reasons")),
        "rows": proof_rows(proof) if proof else [],
    }


def _curves(repair: RepairFolder) -> Curves | None:
    """Return the training curves; None where there are none, RunError where they are damaged."""
    if not (repair.path / "history.parquet").is_file():
        return None
    return training_curves(repair.history)


def appendix(run: Run, repair: RepairFolder | None) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """Return how a run, and a repair of it, were made: network, images, settings, versions."""
    info, sections = run.info, []
    model, data = info.get("model") or {}, info.get("data") or {}
    if model:
        facts = [(name, _plain(model.get(name))) for name in ("source", "arch", "sha256")]
        facts += [(name, count(model.get(name))) for name in ("parameters", "layers")]
        facts.append(("classes", _names(model.get("classes"))))
        facts.append(("preprocessing", _settings(model.get("preprocessing") or {})))
        sections.append(("Network", facts))
    if data:
        names = ("root", "images", "skipped", "splits", "split_source", "duplicates", "fingerprint")
        facts = [(name, _shown(data.get(name))) for name in names]
        facts += [("note on the splits", note) for note in _strings(data.get("split_notes"))]
        sections.append(("Images", facts))
    sections.append(
        ("Scan", [("schema version", _plain(info.get("schema_version"))), *_made(info)])
    )
    sections.append(("Settings of the scan", _flat(info.get("config") or {})))
    if repair:
        hashes = repair.info.get("model") or {}
        facts = [(name, _plain(hashes[name])) for name in hashes if name.startswith("sha256")]
        sections.append(("Repair", [*_made(repair.info), *facts]))
        sections.append(("Settings of the repair", _flat(repair.info.get("config") or {})))
    return [(name, facts) for name, facts in sections if facts]


def _made(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return when, where and how long a scan or a repair ran, and by which command."""
    memory = info.get("peak_memory_mib")
    facts = [
        ("command", shlex.join(_strings(info.get("command"))) or "n/a"),
        ("started", moment(info.get("created_utc"))),
        ("finished", moment(info.get("finished_utc"))),
        ("device", _settings(info.get("device") or {})),
        ("time", _timings(info.get("timings_s") or {})),
        ("peak memory", "n/a" if memory is None else f"{number(memory, 0)} MiB"),
        ("versions", _settings(info.get("versions") or {})),
    ]
    seed = info.get("seed", (info.get("config") or {}).get("seed"))
    return [facts[0], ("seed", _plain(seed)), *facts[1:]]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return settings one by one, those of a group as `group.name`."""
    rows: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", "not set" if value is None else _plain(value)))
    return rows


def _names(classes: Any) -> str:
    names = _strings(classes)
    shown = ", ".join(names[:CLASSES_SHOWN])
    more = ", \N{HORIZONTAL ELLIPSIS}" if len(names) > CLASSES_SHOWN else ""
    return f"{count(len(names))}: {shown}{more}" if names else "n/a"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return _settings(value)
    return count(value) if isinstance(value, int) else _plain(value)


def _skipped(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    files = (info.get("data") or {}).get("skipped_files") or []
    rows = [(str(one.get("path")), str(one.get("reason"))) for one in files[:SKIPPED_LIMIT]]
    if len(files) > SKIPPED_LIMIT:
        rows.append(("\N{HORIZONTAL ELLIPSIS}", f"and {count(len(files) - SKIPPED_LIMIT)} more"))
    return rows


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items()) or "n/a"


def _timings(timings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number(value, 1)} s" for name, value in timings.items()) or "n/a"


def _plain(value: Any) -> str:
    if value is None:
        return "n/a"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _strings(values: Any) -> list[str]:
    return [str(value) for value in values or []]
