"""Run folders that were changed by others: refused in one line that names the field or the file."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.errors import RunError
from audit.files import read_json
from audit.gallery import read_pixels
from audit.gate import GateConfig, Limits, gate
from audit.record_shapes import SHAPES, check_record
from audit.report import write_report
from audit.runs import Run, open_run
from tests.run_builder import build_run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs"), repairs=("accepted",), images=60).path


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Run:
    """A copy to be changed."""
    return open_run(Path(shutil.copytree(built, tmp_path / built.name)))


def change(path: Path, *keys: Any, value: Any) -> None:
    """Write another value into a JSON file, at a path of keys."""
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (("metrics",), "none", "metrics is 'none', expected a table"),
        (("metrics", "all", "accuracy"), [], "metrics.all.accuracy is list, expected a table"),
        (("metrics", "all", "accuracy", "value"), "0.9", "value is '0.9', expected a finite"),
        (("metrics", "all", "accuracy", "value"), True, "value is True, expected a finite"),
        (("metrics", "all", "n"), 1.5, "metrics.all.n is 1.5, expected a whole number"),
        (("metrics", "all", "per_class", 1), None, "per_class[1] is None, expected no null"),
        (("model", "classes"), "cat", "model.classes is 'cat', expected a list"),
        (("model", "classes", 0), {}, "model.classes[0] is dict, expected a text"),
        (("data", "skipped_files"), [3], "data.skipped_files[0] is 3, expected a table"),
        (("status",), ["complete"], "status is list, expected a text"),
    ],
)
def test_a_field_of_another_type_is_named(
    run: Run, keys: tuple[Any, ...], value: Any, expected: str
) -> None:
    change(run.path / "run.json", *keys, value=value)
    with pytest.raises(RunError) as caught:
        open_run(run.path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_scan_repair_and_export_write_has_the_known_shapes(run: Run) -> None:
    paths = [path for path in run.path.rglob("*.json") if path.name in SHAPES]
    assert {"run.json", "verdict.json", "index.json", "repair.json"} <= {p.name for p in paths}
    for path in paths:
        check_record(read_json(path), path)


@pytest.mark.parametrize("value", [17.0, -0.2])
def test_a_gate_has_no_opinion_on_numbers_that_cannot_be(run: Run, value: float) -> None:
    change(run.path / "run.json", "metrics", "all", "accuracy", "value", value=value)
    with pytest.raises(RunError, match=f"accuracy of .* is {value}, which it cannot be"):
        gate(open_run(run.path), GateConfig(limits=Limits(min_accuracy=0.5)))


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', '{"a": "\\ud800"}', "[" * 10**5])
def test_what_is_no_strict_json_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "verdict.json").write_text(text)
    with pytest.raises(RunError, match="verdict.json is damaged"):
        read_json(tmp_path / "verdict.json")


def test_whole_characters_from_escapes_are_read(tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "verdict.json") == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("name", ["verdict.json", "groups.json", "maps/index.json"])
def test_a_pipe_in_place_of_a_file_does_not_block(run: Run, name: str) -> None:
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    opened = open_run(run.path)
    write_report(opened)  # with a notice, or without what the file would have said
    with pytest.raises(RunError, match="is no regular file"):
        read_json(run.path / name)


def test_a_column_of_another_type_is_damage(run: Run) -> None:
    path = run.path / "images.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("label")
    pq.write_table(table.set_column(place, "label", pa.array(["cat"] * len(table))), path)
    with pytest.raises(RunError, match="images.parquet is damaged"):
        _ = open_run(run.path).images


def test_a_table_of_a_million_rows_in_a_few_bytes_is_not_read(run: Run) -> None:
    path = run.path / "images.parquet"
    columns = {name: pa.nulls(10**6, pa.int8()) for name in pq.read_schema(path).names}
    pq.write_table(pa.table(columns), path)
    assert path.stat().st_size < 10**5
    with pytest.raises(RunError, match="claims 1,000,000 rows in"):
        _ = open_run(run.path).images


def test_arrays_that_unpack_without_end_or_are_no_maps_are_not_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next((run.path / "maps" / "gradcam").iterdir())
    layer = path.name.removesuffix(".npz")
    monkeypatch.setattr("audit.runs.LARGEST_ARRAYS", 10**6)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("maps.npy", bytes(2 * 10**6))
    with pytest.raises(RunError, match="it unpacks to 2,000,000 bytes"):
        run.maps("gradcam", layer)
    for values in (np.array(["x"]), np.zeros((2, 2)), np.zeros((2, 0, 3)), np.array([{}])):
        np.savez(path, maps=values)
        with pytest.raises(RunError, match="is damaged"):
            run.maps("gradcam", layer)


def test_a_picture_that_is_a_bomb_or_another_format_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (6_000, 6_000)).save(tmp_path / "large.png")
    with pytest.raises(RunError, match="6000 x 6000 pixels"):
        read_pixels(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", format="GIF")
    with pytest.raises(RunError, match="cannot be read"):
        read_pixels(tmp_path / "other.png")
