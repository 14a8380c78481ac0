"""Where a benchmark leaves its figures: benchmarks/results/NAME.json, and a table on the terminal.

A results file has three parts: `summary` (flat names to numbers, the claims), `config` (versions,
device, threads, seeds: what the numbers depend on) and `rows` (what the summary was made of).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from audit.environment import device_record, versions
from audit.files import json_text, read_json, write_text

RESULTS = Path(__file__).parent / "results"


def configuration(device: str = "cpu", *packages: str, **settings: Any) -> dict[str, Any]:
    """Return what the numbers depend on: versions, device, threads and the script's settings."""
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(*packages),
        "device": device_record(device),
        **settings,
    }


def write_results(
    name: str,
    *,
    summary: Mapping[str, float],
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> Path:
    """Write results/NAME.json, a row a line, and return its path; an earlier one is replaced."""
    path = RESULTS / f"{name}.json"
    head = json_text({"summary": dict(summary), "config": dict(config)}).removesuffix("\n}")
    lines = ",\n".join(
        f"    {json.dumps(json.loads(json_text(row)), ensure_ascii=False)}" for row in rows
    )
    write_text(path, f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')
    return path


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of results/NAME.json; none where there is no such file yet."""
    path = RESULTS / f"{name}.json"
    return list(read_json(path)["rows"]) if path.exists() else []


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, one column per key of the first row."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in rows[0]))
    Console(width=None if Console().is_terminal else 160).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timed(action: Callable[[], Any], *, repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Return the median, smallest and largest seconds of an action, after warming up.

    The processor's seconds stand beside them: on a busy machine they say more.
    """
    for _ in range(warm_up):
        action()
    seconds, processor_seconds = [], []
    for _ in range(repeats):
        _finish_device()
        started_s, started_processor_s = time.perf_counter(), time.process_time()
        action()
        _finish_device()
        seconds.append(time.perf_counter() - started_s)
        processor_seconds.append(time.process_time() - started_processor_s)
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "processor_median_s": statistics.median(processor_seconds),
        "repeats": repeats,
    }


def _finish_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
