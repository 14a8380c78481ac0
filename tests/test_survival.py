"""Full disks, read-only folders, two scans at once, an interrupt: one line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from audit.errors import RunError
from audit.files import replacing, write_arrays, write_bytes, write_json, write_table
from audit.runs import list_runs, open_run
from audit.scan import ScanConfig, ScanRequest, scan_model
from tests.conftest import PROJECT

if TYPE_CHECKING:
    from tests.shapes import Shapes

ROOT = os.name == "posix" and os.geteuid() == 0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, or where none can be mounted a folder whose files may not grow so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        ROOT
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)],
            check=False,
            capture_output=True,
        ).returncode
    )
    if mounted:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    with _file_size_limit(2**20):
        yield disk


class _file_size_limit:  # reads as a statement
    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        import resource

        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG in its place
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: Any) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def _with_torch(path: Path) -> None:
    with replacing(path) as temporary:
        torch.save({"weight": torch.zeros(10**6)}, temporary)


def _with_safetensors(path: Path) -> None:
    with replacing(path) as temporary:
        save_file({"weight": torch.zeros(10**6)}, temporary)


WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: write_bytes(path, bytes(4_000_000)),
    "json": lambda path: write_json(path, {"text": "x" * 4_000_000}),
    "parquet": lambda path: write_table(
        path, pa.table({"x": np.random.default_rng(0).random(500_000)})
    ),
    "npz": lambda path: write_arrays(path, maps=np.random.default_rng(0).random(500_000)),
    "torch": _with_torch,
    "safetensors": _with_safetensors,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_and_leaves_the_earlier_file(small_disk: Path, name: str) -> None:
    target = small_disk / "result.pt"  # torch wants a suffix
    write_bytes(target, b"earlier")
    with pytest.raises(OSError) as caught:
        WRITERS[name](target)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"earlier"
    assert [path.name for path in small_disk.iterdir()] == ["result.pt"]


# A user who may not read root's Python: everything is imported before root's rights are given up.
AS_NOBODY = """
import os, sys
from audit.cli import main
arguments = sys.argv[1:]
try:
    sys.argv = ["audit", *arguments, "--out", os.devnull + "/runs"]  # fails where the next one will
    main()
except SystemExit:
    pass
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
print("now", file=sys.stderr)
sys.argv = ["audit", *arguments, "--out", "shut/runs"]
main()
"""


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def last_line(finished: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in finished.stderr and "internal error" not in finished.stderr
    return finished.stderr.splitlines()[-1]


def test_a_scan_on_a_full_disk_ends_in_one_line(
    shapes: Shapes, small_disk: Path, tmp_path: Path
) -> None:
    earlier = small_disk / "earlier.bin"
    with pytest.raises(OSError):
        write_bytes(small_disk / "none", bytes(2**21))
    earlier.write_bytes(bytes(2**20 - 40_000))
    finished = run(
        *("-m", "audit", "scan", shapes.damaged, "--data", shapes.photos, "--limit", "30"),
        *("--layers", "block2*", "--out", small_disk / "runs"),
        cwd=tmp_path,
    )
    if finished.returncode == 0:  # only the size of single files is limited here
        return
    assert finished.returncode == 1
    line = last_line(finished)
    assert line.startswith("error: No space left on device: ") and "free some space" in line
    assert earlier.stat().st_size == 2**20 - 40_000
    assert not list(small_disk.rglob(".partial-*"))
    for record in small_disk.rglob("*.json"):
        json.loads(record.read_text())


def test_a_read_only_folder_is_said_in_one_line(shapes: Shapes, tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o555)
    if ROOT:  # the folders of pytest are root's own
        for folder in (tmp_path, *tmp_path.parents[:2], *shapes.damaged.parents[:2]):
            folder.chmod(folder.stat().st_mode | 0o055)
    finished = run(
        *("-c", AS_NOBODY, "scan", shapes.damaged, "--data", shapes.photos, "--limit", "20"),
        cwd=tmp_path,
    )
    assert finished.returncode == 1, finished.stderr
    _, told = finished.stderr.split("now\n")
    assert "Traceback" not in told
    assert told.splitlines()[-1] == (
        "error: Permission denied: shut/runs; check the permissions, or write to another folder "
        "with --out"
    )
    assert list((tmp_path / "shut").iterdir()) == []


def test_two_scans_into_one_folder_do_not_mix(shapes: Shapes, tmp_path: Path) -> None:
    arguments = ["scan", shapes.damaged, "--data", shapes.photos, "--limit", "20"]
    arguments += ["--layers", "predictions", "--out", tmp_path / "runs"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "audit", *map(str, arguments), "--seed", str(seed)],
            env=ENVIRONMENT,
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for seed in (1, 2)
    ]
    assert [one.wait(timeout=200) for one in both] == [0, 0]
    runs = list_runs(tmp_path / "runs")
    assert sorted(run.info["seed"] for run in runs) == [1, 2]
    for run in runs:
        config = ScanConfig(limit=20, layers="predictions", seed=run.info["seed"])
        request = ScanRequest(model=str(shapes.damaged), data=shapes.photos, out=tmp_path / "alone")
        alone = scan_model(request, config)
        assert run.images.equals(alone.images)
        assert run.layers.equals(alone.layers)


def test_an_interrupt_ends_cleanly_and_keeps_what_was_done(shapes: Shapes, tmp_path: Path) -> None:
    scanning = subprocess.Popen(
        [
            *(sys.executable, "-m", "audit", "scan", str(shapes.damaged)),
            *("--data", str(shapes.photos), "--out", str(tmp_path / "runs")),
        ],
        env=ENVIRONMENT,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert scanning.stderr is not None
    for line in scanning.stderr:
        if line.startswith("trial repairs"):
            scanning.send_signal(signal.SIGINT)
            break
    _, told = scanning.communicate(timeout=120)
    assert scanning.returncode == 130, told
    assert "Traceback" not in told and told.splitlines()[-1] == "interrupted"
    (run,) = list_runs(tmp_path / "runs")
    assert run.status == "failed" and "interrupted" in run.info["failure"]
    assert (run.path / "groups.json").is_file()  # the step before was finished
    assert not list(run.path.rglob(".partial-*"))
    with pytest.raises(RunError):
        _ = open_run(run.path).verdict
