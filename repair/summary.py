"""What a repair came to, as the command line prints it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audit.after_section import after_sentences, case_moves
from audit.runs import RepairFolder
from audit.wording import penalty_sentences

Record = Mapping[str, Any]


def repair_summary(repair: RepairFolder) -> RenderableType:
    """Return the outcome of a finished repair: the penalty's verdict, the numbers, the decision."""
    info = repair.info
    layer = info["layer"] + (f" ({info['alias']})" if info.get("alias") else "")
    lines: list[RenderableType] = [
        Text(f"Repair of {layer}: {info['decision']}", style="bold"),
        *(Text(sentence) for sentence in penalty_sentences(info)),
        _metrics_table(info),
        *(Text(f"- {reason}") for reason in info["reasons"]),
        Text(_frozen_line(info["frozen"])),
    ]
    lines += _after(info)
    if info.get("ssim"):
        lines.append(Text(f"Maps before and after: SSIM {_interval(info['ssim'], digits=3)}"))
    if info.get("layers_tried"):
        lines.append(
            Text(f"The layer is the best of {len(info['layers_tried'])} by short repairs of each.")
        )
    kept = "the last" if info["config"].get("keep") == "last" else "by validation"
    lines.append(Text(f"Weights of epoch {info['training']['best_epoch']}, {kept}."))
    if "rates" in info:
        own = info["rates"]["repair"]
        tried = f"the best of {len(own['val_ce'])} that were tried"
        lines.append(Text(f"Learning rate {own['chosen']:g}, {tried}."))
    if info.get("temperature", 1) != 1:
        lines.append(Text(f"Logits were divided by {info['temperature']:.3g} in the loss."))
    lines.append(Text(f"Repair folder: {repair.path}"))
    return Group(*lines)


def transfer_summary(record: Record) -> RenderableType:
    """Return the outcome of a transfer: the penalty's verdict, the numbers, what to do next."""
    lines: list[RenderableType] = [
        Text(f"New head for {', '.join(record['classes'])}", style="bold"),
        Text(record["penalty"]["sentence"]),
    ]
    table = Table("held-out images", "accuracy", "cross entropy", "worst class")
    rows = [("new head", record["after"])]
    if record["control"] is not None:
        rows.append((f"control: {record['control']['name']}", record["control"]["after"]))
    for name, metrics in rows:
        table.add_row(name, *_metrics_cells(metrics))
    lines.append(table)
    if record["ssim"] is not None:
        lines.append(Text(f"Maps beside the control's: SSIM {_interval(record['ssim'], digits=3)}"))
    lines.append(Text(f"Weights of epoch {record['best_epoch']}, by validation."))
    lines.append(Text(f"Model: {record['out']}; go on with `audit scan {record['out']}`"))
    return Group(*lines)


def comparison_summary(record: Record) -> RenderableType:
    """Return both networks side by side, the paired difference, and how alike their maps are."""
    table = Table(f"{record['images']} images", "accuracy", "cross entropy", "worst class", "ECE")
    for which in ("first", "second"):
        metrics = record[which]
        name = Path(metrics["source"]).name
        table.add_row(name, *_metrics_cells(metrics), f"{metrics['calibration_error']:.3f}")
    difference = record["difference"]
    test, accuracy = difference["mcnemar"], difference["accuracy"]
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    lines: list[RenderableType] = [
        table,
        Text(
            f"Second minus first: {value:+.1f} points [{low:+.1f}, {high:+.1f}]; the second is "
            f"right on {test['fixed']} that the first gets wrong, and wrong on {test['broken']} "
            f"that it gets right (McNemar p = {test['p_value']:.3f})."
        ),
        Text(f"Cross entropy: {_interval(difference['cross_entropy'], digits=3)} nats."),
    ]
    if record["maps"] is not None:
        maps = record["maps"]
        lines.append(Text(f"Maps of {maps['layer']}: SSIM {_interval(maps['ssim'], digits=3)}"))
    if record["changed"] is not None:
        names, total = record["changed"]["differing"], record["changed"]["tensors"]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(
            Text(f"Tensors that differ: {len(names)} of {total}{': ' if names else ''}{shown}")
        )
    return Group(*lines)


def _after(info: Record) -> list[RenderableType]:
    """Return what a repair did beyond accuracy."""
    lines: list[RenderableType] = []
    moves = case_moves(info)
    if moves:
        table = Table(*moves[0], title="images by case", title_justify="left")
        for row in moves:
            table.add_row(*row.values())
        lines.append(table)
    return [*lines, *(Text(sentence) for sentence in after_sentences(info))]


def _metrics_table(info: Record) -> Table:
    table = Table("held-out images", "accuracy", "cross entropy", "worst class")
    rows = [("before", info["before"]), ("after", info["after"])]
    rows += [(f"control: {c['name']}", c["after"]) for c in info["controls"]]
    for name, metrics in rows:
        table.add_row(name, *_metrics_cells(metrics))
    return table


def _metrics_cells(metrics: Record) -> tuple[str, str, str]:
    worst = metrics["worst_class"]
    return (
        _percent(metrics["accuracy"]),
        _interval(metrics["cross_entropy"], digits=3),
        f"{100 * worst['value']:.1f} % {worst['name']}" if worst else "",
    )


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
