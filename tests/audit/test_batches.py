"""Batches halve themselves where memory runs out, and what is computed stays the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from audit.batches import BatchLimit, NoMemoryError, is_out_of_memory
from tests.conftest import PROJECT

TOLD = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


def fits(most: int, tried: list[int], error: Exception | None = None):  # type: ignore[no-untyped-def]
    """Return work on stretches of images that fails above so many."""

    def work(rows: slice) -> list[int]:
        size = rows.stop - rows.start
        tried.append(size)
        if size > most:
            raise error or RuntimeError(TOLD)
        return list(range(rows.start, rows.stop))

    return work


@pytest.mark.parametrize(("images", "most"), [(10, 10), (10, 4), (7, 1), (1, 1), (0, 1)])
def test_every_image_is_worked_on_once_and_in_order(images: int, most: int) -> None:
    done = [image for part in BatchLimit().parts(fits(most, []), images) for image in part]
    assert done == list(range(images))


def test_what_did_not_fit_once_is_not_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    limit, tried = BatchLimit(8), list[int]()
    for _ in range(2):
        list(limit.parts(fits(3, tried), 8))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    told = "out of memory with 8 images at a time; going on with 4"
    assert capsys.readouterr().err.splitlines()[0] == told


def test_a_whole_pass_begins_anew_with_half_the_size() -> None:
    tried: list[int] = []

    def work(size: int) -> str:
        tried.append(size)
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "done"

    limit = BatchLimit(32)
    assert (limit.whole(work), limit.whole(work)) == ("done", "done")
    assert tried == [32, 16, 8, 8]


def test_a_single_image_that_does_not_fit_is_one_clear_line() -> None:
    with pytest.raises(NoMemoryError, match="a single image does not fit in memory; use"):
        list(BatchLimit().parts(fits(0, []), 4))


def test_other_errors_are_not_swallowed() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="sizes of tensors"):
        list(BatchLimit().parts(fits(1, tried, RuntimeError("sizes of tensors differ")), 4))
    assert tried == [4]


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(OSError("out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space reliably")
def test_a_real_limit_of_memory_is_survived() -> None:
    program = """
import resource, torch
from pathlib import Path
from audit.batches import BatchLimit
torch.set_num_threads(1)
layer = torch.nn.Conv2d(3, 64, 3, padding=1)
images = torch.ones(16, 3, 128, 128)
with torch.no_grad():
    expected = layer(images[:1]).double().sum().item() * 16
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + 40 * 2**20  # one pass of 16 images takes 64 MiB for its result alone
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    limit = BatchLimit()
    sums = list(limit.parts(lambda rows: layer(images[rows]).double().sum().item(), 16))
print(limit.size, abs(sum(sums) - expected) < 1e-6 * abs(expected))
"""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    size, equal = finished.stdout.split()
    assert int(size) < 16 and equal == "True"
    assert "out of memory with 16 images at a time; going on with 8" in finished.stderr
