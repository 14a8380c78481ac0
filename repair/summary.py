"""What a repair or an export came to, as the command line prints it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audit.runs import RepairFolder

Record = Mapping[str, Any]


def repair_summary(repair: RepairFolder) -> RenderableType:
    """Return the outcome of a finished repair: the penalty's verdict, the numbers, the decision."""
    info = repair.info
    layer = info["layer"] + (f" ({info['alias']})" if info.get("alias") else "")
    lines: list[RenderableType] = [
        Text(f"Repair of {layer}: {info['decision']}", style="bold"),
        Text(info["penalty"]["sentence"]),
        _metrics_table(info),
        *(Text(f"- {reason}") for reason in info["reasons"]),
        Text(_frozen_line(info["frozen"])),
    ]
    if info.get("ssim"):
        lines.append(Text(f"Maps before and after: SSIM {_interval(info['ssim'], digits=3)}"))
    lines.append(Text(f"Weights of epoch {info['training']['best_epoch']}, by validation."))
    lines.append(Text(f"Repair folder: {repair.path}"))
    return Group(*lines)


def export_summary(proof: Record, model: Path) -> RenderableType:
    """Return the outcome of an export: passed or failed, and by how much."""
    equal, images = proof["top1_equal"], proof["images"]
    return Group(
        Text(f"ONNX export: {proof['status']}", style="bold"),
        Text(f"Same class on {equal} of {images} held-out images in onnxruntime."),
        Text(
            f"Largest error of a logit: {_number(proof['max_abs_error'], '.2e')} absolute, "
            f"{_number(proof['max_rel_error'], '.2e')} of the largest logit "
            f"(tolerated: {proof['tolerance']:.0e})."
        ),
        *(Text(f"- {reason}") for reason in proof["reasons"]),
        Text(f"Model: {model} ({(proof['bytes'] or 0) / 2**20:.1f} MiB)"),
    )


def _metrics_table(info: Record) -> Table:
    table = Table("held-out images", "accuracy", "cross entropy", "worst class")
    rows = [("before", info["before"]), ("after", info["after"])]
    rows += [(f"control: {c['name']}", c["after"]) for c in info["controls"]]
    for name, metrics in rows:
        worst = metrics["worst_class"]
        table.add_row(
            name,
            f"{_percent(metrics['accuracy'])}",
            _interval(metrics["cross_entropy"], digits=3),
            f"{100 * worst['value']:.1f} % {worst['name']}" if worst else "",
        )
    return table


def _frozen_line(frozen: Record) -> str:
    return (
        f"Bit-identical outside the layer: {frozen['identical']} of {frozen['tensors']} tensors, "
        "by hash."
    )


def _percent(interval: Record) -> str:
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _interval(interval: Record, *, digits: int) -> str:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
