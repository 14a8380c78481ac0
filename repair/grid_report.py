"""What a grid search came to: a table for the terminal, a heat map, and what mattered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audit.files import replacing

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from repair.grid import Grid


def grid_summary(grid: Grid) -> RenderableType:
    """Return the table of validation accuracies, the best point, and its look at the test split."""
    record = grid.record
    best, plain, test = record["best"], record["best_plain"], record["test"]
    return Group(
        Text(f"Grid of {record['settings']['layer']}", style="bold"),
        _table(record),
        Text(
            f"Best by validation {record['objective']}: learning rate {best['lr']:g}, lambda "
            f"{best['lambda']:g}; plain cross entropy is best at {plain['lr']:g}."
        ),
        Text(_test_line("On the test split, which chose nothing: ", test, "before", "before")),
        Text(_test_line("", test, "plain", "plain cross entropy")),
        Text(importance_line(record["importance"])),
        Text(f"Folder: {grid.folder}"),
    )


def _table(record: Mapping[str, Any]) -> Table:
    rates = sorted({row["lr"] for row in record["trials"]})
    if record["sampler"] != "grid":
        table = Table("learning rate", "lambda", "validation accuracy", "cross entropy", "epoch")
        ranked = sorted(record["trials"], key=lambda row: -row["val_accuracy"])
        for row in ranked[:10]:
            table.add_row(
                f"{row['lr']:.4g}", f"{row['lambda']:.3f}", *_cells(row), str(row["best_epoch"])
            )
        return table
    by_point = {(row["lr"], row["lambda"]): row for row in record["trials"]}
    table = Table("validation accuracy", *(f"lr {rate:g}" for rate in rates))
    for balance in record["lambdas"]:
        cells = []
        for rate in rates:
            row = by_point.get((rate, balance))
            best = row is not None and row == record["best"]
            cells.append(Text(_cell(row), style="bold" if best else ""))
        table.add_row(f"lambda {balance:g}", *cells)
    plain = {row["lr"]: row for row in record["plain"]}
    table.add_row("plain cross entropy", *(_cell(plain.get(rate)) for rate in rates))
    return table


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    diverged = " diverged" if str(row.get("stopped") or "").startswith("diverged") else ""
    return f"{100 * row['val_accuracy']:.1f} %{diverged}"


def _cells(row: Mapping[str, Any]) -> tuple[str, str]:
    return _cell(row), f"{row['val_ce']:.3f}"


def _test_line(start: str, test: Mapping[str, Any], other: str, name: str) -> str:
    ours, theirs = (100 * test[key]["accuracy"]["value"] for key in ("best", other))
    versus = test[f"versus_{other}"]
    value, low, high = (100 * versus["accuracy"][key] for key in ("value", "low", "high"))
    p_value = versus["mcnemar"]["p_value"]
    p_text = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return (
        f"{start}{ours:.1f} % against {theirs:.1f} % {name}, difference {value:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}] (McNemar {p_text})."
    )


def importance_line(importance: Mapping[str, Any]) -> str:
    """Return in one sentence what mattered, or why that cannot be told."""
    if importance["values"] is None:
        return f"What mattered cannot be told: {importance['why']}."
    parts = [f"{name} {100 * share:.0f} %" for name, share in importance["values"].items()]
    return f"Share of the differences that each setting explains (fANOVA): {', '.join(parts)}."


def write_plots(grid: Grid) -> list[Path]:
    """Write grid.png and, where it can be told, importance.png; return their paths."""
    written = [_write(grid.folder / "grid.png", _heat_map(grid.record))]
    if grid.record["importance"]["values"] is not None:
        figure = _importance_plot(grid.record["importance"]["values"])
        written.append(_write(grid.folder / "importance.png", figure))
    return written


def _heat_map(record: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = record["trials"]
    drawn: ScalarMappable
    if record["sampler"] != "grid":
        drawn = axes.scatter(
            [row["lr"] for row in rows],
            [row["lambda"] for row in rows],
            c=[100 * row["val_accuracy"] for row in rows],
        )
        axes.set_xscale("log")
    else:
        rates, balances = sorted(record["rates"]), sorted(record["lambdas"], reverse=True)
        by_point = {(row["lr"], row["lambda"]): row for row in rows}
        values = [[100 * by_point[r, b]["val_accuracy"] for r in rates] for b in balances]
        drawn = axes.imshow(values, cmap="viridis")
        middle = (min(map(min, values)) + max(map(max, values))) / 2
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                color = "white" if value <= middle else "black"
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(balances)), [f"{balance:g}" for balance in balances])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("lambda")
    axes.set_title(f"Validation accuracy, {record['settings']['layer']}")
    figure.colorbar(drawn, ax=axes, label="%")
    return figure


def _importance_plot(values: Mapping[str, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 2.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color="#3b6ea5")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of the objective's variance (fANOVA)")
    return figure


def _write(path: Path, figure: Figure) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path
