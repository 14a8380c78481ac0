"""Fixtures that more than one part of the tests needs."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.shapes import Shapes

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def _data_root() -> Path | None:
    named = os.environ.get("LAYERMEND_DATA")
    return Path(named) if named else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the photographs where there are none."""
    root = _data_root()
    if root is not None and root.is_dir():
        return
    reason = (
        "LAYERMEND_DATA is not set: it names the folder of test photographs"
        if root is None
        else f"LAYERMEND_DATA names {root}, which is not a folder"
    )
    for item in items:
        if "data" in item.keywords or "data_root" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of test photographs; a test that asks for it is skipped where there is none."""
    root = _data_root()
    assert root is not None, "collection skips tests that ask for data_root without one"
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> "Shapes":
    """A trained network, healthy and with one damaged layer, and its images."""
    from tests.shapes import make_shapes  # needs torch, which most tests of files do not

    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def run_command(tmp_path: Path) -> Callable[..., Finished]:
    """Run a command through its entry point in a child process, in an empty folder.

    run_command("audit", "layers", "torchvision:vgg16", timeout_s=60, env={...}, cwd=...)
    """

    def run(
        program: str,
        *arguments: str | Path,
        timeout_s: float = 120,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Finished:
        finished = subprocess.run(
            [sys.executable, "-m", program, *map(str, arguments)],
            cwd=cwd or tmp_path,
            # The source tree answers even where the package is not installed.
            env={**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "120", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Finished(
            returncode=finished.returncode, stdout=finished.stdout, stderr=finished.stderr
        )

    return run
