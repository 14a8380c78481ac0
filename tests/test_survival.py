"""Full disks, read-only folders, two scans at once, an interrupt: one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from audit.errors import RunError
from audit.runs import list_runs, open_run
from audit.scan import ScanConfig, ScanRequest, scan_model
from tests.conftest import PROJECT

if TYPE_CHECKING:
    from tests.shapes import Shapes

ROOT = os.name == "posix" and os.geteuid() == 0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


# Each program runs with a file system of 1 MiB at `disk`: a tmpfs in a mount namespace of its own,
# which is gone with the process. Where there is no right to mount, no file may grow beyond that.
WRITERS = """
import errno, gc, json
from pathlib import Path
import numpy as np, pyarrow as pa, torch
from safetensors.torch import save_file
from audit.files import replacing, write_arrays, write_bytes, write_json, write_table

def by_torch(path):
    with replacing(path) as temporary:
        torch.save({"weight": torch.zeros(10**6)}, temporary)

def by_safetensors(path):
    with replacing(path) as temporary:
        save_file({"weight": torch.zeros(10**6)}, temporary)

numbers = np.random.default_rng(0).random(500_000)
writers = {
    "bytes": lambda path: write_bytes(path, bytes(4_000_000)),
    "json": lambda path: write_json(path, {"text": "x" * 4_000_000}),
    "parquet": lambda path: write_table(path, pa.table({"x": numbers})),
    "npz": lambda path: write_arrays(path, maps=numbers),
    "torch": by_torch,
    "safetensors": by_safetensors,
}
disk = Path("disk")
told = {}
for name, write in writers.items():
    target = disk / f"{name}.pt"
    write_bytes(target, b"earlier")
    try:
        write(target)
    except OSError as error:
        number = errno.errorcode[error.errno]
        told[name] = [number, error.filename, target.read_bytes().decode()]
    gc.collect()  # torch's writer holds on to its file
left = sorted(path.name for path in disk.iterdir())
print(json.dumps({"told": told, "left": left}))
"""
FILLED = """
from pathlib import Path
(Path("disk") / "earlier.bin").write_bytes(bytes(2**20 - 40_000))
from audit.cli import main
main()
"""
LIMITED = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
LIMITED += "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
MOUNTED = 'mount -t tmpfs -o size=1m none disk && exec "$@"'


def on_small_disk(
    program: str, *arguments: str | Path, cwd: Path
) -> subprocess.CompletedProcess[str]:
    (cwd / "disk").mkdir()
    namespace = ["unshare", "--mount", "sh", "-c"]
    can_mount = (
        ROOT
        and not subprocess.run(
            [*namespace, MOUNTED, "sh", "true"], cwd=cwd, check=False, capture_output=True
        ).returncode
    )
    if can_mount:
        return run(*namespace, MOUNTED, "sh", sys.executable, "-c", program, *arguments, cwd=cwd)
    return run(sys.executable, "-c", LIMITED + program, *arguments, cwd=cwd)


def test_a_full_disk_is_said_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    finished = on_small_disk(WRITERS, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    names = ("bytes", "json", "parquet", "npz", "torch", "safetensors")
    assert list(answer["told"]) == list(names)
    for name, (number, file, content) in answer["told"].items():
        assert number in ("ENOSPC", "EFBIG"), name
        assert (file, content) == (f"disk/{name}.pt", "earlier")
    assert answer["left"] == sorted(f"{name}.pt" for name in names)  # and no half file


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
        [*map(str, arguments)],
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


def test_a_scan_on_a_full_disk_ends_in_one_line(shapes: Shapes, tmp_path: Path) -> None:
    finished = on_small_disk(
        FILLED,
        *("scan", shapes.damaged, "--data", shapes.photos, "--limit", "30"),
        *("--layers", "block2*", "--out", "disk/runs"),
        cwd=tmp_path,
    )
    if finished.returncode == 0:  # where only the size of single files is limited
        return
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr and "internal error" not in finished.stderr
    line = finished.stderr.splitlines()[-1]
    assert line.startswith("error: No space left on device: disk/runs/")
    assert "free some space and run again; what was finished before is whole" in line


def test_a_read_only_folder_is_said_in_one_line(shapes: Shapes, tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o555)
    if ROOT:  # the folders of pytest are root's own
        own = [one for one in tmp_path.parents if one.name.startswith(("pytest-", "popen-"))]
        for folder in (tmp_path, *own):
            folder.chmod(folder.stat().st_mode | 0o055)
        subprocess.run(["chmod", "-R", "a+rX", str(shapes.damaged.parent)], check=True)
    finished = run(
        *(
            sys.executable,
            "-c",
            AS_NOBODY,
            "scan",
            shapes.damaged,
            "--data",
            shapes.photos,
            "--limit",
            "20",
        ),
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
        # What a shell starts in the background ignores interrupts, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
