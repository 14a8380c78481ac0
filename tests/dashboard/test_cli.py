"""The `dashboard` command: quick to help, clear when it cannot start, open to this machine only."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from dashboard.cli import streamlit_arguments

PROJECT = Path(__file__).resolve().parents[2]


def _dashboard(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dashboard", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_help_imports_neither_streamlit_nor_pandas() -> None:
    check = (
        "import sys, dashboard.cli\n"
        "heavy = {'streamlit', 'pandas', 'torch', 'numpy', 'altair'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], cwd=PROJECT, check=True, timeout=60)
    done = _dashboard("--help")
    assert done.returncode == 0
    assert "--port" in done.stdout and "--host" in done.stdout


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    done = _dashboard(str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr and "audit scan MODEL --data DIR" in done.stderr


def test_a_port_out_of_range_is_wrong_usage(tmp_path: Path) -> None:
    assert _dashboard(str(tmp_path), "--port", "70000").returncode == 2


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        done = _dashboard(str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "--port" in done.stderr


def test_nothing_is_reported_and_nobody_else_is_served_unless_asked() -> None:
    arguments = streamlit_arguments("localhost", 8501)
    assert "--server.address=localhost" in arguments
    assert "--browser.gatherUsageStats=false" in arguments
    assert "--server.headless=true" in arguments


def test_the_server_starts_on_localhost_and_ends_when_told(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dashboard", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert _answer(f"http://localhost:{port}/_stcore/health") == "ok"
        finally:
            server.terminate()
        server.wait(timeout=20)


def _answer(url: str) -> str:
    for _ in range(150):
        try:
            with urlopen(url, timeout=5) as reply:
                return str(reply.read().decode())
        except URLError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url}")
