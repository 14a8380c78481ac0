"""One repair: whether it is accepted and why, beside its controls; and a form that starts one."""

from __future__ import annotations

from typing import Any

import streamlit as st

from audit.after_section import after_sentences
from audit.case_grid import moves_grid
from audit.errors import RunError
from audit.rendering import part
from audit.report import (
    COMPARISON_NUMBERS,
    TEST_NUMBERS,
    class_rows,
    classes_note,
    material_sentences,
    repair_facts,
    repair_tone,
    test_rows,
)
from audit.runs import RepairFolder, Run
from audit.wording import (
    comparison_rows,
    decision_headline,
    layer_title,
    moment,
    penalty_sentences,
    repair_figures,
)
from dashboard import address
from dashboard.charts import history_chart
from dashboard.confusions import confusion_changes
from dashboard.job_view import may_start, show_job, start
from dashboard.selection import aliases, problems_shown, selected
from repair.config import AUTO, OPTIMIZERS, RepairConfig
from repair.losses import LOSSES
from repair.rates import RATES

DEFAULTS = RepairConfig()


def main() -> None:
    run, repair = selected()
    show_job(run, "repair")
    if repair is None:
        st.html(part("section", "Repair"))
        st.html(part("banner", "open", "This run has no repair yet."))
    else:
        _show_repair(repair)
    if run.status == "complete" and may_start(run):
        with problems_shown():
            _show_form(run, open_at_once=repair is None)


def _show_repair(repair: RepairFolder) -> None:
    info = repair.info
    title = layer_title(repair.layer, info.get("alias"))
    st.html(part("section", f"Repair of {title}", f"Started {moment(repair.created_utc)}."))
    sentences = penalty_sentences(info)
    if sentences:
        tone = "good" if (info.get("penalty") or {}).get("earned") else "open"
        st.html(part("banner", tone, "Did the penalty earn its place?", sentences))
    reasons = [str(reason) for reason in info.get("reasons") or []]
    st.html(part("banner", repair_tone(repair), decision_headline(info), reasons))
    if info.get("after"):
        _show_numbers(info)
        with problems_shown():
            _show_confusions(repair)
    with problems_shown():
        _show_history(repair)
    facts = repair_facts(info)
    if facts:
        st.html(part("section", "What was trained, and what was not"))
        st.html(part("pairs", facts))


def _show_numbers(info: dict[str, Any]) -> None:
    st.html(part("figures", repair_figures(info)))
    told = material_sentences(info)
    if told:
        st.html(part("section", "What it learned from", " ".join(told)))
    st.html(part("section", "Beside its controls", "Same images, same compute."))
    st.html(part("table", comparison_rows(info), COMPARISON_NUMBERS))
    tests = test_rows(info)
    if tests:
        note = "Paired, on the same test images; a control is compared with the repair."
        st.html(part("section", "Tests", note))
        st.html(part("table", tests, TEST_NUMBERS))
    grid = moves_grid(
        info, lambda before, after: address.link("images", case_before=before, case_after=after)
    )
    told = after_sentences(info)
    if told or grid is not None:
        st.html(part("section", "Beyond accuracy", " ".join(told)))
    if grid is not None:
        st.html(part("case_table", grid))
    note = f"On images that training never saw: {classes_note(info.get('before') or {})}"
    st.html(part("section", "Accuracy of each class, before and after", note))
    st.html(part("legend", [("bad", "before"), ("good", "after")]))
    st.html(part("forest", class_rows(info.get("before") or {}, info["after"])))


def _show_confusions(repair: RepairFolder) -> None:
    rows = confusion_changes(repair)
    note = "Images of one class taken for another."
    st.html(part("section", "Confusions that changed most", note))
    if rows:
        st.html(part("table", rows, ("Before", "After", "Change")))
    else:
        st.caption("No confusion became more or less frequent.")


def _show_history(repair: RepairFolder) -> None:
    if repair.status == "running" and not (repair.path / "history.parquet").is_file():
        return
    history = repair.history
    st.html(part("section", "Training", "The dot marks the epoch that was kept."))
    st.altair_chart(history_chart(history), width="stretch")


# --- starting one ---------------------------------------------------------------------------------


def _show_form(run: Run, *, open_at_once: bool) -> None:
    known = aliases(run)
    names = [str(name) for name in run.layers.sort_values("rank", na_position="last")["name"]]
    try:
        flagged = run.flagged_layer or run.best_by_trial
    except RunError:
        flagged = None
    with st.expander("Repair a layer", expanded=open_at_once), st.form("repair-form", border=False):
        layer = st.selectbox(
            "Layer, most likely at fault first",
            names,
            index=names.index(flagged) if flagged in names else 0,
            format_func=lambda name: layer_title(name, known.get(name)),
        )
        with st.container(horizontal=True):
            loss = st.selectbox("Loss", [AUTO, *LOSSES], width=160)
            optimizer = st.selectbox("Optimizer", OPTIMIZERS, width=160)
            epochs = st.number_input("Epochs", 1, 1000, DEFAULTS.epochs, width=160)
            rate = st.selectbox(
                "Learning rate",
                [AUTO, *(f"{rate:g}" for rate in RATES["sgd"])],
                accept_new_options=True,
                help="auto: of several the one that does best in a few epochs. Another one can be "
                "typed in.",
                width=160,
            )
            seed = st.number_input("Seed", 0, 2**31 - 1, DEFAULTS.seed, width=160)
        controls = st.toggle(
            "Train its controls too", value=True, help="Several times as long; proves what helped."
        )
        st.caption(
            "Runs on the machine of this dashboard, as the user who started it, with the images "
            "and the model where the scan found them."
        )
        if st.form_submit_button("Start the repair", type="primary"):
            start(
                "repair",
                run,
                [
                    f"--name={layer}",
                    f"--loss={loss}",
                    f"--optimizer={optimizer}",
                    f"--epochs={int(epochs)}",
                    f"--lr={rate}",
                    f"--seed={int(seed)}",
                    *([] if controls else ["--no-controls"]),
                ],
            )


main()
