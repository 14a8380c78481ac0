"""What was found, what was done about it, and whether it helped."""

from __future__ import annotations

import streamlit as st

from audit.errors import RunError
from audit.rendering import part
from audit.report import COMPARISON_NUMBERS, appendix, export_summary, repair_tone
from audit.runs import RepairFolder, Run
from audit.wording import (
    comparison_rows,
    decision_headline,
    layer_title,
    model_title,
    moment,
    penalty_sentences,
    repair_figures,
    scan_figures,
    verdict_headline,
)
from dashboard.selection import aliases, command, problems_shown, selected


def main() -> None:
    run, repair = selected()
    _show_state(run)
    with problems_shown():
        _show_verdict(run)
    if repair is not None:
        _show_repair(repair)
        with problems_shown():
            _show_export(repair)
    if run.info.get("metrics"):
        st.html(part("section", "The network as scanned", "On every image of the scan."))
        st.html(part("figures", scan_figures(run.info)))
    if repair is None:
        _show_next_step(run)
    with st.expander("How it was made"):
        for name, facts in appendix(run, repair):
            st.html(part("section", name) + part("pairs", facts))


def _show_state(run: Run) -> None:
    if run.status == "running":
        sentence = "This scan is still running; what it has written so far is shown."
        st.html(part("banner", "open", sentence))
    elif run.status == "failed":
        reason = run.info.get("failure") or "no reason was recorded"
        st.html(part("banner", "bad", f"This scan failed: {reason}."))


def _show_verdict(run: Run) -> None:
    model = run.info.get("model") or {}
    eyebrow = f"{model_title(model.get('source', run.name))}, scanned {moment(run.created_utc)}"
    if run.status == "running" and not (run.path / "verdict.json").is_file():
        st.html(part("headline", eyebrow, "No verdict yet."))
        return
    verdict = run.verdict
    reasons = [str(reason) for reason in verdict.get("reasons") or []]
    st.html(part("headline", eyebrow, verdict_headline(verdict, aliases(run)), reasons))


def _show_next_step(run: Run) -> None:
    try:
        layers = run.verdict.get("layers") or []
    except RunError:  # said at the top of the page
        return
    if layers and run.status == "complete":
        st.markdown("Retrain this layer alone, beside its controls:")
        st.code(command(run, "repair", "layer", "--name", str(layers[0])), language=None)


def _show_repair(repair: RepairFolder) -> None:
    info = repair.info
    title = layer_title(repair.layer, info.get("alias"))
    st.html(part("section", f"Repair of {title}", f"Started {moment(repair.created_utc)}."))
    reasons = [str(reason) for reason in info.get("reasons") or []]
    st.html(part("banner", repair_tone(repair), decision_headline(info), reasons))
    if not info.get("after"):
        return
    st.html(part("figures", repair_figures(info)))
    sentences = penalty_sentences(info)
    if sentences:
        tone = "good" if (info.get("penalty") or {}).get("earned") else "open"
        st.html(part("banner", tone, "Did the penalty earn its place?", sentences))
    st.html(part("section", "Beside its controls", "Same images, same compute."))
    st.html(part("table", comparison_rows(info), COMPARISON_NUMBERS))


def _show_export(repair: RepairFolder) -> None:
    export = export_summary(repair)
    st.html(part("section", "Export"))
    st.html(part("banner", export["tone"], export["headline"], export["reasons"]))


main()
