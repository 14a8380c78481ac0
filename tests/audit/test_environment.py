"""What a process tells of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells it on Linux alone")
def test_the_peak_of_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    child = "from audit.environment import peak_memory_mib; print(peak_memory_mib())"
    parent = (
        "import subprocess, sys; held = bytearray(b'x') * 2**30;"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    told = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    ).stdout
    assert 50 < float(told) < 900  # Python and torch; the parent held 1,024
