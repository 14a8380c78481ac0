"""Two processes scan as one does: the same images, the same tables, one that writes.

Whole batches are dealt out, so what is said of an image is the same to the bit; sums over images
come together in another order, and agree within a relative 1e-5.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from audit.errors import RunError
from audit.evidence import Gathering, gather_evidence
from audit.map_scores import Objects
from audit.networks.program import Program
from audit.parallel import Team
from audit.runs import Run, list_runs
from audit.scan import ScanConfig, ScanRequest, scan_model
from tests.audit.example_networks import SIZE, images, labels, network
from tests.conftest import PROJECT
from tests.shapes import Shapes

SETTINGS = ("--limit", "60", "--batch-size", "8", "--device", "cpu")


def scan(shapes: Shapes, out: Path, *arguments: str) -> Any:
    command = [sys.executable, "-m", "audit", "scan", str(shapes.damaged)]
    command += ["--data", str(shapes.photos), "--out", str(out), *SETTINGS, *arguments]
    return subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes: kernels depend on it
    request = ScanRequest(
        model=str(shapes.damaged), data=shapes.photos, out=tmp_path_factory.mktemp("alone")
    )
    yield scan_model(request, ScanConfig(limit=60, batch_size=8, device="cpu"))
    torch.set_num_threads(threads)


def assert_same_scan(run: Run, alone: Run) -> None:
    pd.testing.assert_frame_equal(run.images, alone.images, check_exact=True)
    pd.testing.assert_frame_equal(run.layers, alone.layers, rtol=1e-5, atol=1e-7)
    assert run.verdict["layers"] == alone.verdict["layers"]
    assert run.groups == alone.groups and run.gallery == alone.gallery
    for part in ("data", "metrics", "cases", "model", "config"):
        assert run.info[part] == alone.info[part]
    files = {path.relative_to(run.path) for path in run.path.rglob("*")}
    assert files == {path.relative_to(alone.path) for path in alone.path.rglob("*")}


def test_two_processes_write_the_run_of_one(alone: Run, shapes: Shapes, tmp_path: Path) -> None:
    finished = scan(shapes, tmp_path, "--devices", "2")
    assert finished.returncode == 0, finished.stderr
    (run,) = list_runs(tmp_path)
    assert run.status == "complete"
    assert_same_scan(run, alone)
    # One of the two talks. That torchrun starts a team too is tested with the repair.
    assert finished.stderr.count("gathering evidence (") == 1


class _Broadcast:
    """What Lightning Fabric is to a team of two, seen from one of them."""

    def __init__(self, rank: int, sent: list[Any]) -> None:
        self.global_rank, self.world_size, self.sent = rank, 2, sent

    def broadcast(self, value: Any, src: int) -> Any:
        if self.global_rank == src:
            self.sent.append(value)
        return self.sent[-1]


def test_what_the_first_process_decides_or_refuses_holds_for_all() -> None:
    sent: list[Any] = []
    first, second = (Team(_Broadcast(rank, sent)) for rank in (0, 1))  # type: ignore[arg-type]

    def refuse() -> str:
        raise RunError("no unfinished scan")

    def never() -> str:
        raise AssertionError("the others do not decide")

    assert [first.decided(lambda: "this one"), second.decided(never)] == ["this one"] * 2
    for team, decide in ((first, refuse), (second, never)):
        with pytest.raises(RunError, match="no unfinished scan"):
            team.decided(decide)


# -------------------------------------------------------------------- what is added up


class _Threads:
    """Teams whose processes are threads of this one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.held: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.held[rank] = value
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        return found


class _ThreadTeam(Team):
    def __init__(self, threads: _Threads, rank: int) -> None:
        super().__init__()
        self.threads, self.rank, self.size = threads, rank, threads.size

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        everyones = self.threads.exchange(self.rank, tensors)
        return [sum(parts) for parts in zip(*everyones, strict=True)]  # type: ignore[misc]  # sum starts from 0

    def gathered(self, value: Any) -> list[Any]:
        everyones = self.threads.exchange(self.rank, value)
        return everyones if self.leads else []


@pytest.mark.parametrize("name", ["plain", "residual"])
@pytest.mark.parametrize("processes", [2, 5])  # the fifth has no image
def test_shared_evidence_is_that_of_all_images(name: str, processes: int) -> None:
    program = Program.capture(network(name, torch.float64), SIZE)
    given, targets = images(11, torch.float64), labels(11)
    masks = torch.zeros(11, *SIZE)
    masks[:, 3:9, 2:12] = 1
    layers = list(program.layers)
    threads = _Threads(processes)
    found: list[Any] = [None] * processes

    def gather(rank: int) -> None:
        team = _ThreadTeam(threads, rank)
        gathering = Gathering(program, layers)
        rows = torch.tensor(team.part_by_batch(range(11), 3), dtype=torch.int64)
        for keys in rows.split(3) if len(rows) else ():
            objects = Objects(rows=list(range(len(keys))), masks=masks[keys])
            gathering.add(given[keys], targets[keys], objects=objects, keys=keys)
        gathering.share(team)
        found[rank] = gathering.scores(seed=0)

    working = [threading.Thread(target=gather, args=(rank,)) for rank in range(processes)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    parts = [range(11)[at : at + 3] for at in range(0, 11, 3)]
    everything = iter([Objects(rows=list(range(len(p))), masks=masks[list(p)]) for p in parts])
    expected = gather_evidence(
        program,
        [(given[list(p)], targets[list(p)]) for p in parts],
        layers,
        seed=0,
        objects=everything.__next__,
    )
    for one, other in zip(found[0], expected, strict=True):
        for field in one.__dataclass_fields__:
            mine, whole = getattr(one, field), getattr(other, field)
            if isinstance(mine, float):
                np.testing.assert_allclose(mine, whole, rtol=1e-9, atol=1e-12, err_msg=field)
            elif field == "map_auroc":  # of single images, in their order
                np.testing.assert_equal(mine.as_dict(), whole.as_dict())
            else:
                assert mine == whole


def test_batches_are_dealt_out_whole() -> None:
    teams = [Team() for _ in range(3)]
    for rank, team in enumerate(teams):
        team.rank, team.size = rank, 3
    assert [team.part_by_batch("abcdefghijk", 2) for team in teams] == [
        tuple("abgh"),
        tuple("cdij"),
        tuple("efk"),
    ]
