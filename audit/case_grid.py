"""Cases 1 to 4 as a table that can be opened: by what they were, and what a repair made of them.

A repair's table has 4 x 4 cells, cases before (rows) and after (columns); a scan's has 2 x 2, right
or wrong by accurate or not. Counts are those of `repair.json` and `run.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from audit.after_section import CASE_NAMES
from audit.cases import CASES
from audit.wording import count, percent

__all__ = ["CaseCell", "CaseGrid", "CaseRow", "moves_grid", "scan_grid"]

Document = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CaseCell:
    """One cell.

    Attributes:
        tone: `good` where the images went to a better case, `bad` to a worse one, else `same`.
        depth: How strongly it is colored, in percent.
        href: Where its images can be seen, empty where nowhere.
    """

    count: str
    share: str
    said: str
    tone: str
    depth: float
    href: str = ""


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    name: str
    cells: tuple[CaseCell, ...]


@dataclass(frozen=True, kw_only=True)
class CaseGrid:
    """A table of cases. `over` stands above its columns, `corner` above its rows."""

    caption: str
    over: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[CaseRow, ...]


def moves_grid(
    repair: Document, href: Callable[[int, int], str] = lambda before, after: ""
) -> CaseGrid | None:
    """Return a repair's images by case before and after, None where they were not judged.

    Args:
        repair: `repair.json`.
        href: Where the images of one cell can be seen, by their cases before and after.
    """
    cases = repair.get("cases") or {}
    table, images = cases.get("table"), cases.get("images")
    if not table or not images:
        return None
    by = {"masks": "by masks", "votes": "by votes"}
    source = by.get(str(cases.get("source")), "by the proxy")
    return CaseGrid(
        caption=f"{count(images, 'images')} of the test split, maps judged {source}. Blue: to a "
        "better case; orange: to a worse one.",
        over="After the repair",
        corner="Before",
        columns=CASE_NAMES,
        rows=tuple(
            CaseRow(
                name=name,
                cells=tuple(
                    _cell(
                        int(number),
                        images,
                        f"case {before} before, case {after} after",
                        _direction(before, after),
                        href(before, after),
                    )
                    for after, number in zip(CASES, row, strict=True)
                ),
            )
            for before, (name, row) in enumerate(zip(CASE_NAMES, table, strict=True), start=1)
        ),
    )


def scan_grid(info: Document, href: Callable[[int], str] = lambda case: "") -> CaseGrid | None:
    """Return a scan's images by case, None where it has none.

    Args:
        info: `run.json`.
        href: Where the images of one case can be seen.
    """
    cases = info.get("cases") or {}
    whole = (cases.get("table") or [{}])[0]
    if not whole.get("n"):
        return None
    tones = {1: "good", 2: "same", 3: "bad", 4: "bad"}

    def cell(case: int) -> CaseCell:
        number = int(whole[f"case{case}"]["count"])
        return _cell(number, whole["n"], f"case {case}", tones[case], href(case))

    return CaseGrid(
        caption=f"{count(whole['n'], 'images')} of the scan whose maps were judged.",
        over="",
        corner="Prediction",
        columns=("Map accurate", "Map inaccurate"),
        rows=(
            CaseRow(name="Right", cells=(cell(1), cell(3))),
            CaseRow(name="Wrong", cells=(cell(2), cell(4))),
        ),
    )


def _cell(number: int, images: int, what: str, tone: str, href: str) -> CaseCell:
    share = number / images
    return CaseCell(
        count=count(number),
        share=percent(share),
        said=f"{count(number, 'images')}: {what}",
        tone=tone,
        depth=round(100 * share, 1),
        href=href if number else "",
    )


def _direction(before: int, after: int) -> str:
    """Return whether being right and having an accurate map went up or down together."""

    def worth(case: int) -> int:
        return (case in (1, 3)) + (case in (1, 2))

    change = worth(after) - worth(before)
    return "good" if change > 0 else "bad" if change < 0 else "same"
