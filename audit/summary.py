"""What a scan came to, as the command line prints it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audit.cases import CASES
from audit.cases_section import PROXY_CAUTION, TITLES, cases_title
from audit.criteria import Kind
from audit.gate import GateResult, Outcome
from audit.runs import Run
from audit.wording import group_sentence

__all__ = ["gate_failures", "gate_summary", "layers_table", "scan_summary"]

SHOWN_LAYERS = 8


def scan_summary(run: Run) -> RenderableType:
    """Return the outcome of a finished scan: verdict, reasons, accuracy, the first layers."""
    verdict = run.verdict
    conclusion = {
        "localized": f"localized in {run.flagged_layer}",
        "spread": f"spread over {len(verdict['layers'])} layers; to be repaired is "
        f"{run.flagged_layer}",
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
    """Return the table of ``audit layers``, in the order of computation."""
    table = Table("layer", "aliases", "kind", "shape", "parameters", show_footer=True)
    table.columns[0].footer = f"{len(rows)} layers" if len(rows) != 1 else "1 layer"
    table.columns[-1].footer = f"{sum(row['parameters'] for row in rows):,}"
    table.columns[-1].justify = "right"
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        aliases = ", ".join(row["aliases"])
        table.add_row(
            Text(row["name"]), Text(aliases), row["kind"], shape, f"{row['parameters']:,}"
        )
    return table


def gate_summary(result: GateResult) -> RenderableType:
    """Return the outcome of ``audit gate``: every criterion beside what was measured."""
    table = Table("criterion", "required", "measured [95 %]", "images", "result")
    for one in result.outcomes:
        measured, shown = one.measured, partial(_limited, kind=one.kind)
        text = shown(measured.value)
        if measured.low is not None and measured.high is not None:
            text += f" [{shown(measured.low)}, {shown(measured.high)}]"
        about = Text(f"{text}\n{measured.note}" if measured.note else text)
        sense = "at least" if one.sense == "min" else "at most"
        outcome = Text("pass") if one.passed else Text("FAIL", style="bold")
        images = "" if measured.n is None else f"{measured.n:,}"
        table.add_row(Text(one.title), f"{sense} {shown(one.required)}", about, images, outcome)
    subject = f"repair {result.repair}" if result.repair else "the scanned network"
    images = "all images" if result.split == "all" else f"images of the split {result.split}"
    compared = "the nearer end of each interval" if result.confident else "the estimates"
    met, asked = len(result.outcomes) - len(result.failed), len(result.outcomes)
    return Group(
        Text(f"Gate: {subject}, {images}, comparing {compared}", style="bold"),
        table,
        Text(f"{'Passed' if not result.failed else 'Tripped'}: {met} of {asked} criteria met."),
        Text(f"Run folder: {result.run}"),
    )


def gate_failures(result: GateResult) -> str:
    """Return which criteria were not met, in one line."""
    return "the gate tripped: " + "; ".join(_failure(one) for one in result.failed)


def _failure(one: Outcome) -> str:
    # As many digits as it takes to see that they differ.
    pairs = [[_limited(x, one.kind, more) for x in (one.judged, one.required)] for more in range(9)]
    judged, required = next((pair for pair in pairs if pair[0] != pair[1]), pairs[-1])
    word = "below" if one.sense == "min" else "above"
    interval = "" if one.judged == one.measured.value else ", the end of its 95 % interval,"
    return f"{one.title} {judged}{interval} is {word} {required} ({one.option})"


def _limited(value: float, kind: Kind, more: int = 0) -> str:
    match kind:
        case "share":
            return f"{value:.{1 + more}%}"
        case "nats":
            return f"{value:.{3 + more}f}"
        case "count":
            return f"{value:.0f}"


def _group_lines(document: Mapping[str, Any]) -> list[str]:
    """Return one line per error group, or that there is none."""
    if "tests" not in document:
        return []
    if not document["groups"]:
        return [f"Error groups: none among {document['errors']} errors beats chance."]
    return ["Error groups:", *(f"- {group_sentence(group)}" for group in document["groups"])]


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
    if not table:
        return []
    note = cases.get("note")
    if not table[0]["n"]:
        return [Text(f"{cases_title(cases)}: {note}")] if note else []
    shown = Table("case", "images", "share [95 %]", title=cases_title(cases), title_justify="left")
    for case in CASES:
        share = table[0][f"case{case}"]
        ends = f"[{share['low']:.1%}, {share['high']:.1%}]"
        shown.add_row(
            f"{case}. {TITLES[case].lower()}", str(share["count"]), f"{share['value']:.1%} {ends}"
        )
    caution = note or (PROXY_CAUTION if cases.get("source") == "proxy" else "")
    return [shown, Text(caution)] if caution else [shown]


def _ranking_table(run: Run) -> Table:
    table = Table(
        "rank",
        "layer",
        "blame",
        "held-out error removed [95 %]",
        "relative gradient norm",
        "gradient SNR",
    )
    ranked = run.layers.dropna(subset=["rank"]).sort_values("rank")
    for row in ranked.head(SHOWN_LAYERS).to_dict("records"):
        gain = (row["trial_gain"], row["trial_gain_low"], row["trial_gain_high"])
        name = row["name"] + (f" ({row['alias']})" if row["alias"] else "")
        blame = float("nan") if row["blame"] is None else row["blame"]
        table.add_row(
            str(int(row["rank"])),
            Text(name),
            "-" if math.isnan(blame) else f"{blame:.0%}",
            "{:z.0%} [{:z.0%}, {:z.0%}]".format(*gain),
            _number(row["relative_gradient_norm"]),
            _number(row["gradient_snr"]),
        )
    return table


def _number(value: float) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
