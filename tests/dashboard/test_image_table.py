"""Filters and orders of the images against plain loops over the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from audit.errors import RunError
from audit.runs import Run
from dashboard.image_table import ImageTable, Query, open_image_table
from tests.run_builder import build_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build_run(tmp_path_factory.mktemp("runs"), repairs=("accepted",), images=240)


@pytest.fixture(scope="module")
def table(run: Run) -> ImageTable:
    return open_image_table(run, run.repairs[0])


def _joined(run: Run) -> list[dict[str, Any]]:
    later = {row["path"]: row for row in run.repairs[0].images.to_dict("records")}
    rows = []
    for row in run.images.to_dict("records"):
        after = later.get(row["path"], {})
        before = after.get("right_before", row["right"])
        now = after.get("right_after", before)
        outcome = ("fixed" if now else "wrong") if not before else "right" if now else "broken"
        rows.append({**after, **row, "outcome": outcome})
    return rows


def test_every_image_is_there_once_with_what_the_repair_made_of_it(
    run: Run, table: ImageTable
) -> None:
    expected = _joined(run)
    assert len(table) == len(expected)
    for place, row in enumerate(expected):
        found = table.row(place)
        assert (found["path"], found["outcome"]) == (row["path"], row["outcome"])
        assert found["predicted_after_name"] == row.get("predicted_after_name")
        assert table.place(row["path"]) == place


@pytest.mark.parametrize(
    ("query", "passes"),
    [
        (Query(search="ONE/00"), lambda row: "one/00" in row["path"]),
        (Query(labels=("two", "five")), lambda row: row["label_name"] in ("two", "five")),
        (Query(answers=("zero",)), lambda row: row["predicted_name"] == "zero"),
        (Query(outcome="fixed"), lambda row: row["outcome"] == "fixed"),
        (Query(case=3), lambda row: row["case"] == 3),
        (
            Query(case_before=3, case_after=1),
            lambda row: (row.get("case_before"), row.get("case_after")) == (3, 1),
        ),
        (
            Query(split="val", outcome="wrong"),
            lambda row: row["split"] == "val" and not row["right"],
        ),
        (Query(confidence=(0.2, 0.6)), lambda row: 0.2 <= row["p_true"] <= 0.6),
        (Query(similarity=(-0.5, 0.05)), lambda row: -0.5 <= row.get("ssim", 1.0) <= 0.05),
    ],
)  # fmt: skip
def test_a_filter_keeps_what_a_loop_keeps(  # type: ignore[no-untyped-def]
    run: Run, table: ImageTable, query: Query, passes
) -> None:
    expected = [place for place, row in enumerate(_joined(run)) if passes(row)]
    found = table.find(query)
    assert sorted(found.tolist()) == expected and expected
    in_order = table.find(Query(**{**vars(query), "order": "run"}))
    assert in_order.tolist() == expected


def test_the_images_of_a_group_are_those_of_its_paths(run: Run, table: ImageTable) -> None:
    paths = run.groups["groups"][0]["paths"]
    assert [table.row(place)["path"] for place in table.find(Query(group="group-1"))] != []
    found = {table.row(place)["path"] for place in table.find(Query(group="group-1"))}
    assert found == set(paths)


@pytest.mark.parametrize(
    ("order", "key"),
    [
        ("unsure", lambda row: row["p_true"]),
        ("sure", lambda row: -row["p_predicted"]),
        ("name", lambda row: row["path"]),
    ],
)
def test_orders_are_those_of_a_sort(run: Run, table: ImageTable, order: str, key) -> None:  # type: ignore[no-untyped-def]
    expected = [row["path"] for row in sorted(_joined(run), key=key)]
    assert [table.row(place)["path"] for place in table.find(Query(order=order))] == expected


def test_images_with_maps_come_first_and_what_changed_before_the_rest(
    run: Run, table: ImageTable
) -> None:
    rank = {"broken": 0, "fixed": 1, "wrong": 2, "right": 3}
    rows = [table.row(place) for place in table.find(Query(order="maps"))]
    kept = len(run.repairs[0].gallery["images"])
    assert all(row["repair_place"] is not None for row in rows[:kept])
    ranks = [rank[row["outcome"]] for row in rows[:kept]]
    assert ranks == sorted(ranks)
    assert rows[-1]["scan_place"] is None


def test_only_the_columns_that_are_asked_for_are_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    read: list[str] = []
    before = pyarrow.parquet.ParquetFile.read

    def spy(self: Any, columns: list[str] | None = None) -> Any:
        read.extend(columns or ["all of them"])
        return before(self, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", spy)
    assert run.image_columns("split", "path").column_names == ["split", "path"]
    assert sorted(read) == ["path", "split"]


def test_a_damaged_table_is_one_clear_line(run: Run, tmp_path: Path) -> None:
    broken = build_run(tmp_path, images=120)
    (broken.path / "images.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"images\.parquet is damaged"):
        open_image_table(broken, None)
