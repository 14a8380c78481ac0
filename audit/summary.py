"""What a scan came to, as the command line prints it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audit.cases import CASES
from audit.cases_section import PROXY_CAUTION, TITLES, cases_title
from audit.runs import Run

__all__ = ["layers_table", "scan_summary"]

SHOWN_LAYERS = 8


def scan_summary(run: Run) -> RenderableType:
    """Return the outcome of a finished scan: verdict, reasons, accuracy, the first layers."""
    verdict = run.verdict
    layers = verdict["layers"]
    conclusion = {
        "localized": f"localized in {layers[0] if layers else ''}",
        "spread": f"spread over {len(layers)} layers, first {layers[0] if layers else ''}",
        "none": "no layer at fault",
    }[verdict["verdict"]]
    lines: list[RenderableType] = [Text(f"Verdict: {conclusion}", style="bold")]
    lines += [Text(f"- {reason}") for reason in verdict["reasons"]]
    lines += [Text(line) for line in _group_lines(run.groups)]
    lines.append(_accuracy_table(run.info["metrics"]))
    lines += _case_lines(run.info.get("cases") or {})
    lines.append(_ranking_table(run))
    data = run.info["data"]
    lines.append(
        Text(
            f"{data['images']} images scanned, {data['skipped']} files left out; "
            f"{run.info['timings_s']['total']:.0f} s."
        )
    )
    lines.append(Text(f"Run folder: {run.path}"))
    return Group(*lines)


def layers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of ``audit layers``."""
    table = Table("layer", "aliases", "kind", "shape", "parameters")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        aliases = ", ".join(row["aliases"])
        table.add_row(
            Text(row["name"]), Text(aliases), row["kind"], shape, f"{row['parameters']:,}"
        )
    return table


def _group_lines(document: Mapping[str, Any]) -> list[str]:
    """Return one line per error group, or that there is none."""
    if "tests" not in document:
        return []
    if not document["groups"]:
        return [f"Error groups: none among {document['errors']} errors beats chance."]
    return ["Error groups:", *(f"- {group['sentence']}" for group in document["groups"])]


def _accuracy_table(metrics: Mapping[str, Any]) -> Table:
    table = Table("images", "count", "accuracy [95 %]", "cross entropy", "worst class")
    for name, numbers in metrics.items():
        accuracy, worst = numbers["accuracy"], numbers["worst_class"]
        table.add_row(
            name,
            str(numbers["n"]),
            f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]",
            f"{numbers['cross_entropy']['value']:.3f}",
            Text(f"{worst['name']} {worst['value']:.0%}"),
        )
    return table


def _case_lines(cases: Mapping[str, Any]) -> list[RenderableType]:
    """Return the cases over all images as a table, a proxy with its caution; nothing without."""
    table = cases.get("table") or []
    if not table or not table[0]["n"]:
        return []
    shown = Table("case", "images", "share [95 %]", title=cases_title(cases), title_justify="left")
    for case in CASES:
        share = table[0][f"case{case}"]
        ends = f"[{share['low']:.1%}, {share['high']:.1%}]"
        shown.add_row(
            f"{case}. {TITLES[case].lower()}", str(share["count"]), f"{share['value']:.1%} {ends}"
        )
    caution = PROXY_CAUTION if cases.get("source") == "proxy" else cases.get("note")
    return [shown, Text(caution)] if caution else [shown]


def _ranking_table(run: Run) -> Table:
    table = Table(
        "rank", "layer", "held-out error removed [95 %]", "relative gradient norm", "gradient SNR"
    )
    ranked = run.layers.dropna(subset=["rank"]).sort_values("rank")
    for row in ranked.head(SHOWN_LAYERS).to_dict("records"):
        gain = (row["trial_gain"], row["trial_gain_low"], row["trial_gain_high"])
        name = row["name"] + (f" ({row['alias']})" if row["alias"] else "")
        table.add_row(
            str(int(row["rank"])),
            Text(name),
            "{:z.0%} [{:z.0%}, {:z.0%}]".format(*gain),
            _number(row["relative_gradient_norm"]),
            _number(row["gradient_snr"]),
        )
    return table


def _number(value: float) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
