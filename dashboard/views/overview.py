"""What was found, what was done about it, whether it helped, and what is still to decide."""

from __future__ import annotations

import streamlit as st

from audit.errors import RunError
from audit.open_points import open_points
from audit.rendering import part
from audit.report import (
    COMPARISON_NUMBERS,
    appendix,
    class_rows,
    classes_note,
    export_summary,
    repair_tone,
)
from audit.runs import RepairFolder, Run
from audit.wording import (
    comparison_rows,
    decision_headline,
    layer_title,
    model_title,
    moment,
    penalty_sentences,
    percent,
    points,
    repair_figures,
    scan_figures,
    verdict_headline,
)
from dashboard import address
from dashboard.confusions import confusion_counts
from dashboard.selection import aliases, command, listed_runs, problems_shown, selected

RUNS_SHOWN = 30
RUN_NUMBERS = ("Accuracy", "Repairs")
REPAIR_NUMBERS = ("Before", "After", "Difference")


def main() -> None:
    run, repair = selected()
    _show_state(run)
    with problems_shown():
        _show_verdict(run)
    _show_open(run, repair)
    if repair is not None:
        _show_repair(repair)
        with problems_shown():
            _show_export(repair)
    if run.info.get("metrics"):
        st.html(part("section", "The network as scanned", "On every image of the scan."))
        st.html(part("figures", scan_figures(run.info)))
    if repair is None:
        _show_next_step(run)
    _show_folders(run)
    _show_classes(run)
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


def _show_open(run: Run, repair: RepairFolder | None) -> None:
    left = open_points(run, repair)
    if left:
        st.html(part("banner", "open", "Still to decide", left))
    elif run.status == "complete":
        st.html(part("banner", "good", "Nothing is left to decide about this run."))


def _show_next_step(run: Run) -> None:
    try:
        flagged = run.flagged_layer
    except RunError:  # said at the top of the page
        return
    if flagged is not None and run.status == "complete":
        st.markdown("Retrain this layer alone, beside its controls, on the page Repair or by:")
        st.code(command(run, "repair", "layer", "--name", flagged), language=None)


def _show_repair(repair: RepairFolder) -> None:
    info = repair.info
    title = layer_title(repair.layer, info.get("alias"))
    st.html(part("section", f"Repair of {title}", f"Started {moment(repair.created_utc)}."))
    reasons = [str(reason) for reason in info.get("reasons") or []]
    st.html(part("banner", repair_tone(repair), decision_headline(info), reasons))
    if not info.get("after"):
        return
    sentences = penalty_sentences(info)
    if sentences:
        tone = "good" if (info.get("penalty") or {}).get("earned") else "open"
        st.html(part("banner", tone, "Did the penalty earn its place?", sentences))
    st.html(part("figures", repair_figures(info)))
    st.html(part("section", "Beside its controls", "Same images, same compute."))
    st.html(part("table", comparison_rows(info), COMPARISON_NUMBERS))


def _show_export(repair: RepairFolder) -> None:
    export = export_summary(repair)
    st.html(part("section", "Export"))
    st.html(part("banner", export["tone"], export["headline"], export["reasons"]))


def _show_folders(run: Run) -> None:
    """Show the repairs of this run, and the other runs beside it."""
    repairs = [_repair_row(repair) for repair in run.repairs]
    if repairs:
        st.html(part("section", "Repairs of this run", "Newest first."))
        st.html(part("table", repairs, REPAIR_NUMBERS))
    runs = [one for one in listed_runs() if one.name != run.name][:RUNS_SHOWN]
    if runs:
        st.html(part("section", "Other runs", "Newest first; a name opens its run."))
        st.html(part("table", [_run_row(one) for one in runs], RUN_NUMBERS))


def _repair_row(repair: RepairFolder) -> dict[str, str]:
    info = repair.info
    before, after = (
        ((info.get(when) or {}).get("accuracy") or {}).get("value") for when in ("before", "after")
    )
    gain = ((info.get("difference") or {}).get("accuracy") or {}).get("value")
    return {
        "Layer": layer_title(repair.layer, info.get("alias")),
        "href": address.link("repair", repair=repair.name),
        "Started": moment(repair.created_utc),
        "Outcome": repair.decision or repair.status,
        "Before": percent(before),
        "After": percent(after),
        "Difference": points(gain) if gain is not None else "",
    }


def _run_row(run: Run) -> dict[str, str]:
    metrics = (run.info.get("metrics") or {}).get("all") or {}
    try:
        found = verdict_headline(run.verdict, aliases(run))
    except RunError as error:
        found = run.status if run.status != "complete" else str(error)
    return {
        "Model": model_title((run.info.get("model") or {}).get("source", run.name)),
        "href": address.link("", run=run.name, repair=None),
        "Scanned": moment(run.created_utc),
        "Verdict": found,
        "Accuracy": percent((metrics.get("accuracy") or {}).get("value")),
        "Repairs": str(len(run.repairs)),
    }


def _show_classes(run: Run) -> None:
    metrics = (run.info.get("metrics") or {}).get("all") or {}
    if not metrics:
        return
    with st.expander("Accuracy of each class as scanned"):
        st.html(part("section", "Classes", f"On every image of the scan: {classes_note(metrics)}"))
        st.html(part("legend", [("good", "accuracy")]))
        st.html(part("forest", class_rows(metrics)))
        with problems_shown():
            rows = confusion_counts(run)
            note = "Images of one class taken for another."
            st.html(part("section", "Most frequent confusions", note))
            if rows:
                st.html(part("table", rows, ("Images",)))
            else:
                st.caption("Every image was recognized.")


main()
