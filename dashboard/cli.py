"""The `dashboard` command: start the Streamlit app on this machine's own address.

Nothing is sent anywhere: the server listens on localhost unless told otherwise, usage statistics
are off, and every font and script comes from the installed package.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer

from audit.console import run_app
from audit.errors import LayermendError, RunError
from dashboard.study import STUDY_ONLY_VARIABLE, VOTES_VARIABLE

__all__ = [
    "READ_ONLY_VARIABLE",
    "RUNS_VARIABLE",
    "app",
    "main",
    "read_only",
    "streamlit_arguments",
]

RUNS_VARIABLE = "LAYERMEND_RUNS"
READ_ONLY_VARIABLE = "LAYERMEND_READ_ONLY"
APP = Path(__file__).with_name("app.py")


def read_only() -> bool:
    """Return whether the server was started to show things and change none."""
    return bool(os.environ.get(READ_ONLY_VARIABLE))


# Both color schemes are given, so that the page follows the reader's system.
THEME = {
    "theme.font": "sans-serif",
    "theme.baseFontSize": "16",
    "theme.headingFontWeights": "640,640,640,600,600,600",
    "theme.headingFontSizes": "1.7rem,1.22rem,1rem,1rem,1rem,1rem",
    "theme.baseRadius": "6px",
    "theme.showSidebarBorder": "true",
    "theme.light.primaryColor": "#1f6aa8",
    "theme.light.backgroundColor": "#fcfcfa",
    "theme.light.secondaryBackgroundColor": "#f1f2ef",
    "theme.light.textColor": "#1b1f24",
    "theme.light.borderColor": "#dcdedb",
    "theme.light.sidebar.backgroundColor": "#f5f5f2",
    "theme.dark.primaryColor": "#6db3e8",
    "theme.dark.backgroundColor": "#14171b",
    "theme.dark.secondaryBackgroundColor": "#1f242a",
    "theme.dark.textColor": "#e4e7ea",
    "theme.dark.borderColor": "#333a42",
    "theme.dark.sidebar.backgroundColor": "#191d22",
}

app = typer.Typer(add_completion=False)


@app.command()
def dashboard(
    runs: Annotated[
        Path, typer.Argument(help="A run folder, or a folder of runs.", metavar="RUNS")
    ] = Path("runs"),
    votes: Annotated[
        str | None,
        typer.Option(
            envvar=VOTES_VARIABLE,
            metavar="URL",
            help="Database of the study's votes, such as postgresql://USER@HOST/NAME; "
            "votes.sqlite in each run by default.",
        ),
    ] = None,
    study_only: Annotated[
        bool,
        typer.Option(
            "--study-only",
            help="Show studies to those who hold a rater's link, and nothing else.",
        ),
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; others than localhost are open to the network."),
    ] = "localhost",
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Nobody can start a repair or an export.")
    ] = False,
) -> None:
    """Look at scans and repairs in the browser, and let colleagues vote."""
    if not runs.is_dir():
        raise RunError(f"no folder {runs}; start with `audit scan MODEL --data DIR`")
    if votes:
        from dashboard.study.store import check_url

        check_url(votes)
        os.environ[VOTES_VARIABLE] = votes
    if study_only:
        os.environ[STUDY_ONLY_VARIABLE] = "1"
    _require_free(host, port)
    os.environ[RUNS_VARIABLE] = str(runs.resolve())
    if read_only:
        os.environ[READ_ONLY_VARIABLE] = "1"
    threading.Thread(target=_warm_up, daemon=True).start()
    from streamlit.web.cli import main as streamlit

    streamlit(streamlit_arguments(host, port), prog_name="streamlit", standalone_mode=False)


def streamlit_arguments(host: str, port: int) -> list[str]:
    """Return the command line that Streamlit is started with."""
    options = {
        "server.address": host,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": host,
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        **THEME,
    }
    return ["run", str(APP), *(f"--{name}={value}" for name, value in options.items())]


def _warm_up() -> None:
    """Import what the first page needs while the server starts, so that nobody waits for it."""
    import altair
    import matplotlib
    import pandas
    import pyarrow.compute
    import pyarrow.parquet

    import audit.report  # noqa: F401

    del altair, pandas, pyarrow
    matplotlib.colormaps["magma"](0.5)


def _require_free(host: str, port: int) -> None:
    """Raise where the address cannot be listened on; Streamlit's own message has no remedy."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = error.strerror or error
        raise LayermendError(
            f"cannot listen on {host}:{port} ({reason}); choose another with --port or --host"
        ) from error


def main() -> None:
    run_app(app)
