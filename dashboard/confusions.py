"""Which class is taken for which: counted over a scan, or before and after a repair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from audit.runs import RepairFolder, Run

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["confusion_changes", "confusion_counts"]

SHOWN = 12


def confusion_counts(run: Run) -> list[dict[str, str]]:
    """Return pairs of label and mistaken class, most frequent first."""
    table = run.image_columns("label_name", "predicted_name", "right")
    ranked = sorted(
        _pairs(table, "predicted_name", "right").items(), key=lambda item: (-item[1], item[0])
    )
    return [
        {"Label": label, "Taken for": mistaken, "Images": str(images)}
        for (label, mistaken), images in ranked[:SHOWN]
    ]


def confusion_changes(repair: RepairFolder) -> list[dict[str, str]]:
    """Return pairs of label and mistaken class with their counts, largest change first."""
    table = repair.image_columns(
        *("label_name", "right_before", "right_after"),
        *("predicted_before_name", "predicted_after_name"),
    )
    counts = {
        when: _pairs(table, f"predicted_{when}_name", f"right_{when}")
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
        for (label, mistaken), (before, after) in ranked[:SHOWN]
    ]


def _pairs(table: pa.Table, predicted: str, right: str) -> dict[tuple[str, str], int]:
    import pyarrow.compute as pc

    wrong = table.filter(pc.invert(table[right]))
    groups = wrong.group_by(["label_name", predicted]).aggregate([([], "count_all")])
    return {
        (str(row["label_name"]), str(row[predicted])): int(row["count_all"])
        for row in groups.to_pylist()
    }
