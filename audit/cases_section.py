"""Cases 1 to 4 in words and tables, for the report and for the command line.

Everything comes from `cases` in `run.json`; runs that were made before have none. Wherever the
source is the proxy its name stands beside the figures, with what it was measured to be worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audit.cases import CASES
from audit.wording import Figure, count, layer_title, method_title, number, percent, span

__all__ = ["PROXY_CAUTION", "TITLES", "cases_section", "cases_title"]

CLASS_LIMIT = 40
TITLES = {
    1: "Right, accurate map",
    2: "Wrong, accurate map",
    3: "Right, inaccurate map",
    4: "Wrong, inaccurate map",
}
PROXY_CAUTION = (
    "A proxy, not the truth, and a weak one: on 960 composed pictures whose masks are known it "
    "agreed poorly with them (Cohen's kappa 0.28, 95 % 0.21 to 0.35; AUROC 0.75). The network's "
    "own probability of the true class told accurate maps apart better (AUROC 0.82) without any "
    "map. Do not decide by these cases; a scan with --masks gives some that can be relied on."
)
NUMBERS = ("Images", *(f"Case {case}" for case in CASES))


def cases_title(cases: Mapping[str, Any]) -> str:
    """Return what the cases are and where they come from, in one line."""
    by = {"masks": "by masks", "votes": "by votes", "proxy": "by proxy"}
    return f"Cases 1 to 4, {by.get(str(cases.get('source')), 'source not known')}"


def cases_section(
    info: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return what the report's section shows, None where a run has no cases.

    Args:
        info: The run's record, `run.json`.
    """
    cases = info.get("cases") or {}
    table = cases.get("table") or []
    if not table or not (table[0].get("n") or cases.get("note")):
        return None
    layer = str(cases.get("layer", ""))
    proxy = cases.get("source") == "proxy"
    whole, classes = table[0], [row for row in table[1:] if row.get("n")]
    classes.sort(key=lambda row: (-row["case3"]["value"], -row["case4"]["value"]))
    return {
        "title": cases_title(cases),
        "caption": f"{method_title(str(cases.get('method', '')))} maps of "
        f"{layer_title(layer, (aliases or {}).get(layer))} for the true class. "
        f"{cases.get('rule', '')}",
        "caution": str(cases.get("note") or (PROXY_CAUTION if proxy else "")),
        "caution_title": "These cases come from a proxy"
        if proxy
        else "The threshold may not fit these objects",
        "figures": [
            Figure(
                label=f"Case {case}: {TITLES[case].lower()}{' (proxy)' if proxy else ''}",
                value=percent(whole[f"case{case}"]["value"]),
                note=f"{count(whole[f'case{case}']['count'], 'images')}, "
                f"95 %: {span(whole[f'case{case}'])}",
            )
            for case in CASES
            if whole["n"]
        ],
        "rows": [_row(row) for row in (whole, *classes[:CLASS_LIMIT])] if classes else [],
        "rows_title": "Class by class, by proxy" if proxy else "Class by class",
        "rows_note": f"By true class, most of case 3 first{_shown(len(classes))}. "
        "Shares with 95 % Wilson intervals.",
        "facts": _facts(cases),
    }


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"Class": str(row["class"]) if row["class"] is not None else "All images"}
    cells["Images"] = count(row["n"])
    for case in CASES:
        share = row[f"case{case}"]
        cells[f"Case {case}"] = f"{percent(share['value'], 0)} [{_ends(share)}]"
    return cells


def _ends(share: Mapping[str, Any]) -> str:
    return f"{100 * share['low']:.0f}, {100 * share['high']:.0f}"


def _shown(classes: int) -> str:
    return f", {CLASS_LIMIT} of {classes} classes" if classes > CLASS_LIMIT else ""


def _facts(cases: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the cases rest on: how many images, which masks, the mean scores."""
    scores, masks = cases.get("scores") or {}, cases.get("masks")
    judged = count(cases.get("images"), "images")
    if cases.get("without"):
        judged += f"; {count(cases['without'])} further ones have no case"
    facts = [("Maps judged", judged)]
    if masks:
        used = f"{masks.get('path')}: {count(masks.get('matched'))} belong to an image"
        if masks.get("unused"):
            used += f", {count(masks['unused'])} to none that was scanned"
        if refused := masks.get("refused_files"):
            used += (
                f"; {count(masks.get('refused'))} could not be used, such as "
                f"{refused[0]['path']}: {refused[0]['reason']}"
            )
        facts.append(("Masks", used))
    if energy := scores.get("energy_inside"):
        chance = percent(scores.get("energy_by_chance"))
        shown = f"{percent(energy['value'])}, 95 %: {span(energy)}; by chance {chance}"
        facts.append(("Energy inside the mask, mean", shown))
    if hits := scores.get("pointing_hits"):
        facts.append(("Peak inside the mask", f"{percent(hits['value'])}, 95 %: {span(hits)}"))
    if proxy := scores.get("faithfulness"):
        shown = f"{number(proxy['value'])}, 95 %: {span(proxy, 'number')}"
        facts.append(("Proxy, mean probability from the region alone", shown))
    return facts
