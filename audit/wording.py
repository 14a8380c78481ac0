"""Numbers and verdicts in words, alike wherever they are shown.

The report and the dashboard show the same figures; what they say is put into words here, once, from
the documents of a run folder as they lie on disk. A number that is not there reads `n/a`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

__all__ = [
    "Figure",
    "byte_size",
    "comparison_rows",
    "count",
    "decision_headline",
    "export_headline",
    "fixed",
    "layer_title",
    "method_title",
    "model_title",
    "moment",
    "number",
    "p_value",
    "penalty_sentences",
    "percent",
    "points",
    "proof_rows",
    "repair_figures",
    "scan_figures",
    "span",
    "verdict_headline",
]

NOT_THERE = "n/a"
NAMES_SHOWN = 12
PERCENT = "\N{NO-BREAK SPACE}%"

_METHODS = {
    "gradcam": "Grad-CAM",
    "guided-gradcam": "Guided Grad-CAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "gradients": "Gradient",
}

Document = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One key number: what it is, how much, and the interval or the condition behind it."""

    label: str
    value: str
    note: str = ""


# --- single numbers -------------------------------------------------------------------------------


def percent(value: Any, digits: int = 1) -> str:
    """Return a share in [0, 1] as `93.8 %`."""
    return NOT_THERE if _absent(value) else f"{_minus(100 * float(value), digits)}{PERCENT}"


def points(value: Any, digits: int = 1) -> str:
    """Return a difference of shares as `+12.5 points`."""
    return NOT_THERE if _absent(value) else f"{_signed(100 * float(value), digits)} points"


def number(value: Any, digits: int = 3) -> str:
    """Return `0.125`, or `1.2e-07` where that many digits would show only zeros."""
    if _absent(value):
        return NOT_THERE
    value = float(value)
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return _minus(value, digits)


def fixed(value: Any, digits: int = 2) -> str:
    """Return `0.12`, and `0.00` for next to nothing: for scores whose scale everybody knows."""
    return NOT_THERE if _absent(value) else _minus(float(value), digits)


def count(value: Any, noun: str = "") -> str:
    """Return `1,797 images`; the noun loses its `s` for one."""
    if _absent(value):
        return NOT_THERE
    whole = int(value)
    word = noun[:-1] if whole == 1 and noun.endswith("s") else noun
    return f"{whole:,} {word}".strip()


def p_value(value: Any) -> str:
    """Return `p = 0.031`, or `p < 0.001` below that."""
    if _absent(value):
        return NOT_THERE
    return "p < 0.001" if float(value) < 0.001 else f"p = {float(value):.3f}"


def byte_size(value: Any) -> str:
    """Return a size in the largest unit that leaves at least one, powers of 1024."""
    if _absent(value):
        return NOT_THERE
    size = float(value)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def moment(text: Any) -> str:
    """Return an ISO time as `23 Nov 2026, 20:49 UTC`; anything else as it is."""
    try:
        when = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text or NOT_THERE)
    return f"{when.day} {when:%b %Y, %H:%M} UTC"


def span(interval: Document | None, kind: str = "percent") -> str:
    """Return the 95 % interval alone: `92.0 to 95.8 %`.

    Args:
        interval: `value`, `low` and `high`.
        kind: `percent` of a share, `points` of a difference of shares, or `number`.
    """
    low: Any = (interval or {}).get("low")
    high: Any = (interval or {}).get("high")
    if _absent(low) or _absent(high):
        return NOT_THERE
    if kind == "number":
        return f"{number(low)} to {number(high)}"
    if kind == "points":
        return f"{_signed(100 * low, 1)} to {_signed(100 * high, 1)}"
    return f"{_minus(100 * low, 1)} to {_minus(100 * high, 1)}{PERCENT}"


def model_title(source: Any) -> str:
    """Return a network's source without the folders that one machine has."""
    return re.split(r"[/\\]", str(source))[-1] if source else NOT_THERE


def group_sentence(group: Document) -> str:
    """Return what an error group shares, and the artefact behind it where there is one."""
    artefact = group.get("artefact")
    return " ".join(str(one["sentence"]) for one in (group, artefact) if one)


def layer_title(name: str, alias: str | None = None) -> str:
    """Return `block5_conv3 (features.28)`, or the name alone where there is no other alias."""
    return f"{alias} ({name})" if alias and alias != name else name


def method_title(method: str) -> str:
    """Return a saliency method as it is written in prose: `Grad-CAM`."""
    return _METHODS.get(method, method)


# --- sentences ------------------------------------------------------------------------------------


def verdict_headline(verdict: Document, aliases: Mapping[str, str] | None = None) -> str:
    """Return the verdict of a scan in one sentence."""
    layers = [str(name) for name in verdict.get("layers") or []]
    titles = [layer_title(name, (aliases or {}).get(name)) for name in layers]
    match verdict.get("verdict"):
        case "localized" if titles:
            return f"One layer stands out: {titles[0]}."
        case "spread" if titles:
            return (
                f"The fault is spread over {count(len(titles), 'layers')}; none stands out alone."
            )
        case "none":
            return "No layer stands out."
    return "This scan left no verdict that can be read."


def decision_headline(repair: Document) -> str:
    """Return what became of a repair in one sentence."""
    before, after = (_at(repair, side, "accuracy", "value") for side in ("before", "after"))
    change = f"held-out accuracy went from {percent(before)} to {percent(after)}"
    match repair.get("decision"):
        case "accepted":
            return f"Repair accepted: {change}."
        case "rejected":
            return f"Repair rejected: {change}."
    if repair.get("status") == "failed":
        return f"The repair failed: {repair.get('failure') or 'no reason was recorded'}."
    return "The repair has not finished; there is no decision yet."


def export_headline(proof: Document | None) -> str:
    """Return the state of the ONNX export in one sentence."""
    if proof is None:
        return "Not exported yet."
    images = count(proof.get("images"), "images")
    if proof.get("status") == "passed":
        return f"The ONNX model gives the same top answer as the network on all of {images}."
    return f"The export failed its check on {images}: do not ship this file."


# --- key numbers ----------------------------------------------------------------------------------


def scan_figures(info: Document) -> list[Figure]:
    """Return the key numbers of a scan, from `run.json`."""
    metrics = _at(info, "metrics", "all") or {}
    worst = metrics.get("worst_class") or {}
    return [
        _share("Accuracy", metrics.get("accuracy")),
        _share("Precision, mean of classes", metrics.get("precision")),
        _share("Recall, mean of classes", metrics.get("recall")),
        Figure(
            label="Cross entropy",
            value=number(_at(metrics, "cross_entropy", "value")),
            note=_note(metrics.get("cross_entropy"), "number"),
        ),
        Figure(
            label="Worst class",
            value=percent(worst.get("value")),
            note=f"{worst.get('name', NOT_THERE)}, {count(worst.get('n'), 'images')}",
        ),
        Figure(
            label="Images",
            value=count(_at(info, "data", "images")),
            note=f"{count(_at(info, 'data', 'skipped'))} skipped",
        ),
    ]


def repair_figures(repair: Document) -> list[Figure]:
    """Return the key numbers of a repair, from `repair.json`."""
    test = _at(repair, "difference", "mcnemar") or {}
    gain = _at(repair, "difference", "accuracy")
    return [
        _share("Accuracy before", _at(repair, "before", "accuracy")),
        _share("Accuracy after", _at(repair, "after", "accuracy")),
        Figure(
            label="Difference",
            value=points(_at(gain or {}, "value")),
            note=_note(gain, "points"),
        ),
        Figure(
            label="McNemar test",
            value=p_value(test.get("p_value")),
            note=f"{count(test.get('fixed'))} fixed, {count(test.get('broken'))} broken",
        ),
        Figure(
            label="Map similarity, SSIM",
            value=number(_at(repair, "ssim", "value")),
            note=_note(repair.get("ssim"), "number"),
        ),
        _share("Worst class after", _at(repair, "after", "worst_class")),
    ]


def penalty_sentences(repair: Document) -> list[str]:
    """Return whether the penalty earned its place, then what the further controls say."""
    penalty = repair.get("penalty") or {}
    first = penalty.get("sentence")
    return [str(one) for one in penalty.get("sentences") or ([first] if first else [])]


def comparison_rows(repair: Document) -> list[dict[str, str]]:
    """Return network, repair and controls side by side, as text for a table."""
    rows = [("Before", "The network as it was", repair.get("before"), None)]
    loss = _at(repair, "config", "loss") or "the configured loss"
    rows.append(
        ("Repair", f"Trained with the loss {loss}", repair.get("after"), repair.get("difference"))
    )
    for control in repair.get("controls") or []:
        name = f"Control: {control.get('name', NOT_THERE)}"
        description = str(control.get("description") or "")
        rows.append((name, description, control.get("after"), control.get("difference")))
    return [_comparison_row(*row) for row in rows]


def proof_rows(proof: Document) -> list[tuple[str, str]]:
    """Return what the export check found, as pairs of question and answer, from `onnx.json`."""
    equal, images = proof.get("top1_equal"), proof.get("images")
    tolerance = f"largest allowed {number(proof.get('tolerance'))}"
    return [
        ("onnx.checker", str(proof.get("checker", NOT_THERE))),
        ("Same top answer", f"{count(equal)} of {count(images, 'images')}"),
        ("Different top answer", _counted(proof.get("top1_mismatches"))),
        ("Largest absolute error", f"{number(proof.get('max_abs_error'))}, {tolerance}"),
        ("Largest relative error", number(proof.get("max_rel_error"))),
        ("Batch sizes tried", _listed(proof.get("batches"))),
        ("Run by", _listed(proof.get("providers"))),
        ("Changed initializers", _counted(proof.get("changed_initializers"))),
        ("Opset", str(proof.get("opset", NOT_THERE))),
        ("File size", byte_size(proof.get("bytes"))),
        ("SHA-256", str(proof.get("sha256", NOT_THERE))),
    ]


# --- pieces ---------------------------------------------------------------------------------------


def _comparison_row(
    name: str, description: str, metrics: Document | None, difference: Document | None
) -> dict[str, str]:
    metrics, difference = metrics or {}, difference or {}
    return {
        "Network": name,
        "What it is": description,
        "Accuracy": percent(_at(metrics, "accuracy", "value")),
        "95 % interval": span(metrics.get("accuracy")),
        "Cross entropy": number(_at(metrics, "cross_entropy", "value")),
        "Worst class": percent(_at(metrics, "worst_class", "value")),
        "Difference": points(_at(difference, "accuracy", "value")) if difference else "",
        "McNemar": p_value(_at(difference, "mcnemar", "p_value")) if difference else "",
    }


def _share(label: str, interval: Document | None) -> Figure:
    return Figure(label=label, value=percent(_at(interval or {}, "value")), note=_note(interval))


def _note(interval: Document | None, kind: str = "percent") -> str:
    text = span(interval, kind)
    return "" if text == NOT_THERE else f"95{PERCENT}: {text}"


def _at(document: Document, *keys: str) -> Any:
    """Return what lies at a path of keys, None where any of them is missing."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _listed(values: Any) -> str:
    return ", ".join(map(str, values)) if values else NOT_THERE


def _minus(value: float, digits: int) -> str:
    """Return a number with a true minus sign, and none before a zero."""
    sign = "\N{MINUS SIGN}" if round(value, digits) < 0 else ""
    return f"{sign}{abs(value):,.{digits}f}"


def _counted(names: Any) -> str:
    """Return how many there are and the first of their names; a bare number as it is."""
    if not isinstance(names, list):
        return count(names)
    shown = f": {', '.join(map(str, names[:NAMES_SHOWN]))}" if names else ""
    return f"{count(len(names))}{shown}{', and more' if len(names) > NAMES_SHOWN else ''}"


def _signed(value: float, digits: int) -> str:
    text = _minus(value, digits)
    return text if round(value, digits) < 0 else f"+{text}"


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
