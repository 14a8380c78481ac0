"""A dashboard on a free port, for scripts and benchmarks that look at its pages."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

__all__ = ["served"]


@contextlib.contextmanager
def served(runs: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the dashboard while the block lasts; yield its address and its process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dashboard", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urlopen(f"http://localhost:{port}/_stcore/health"):
                break
            time.sleep(0.25)
        yield f"http://localhost:{port}", process
    finally:
        process.terminate()
        process.wait(timeout=30)
