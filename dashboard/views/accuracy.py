"""Who is right how often: classes before and after, confusions, and the training itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from audit.after_section import CASE_COLUMNS, after_sentences, case_moves
from audit.rendering import part
from audit.report import class_rows, classes_note
from audit.runs import RepairFolder, Run
from dashboard.charts import history_chart
from dashboard.selection import problems_shown, selected

if TYPE_CHECKING:
    import pandas as pd

CONFUSIONS = 12


def main() -> None:
    run, repair = selected()
    if repair is not None and repair.info.get("after"):
        _show_repair(repair)
    else:
        _show_scan(run)


def _show_repair(repair: RepairFolder) -> None:
    info = repair.info
    note = f"On images that training never saw: {classes_note(info.get('before') or {})}"
    st.html(part("section", "Accuracy of each class, before and after", note))
    st.html(part("legend", [("bad", "before"), ("good", "after")]))
    st.html(part("forest", class_rows(info.get("before") or {}, info["after"])))
    told, moves = after_sentences(info), case_moves(info)
    if told:
        st.html(part("section", "Beyond accuracy", " ".join(told)))
    if moves:
        st.html(part("table", moves, CASE_COLUMNS))
    with problems_shown():
        images = repair.images
        st.html(
            part(
                "section", "Confusions that changed most", "Images of one class taken for another."
            )
        )
        rows = confusion_changes(images)
        if rows:
            st.html(part("table", rows, ("Before", "After", "Change")))
        else:
            st.caption("No confusion became more or less frequent.")
    with problems_shown():
        history = repair.history
        st.html(part("section", "Training", "The dot marks the epoch that was kept."))
        st.altair_chart(history_chart(history), width="stretch")


def _show_scan(run: Run) -> None:
    metrics: dict[str, Any] = (run.info.get("metrics") or {}).get("all") or {}
    st.html(
        part(
            "section",
            "Accuracy of each class",
            f"On every image of the scan: {classes_note(metrics)}",
        )
    )
    if not metrics:
        st.html(part("banner", "open", "This scan has measured nothing yet."))
        return
    st.html(part("legend", [("good", "accuracy")]))
    st.html(part("forest", class_rows(metrics)))
    with problems_shown():
        rows = confusion_counts(run.images)
        st.html(
            part("section", "Most frequent confusions", "Images of one class taken for another.")
        )
        if rows:
            st.html(part("table", rows, ("Images",)))
        else:
            st.caption("Every image was recognized.")


def confusion_changes(images: pd.DataFrame) -> list[dict[str, str]]:
    """Return pairs of label and mistaken class with their counts, largest change first."""
    counts = {
        when: _pairs(images, f"predicted_{when}_name", images[f"right_{when}"])
        for when in ("before", "after")
    }
    pairs = {pair: (counts["before"].get(pair, 0), counts["after"].get(pair, 0))
             for pair in {**counts["before"], **counts["after"]}}  # fmt: skip
    changed = [(pair, both) for pair, both in pairs.items() if both[0] != both[1]]
    ranked = sorted(changed, key=lambda item: (-abs(item[1][1] - item[1][0]), item[0]))
    return [
        {
            "Label": label,
            "Taken for": mistaken,
            "Before": str(before),
            "After": str(after),
            "Change": f"{after - before:+d}".replace("-", "\N{MINUS SIGN}"),
        }
        for (label, mistaken), (before, after) in ranked[:CONFUSIONS]
    ]


def confusion_counts(images: pd.DataFrame) -> list[dict[str, str]]:
    """Return pairs of label and mistaken class, most frequent first."""
    pairs = _pairs(images, "predicted_name", images["right"])
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"Label": label, "Taken for": mistaken, "Images": str(images_)}
        for (label, mistaken), images_ in ranked[:CONFUSIONS]
    ]


def _pairs(images: pd.DataFrame, predicted: str, right: pd.Series) -> dict[tuple[str, str], int]:
    wrong = images[~right.astype(bool)]
    groups = wrong.groupby(["label_name", predicted]).size()
    return {(str(label), str(name)): int(size) for (label, name), size in groups.items()}


main()
