"""The images of a run as one table to filter, sort and search, with what a repair changed.

Only the columns that a filter or a card can show are read, as Arrow, and every filter works on
whole columns: twenty thousand images take milliseconds. Nothing here knows of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from audit.errors import RunError
from audit.gallery import outcome
from audit.runs import RepairFolder, Run

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ORDERS", "OUTCOMES", "ImageTable", "Query", "open_image_table"]

SCAN_COLUMNS = ("path", "label_name", "predicted_name", "right", "p_true", "p_predicted", "case",
                "split")  # fmt: skip
REPAIR_COLUMNS = ("predicted_before_name", "right_before", "p_true_before", "predicted_after_name",
                  "right_after", "p_true_after", "ssim", "case_before", "case_after")  # fmt: skip
OUTCOMES = ("right", "wrong", "fixed", "broken")
ORDERS = {
    "maps": "With maps first",
    "run": "As in the run",
    "unsure": "Least sure of the label first",
    "sure": "Surest answers first",
    "changed": "Maps changed most first",
    "name": "By name",
}


@dataclass(frozen=True, kw_only=True)
class Query:
    """Which images, in which order. None, empty and the widest range leave a filter out.

    Attributes:
        search: Part of the path, in any case.
        labels: Names of true classes.
        answers: Names of predicted classes, before a repair.
        outcome: One of `OUTCOMES`; fixed and broken only with a repair.
        case: Case by the scan.
        case_before: Case before the repair, of the images whose maps it judged.
        case_after: Case after it.
        group: Error group of the scan.
        confidence: Range of the probability of the label, before a repair.
        similarity: Range of the SSIM of maps before and after.
        order: One of `ORDERS`.
    """

    search: str = ""
    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    outcome: str | None = None
    case: int | None = None
    case_before: int | None = None
    case_after: int | None = None
    split: str | None = None
    group: str | None = None
    confidence: tuple[float, float] = (0.0, 1.0)
    similarity: tuple[float, float] = (-1.0, 1.0)
    order: str = "maps"


@dataclass(frozen=True, kw_only=True)
class ImageTable:
    """One row an image.

    Attributes:
        rows: `SCAN_COLUMNS`, then `REPAIR_COLUMNS` (null where the repair did not judge the image),
            `outcome`, and where its maps are kept: `scan_place` and `repair_place` in the galleries
            of the run and of the repair, null where they are not.
        groups: Paths of the images in each error group, by the group's id.
        titles: What each group is called.
    """

    rows: pa.Table
    groups: Mapping[str, Sequence[str]]
    titles: Mapping[str, str]

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def has(self, column: str) -> bool:
        """Return whether any image has a value there."""
        return int(self.rows[column].null_count) < len(self)

    def values(self, column: str) -> list[Any]:
        """Return the values of a column, each once, sorted."""
        import pyarrow.compute as pc

        return sorted(pc.unique(self.rows[column].drop_null()).to_pylist())

    def find(self, query: Query) -> np.ndarray:
        """Return the rows that pass the query's filters, in its order."""
        import pyarrow.compute as pc

        mask = self._mask(query)
        found = np.arange(len(self)) if mask is None else np.flatnonzero(_flags(mask))
        if query.order == "run":
            return found
        column, ascending = {
            "unsure": ("p_true", True),
            "sure": ("p_predicted", False),
            "changed": ("ssim", True),
            "name": ("path", True),
        }.get(query.order, ("", True))
        if not column:
            return found[np.argsort(self._interest()[found], kind="stable")]
        direction = "ascending" if ascending else "descending"
        part = self.rows[column].take(found)
        order = pc.sort_indices(part, sort_keys=[("", direction)])
        return np.asarray(found[order.to_numpy()])

    def row(self, place: int) -> dict[str, Any]:
        return dict(self.rows.slice(int(place), 1).to_pylist()[0])

    def place(self, path: str) -> int | None:
        """Return the row of an image, None where there is none of that path."""
        import pyarrow.compute as pc

        found = int(pc.index(self.rows["path"], path).as_py())
        return None if found < 0 else found

    def _interest(self) -> np.ndarray:
        """Return a rank of every image: kept maps first, of those what a repair changed."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kept = [_flags(pc.is_valid(self.rows[name])) for name in ("repair_place", "scan_place")]
        order = pa.array(["broken", "fixed", "wrong", "right"])
        outcomes = pc.index_in(self.rows["outcome"], value_set=order).to_numpy()
        none = ~(kept[0] | kept[1])
        return np.asarray(np.where(none, 8, np.where(kept[0], 0, 4) + outcomes))

    def _mask(self, query: Query) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        rows, masks = self.rows, []
        if query.search.strip():
            masks.append(pc.match_substring(rows["path"], query.search.strip(), ignore_case=True))
        named = {"label_name": query.labels, "predicted_name": query.answers}
        masks += [
            pc.is_in(rows[name], pa.array(wanted, pa.string()))
            for name, wanted in named.items()
            if wanted
        ]
        equal = {
            "outcome": query.outcome,
            "case": query.case,
            "case_before": query.case_before,
            "case_after": query.case_after,
            "split": query.split,
        }
        masks += [pc.equal(rows[name], value) for name, value in equal.items() if value is not None]
        ranges = {"p_true": (query.confidence, (0.0, 1.0)), "ssim": (query.similarity, (-1.0, 1.0))}
        for name, ((low, high), whole) in ranges.items():
            if (low, high) != whole:
                masks.append(
                    pc.and_(pc.greater_equal(rows[name], low), pc.less_equal(rows[name], high))
                )
        if query.group is not None:
            members = list(self.groups.get(query.group, ()))
            masks.append(pc.is_in(rows["path"], pa.array(members, pa.string())))
        mask = None
        for one in masks:
            mask = one if mask is None else pc.and_(mask, one)
        return mask


def open_image_table(run: Run, repair: RepairFolder | None) -> ImageTable:
    """Return the images of a run and what a repair of it made of them.

    Raises:
        RunError: The images' table of the run is missing or damaged. Where that of the repair is,
            or an index of maps, or the groups, the images are shown without.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = run.image_columns(*SCAN_COLUMNS)
    paths = table["path"].combine_chunks()
    later = _repair_rows(repair)
    at = None if later is None else pc.index_in(paths, value_set=later["path"].combine_chunks())
    for name in REPAIR_COLUMNS:
        column = pa.nulls(len(table)) if later is None else later[name].take(at)
        table = table.append_column(name, column)
    for name, folder in (("scan_place", run), ("repair_place", repair)):
        kept = pa.array(_gallery_paths(folder), pa.string())
        table = table.append_column(name, pc.index_in(paths, value_set=kept))
    table = table.append_column("outcome", _outcomes(table))
    groups = _groups(run)
    return ImageTable(
        rows=table,
        groups={str(one["id"]): [str(path) for path in one.get("paths") or ()] for one in groups},
        titles={str(one["id"]): str(one.get("sentence") or one["id"]) for one in groups},
    )


def _repair_rows(repair: RepairFolder | None) -> pa.Table | None:
    if repair is None:
        return None
    try:
        return repair.image_columns("path", *REPAIR_COLUMNS)
    except RunError:  # a repair under way; the page of the repair says so
        return None


def _gallery_paths(folder: Run | RepairFolder | None) -> list[str]:
    if folder is None:
        return []
    try:
        return [str(entry.get("path", entry["id"])) for entry in folder.gallery["images"]]
    except (RunError, KeyError, TypeError):
        return []


def _groups(run: Run) -> list[dict[str, Any]]:
    try:
        return list(run.groups["groups"])
    except RunError:  # the page of the groups says so
        return []


def _outcomes(table: pa.Table) -> pa.ChunkedArray:
    """Return `outcome` of every image, one whole column after the other."""
    import pyarrow as pa
    import pyarrow.compute as pc

    before = pc.coalesce(table["right_before"].cast(pa.bool_()), table["right"])
    after = pc.coalesce(table["right_after"].cast(pa.bool_()), before)
    words = {
        (b, a): outcome({"right": b, "right_after": a})
        for b in (True, False)
        for a in (True, False)
    }
    return pc.if_else(
        before,
        pc.if_else(after, words[True, True], words[True, False]),
        pc.if_else(after, words[False, True], words[False, False]),
    )


def _flags(mask: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False))
