"""What holds for the project as a whole: light commands, import contracts, bounds, license."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import audit

PROJECT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "timm", "onnxruntime", "onnx", "sklearn", "matplotlib")


@pytest.fixture(scope="module")
def settings() -> dict:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("program", ["audit", "repair", "dashboard"])
def test_help_is_light(program: str) -> None:
    code = (
        "import sys\n"
        f"from {program}.cli import main\n"
        f"sys.argv = [{program!r}, '--help']\n"
        "try: main()\n"
        "finally:\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    print('loaded:', *loaded, file=sys.stderr)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Usage" in finished.stdout
    assert finished.stderr.splitlines()[-1].split() == ["loaded:"]


@pytest.mark.parametrize("program", ["audit", "repair", "dashboard"])
def test_help_answers_as_a_module_too(program: str, run_command: Callable) -> None:
    finished = run_command(program, "--help")
    assert finished.returncode == 0, finished.stderr
    assert f"Usage: {program}" in finished.stdout


def test_import_contracts_hold() -> None:
    finished = lint_imports(PROJECT)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_a_dashboard_that_imports_torch_breaks_a_contract(tmp_path: Path) -> None:
    contracts = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(contracts, encoding="utf-8")
    for module in ("console", "errors", "files", "report", "statistics"):
        write_module(tmp_path / "audit" / f"{module}.py", "")
    write_module(tmp_path / "audit" / "runs.py", "def read():\n    import torch\n")
    write_module(tmp_path / "audit" / "saliency.py", "")
    write_module(tmp_path / "repair" / "losses.py", "import audit.saliency\n")
    write_module(tmp_path / "repair" / "cli.py", "import dashboard.app\n")
    write_module(tmp_path / "dashboard" / "app.py", "import audit.runs\n")
    finished = lint_imports(tmp_path)
    assert finished.returncode == 1
    assert "dashboard.app -> audit.runs" in finished.stdout.replace("\n", " ")
    assert "audit.runs -> torch" in finished.stdout
    assert "repair.cli -> dashboard.app" in finished.stdout


def test_the_version_is_the_distributions(settings: dict) -> None:
    assert audit.__version__ == settings["project"]["version"]


def test_the_license_is_the_whole_apache_license(settings: dict) -> None:
    text = (PROJECT / "LICENSE").read_text(encoding="utf-8")
    assert settings["project"]["license"] == "Apache-2.0"
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply" in text


def test_every_dependency_has_a_lower_and_an_upper_bound(settings: dict) -> None:
    project = settings["project"]
    extras = project["optional-dependencies"].values()
    named = [*project["dependencies"], *(name for extra in extras for name in extra)]
    unbounded = [name for name in named if "==" not in name and not (">=" in name and "<" in name)]
    assert unbounded == []


def write_module(path: Path, code: str) -> None:
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(code, encoding="utf-8")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    # The folder comes first on the path, so its packages are the ones that are looked at.
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(no_cache=True))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
