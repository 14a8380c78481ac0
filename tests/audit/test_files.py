"""Files are whole or absent, and JSON is strict."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from audit.errors import RunError
from audit.files import (
    json_text,
    read_json,
    replacing,
    sha256_file,
    write_arrays,
    write_bytes,
    write_json,
    write_table,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    write_bytes(target, b"old")

    def fail_halfway() -> None:
        with replacing(target) as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    write_json(target, {"status": "old"})
    program = (
        "import os, sys, pathlib\n"
        "from audit.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('{\"status\": ')\n"
        "    os._exit(9)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert finished.returncode == 9
    assert read_json(target) == {"status": "old"}


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
    assert target.read_bytes() == b"new"


def test_data_is_flushed_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    flush, rename = os.fsync, os.replace

    def recorded_flush(descriptor: int) -> None:
        order.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        flush(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_flush)
    monkeypatch.setattr(os, "replace", recorded_rename)
    write_text(tmp_path / "note.txt", "text")
    assert order == ["file", "rename", "folder"]


def test_missing_folders_are_made_and_files_follow_the_umask(tmp_path: Path) -> None:
    write_text(tmp_path / "maps" / "images" / "note.txt", "grün")
    made = tmp_path / "maps" / "images" / "note.txt"
    assert made.read_text(encoding="utf-8") == "grün"
    plain = tmp_path / "plain.txt"
    plain.touch()
    assert made.stat().st_mode == plain.stat().st_mode


def test_json_takes_what_results_are_made_of(tmp_path: Path) -> None:
    document = {
        "nan": float("nan"),
        "infinite": np.float32("inf"),
        "count": np.int64(3),
        "share": np.float32(0.5),
        "right": np.bool_(True),
        "shape": (1, 2),
        "map": np.array([[0.0, np.nan]]),
        "root": Path("photos") / "cats",
        "layers": {"b", "a"},
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "name": "Müller",
        3: None,
    }
    write_json(tmp_path / "run.json", document)
    assert read_json(tmp_path / "run.json") == {
        "nan": None,
        "infinite": None,
        "count": 3,
        "share": 0.5,
        "right": True,
        "shape": [1, 2],
        "map": [[0.0, None]],
        "root": "photos/cats",
        "layers": ["a", "b"],
        "created": "2026-01-02T00:00:00+00:00",
        "name": "Müller",
        "3": None,
    }
    assert "NaN" not in (tmp_path / "run.json").read_text(encoding="utf-8")


def test_json_names_the_place_of_what_it_cannot_hold() -> None:
    with pytest.raises(TypeError, match=r"document\.config\.loss\[1\] is a object"):
        json_text({"config": {"loss": [1, object()]}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run.json in .*; is it a run folder"),
        (b"", "is damaged .*run the command that wrote it again"),
        (b'{"status": "comp', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[1, 2]", "holds a JSON list, expected an object"),
    ],
)
def test_unreadable_json_is_one_clear_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message) as raised:
        read_json(path)
    assert "\n" not in str(raised.value)


def test_rows_become_a_table_even_where_one_lacks_a_column(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    write_table(path, [{"path": "a.png", "ce": np.float64(0.5)}, {"path": "b.png", "case": 2}])
    assert pyarrow.parquet.read_table(path).to_pylist() == [
        {"path": "a.png", "ce": 0.5, "case": None},
        {"path": "b.png", "ce": None, "case": 2},
    ]


def test_an_arrow_table_keeps_its_types(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    table = pyarrow.table({"label": pyarrow.array([1, 2], pyarrow.int32())})
    write_table(path, table)
    assert pyarrow.parquet.read_table(path).equals(table)


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((3, 4, 5)).astype(np.float16)
    write_arrays(tmp_path / "features.28.npz", maps=maps)
    assert [path.name for path in tmp_path.iterdir()] == ["features.28.npz"]
    with np.load(tmp_path / "features.28.npz") as stored:
        assert stored["maps"].dtype == np.float16
        assert np.array_equal(stored["maps"], maps)


def test_hash_is_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    write_bytes(tmp_path / "model.bin", data)
    assert sha256_file(tmp_path / "model.bin") == hashlib.sha256(data).hexdigest()


def test_json_text_is_what_json_reads_back() -> None:
    assert json.loads(json_text({"a": [1, {"b": 2.5}]})) == {"a": [1, {"b": 2.5}]}
