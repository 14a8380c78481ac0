"""The commands as people type them: results on stdout, one clear line for each wrong input."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from audit.runs import Run, newest_run
from audit.scan import ScanConfig, ScanRequest, scan_model
from tests.shapes import CLASSES, DAMAGED, Shapes

PROJECT = Path(__file__).resolve().parents[1]

Command = Callable[..., tuple[int, str, str]]

# What stands between braces in a command line is a path from `places`.
WRONG = {
    # ---- audit scan
    "scan: missing model": (
        "audit scan nowhere.safetensors --data {photos}",
        1,
        ["nowhere.safetensors"],
    ),
    "scan: missing images": ("audit scan {damaged} --data nowhere", 1, ["nowhere"]),
    "scan: images are a file": ("audit scan {damaged} --data {file}", 1, ["file.txt"]),
    "scan: no images": (
        "audit scan {damaged} --data {empty}",
        1,
        ["empty", "sub-folder per class"],
    ),
    "scan: empty class folders": ("audit scan {damaged} --data {hollow}", 1, ["no usable image"]),
    "scan: unknown classes": (
        "audit scan {damaged} --data {pets}",
        1,
        ["'cat'", "'dog'", *(f"'{name}'" for name in CLASSES), "--classes"],
    ),
    "scan: missing class file": (
        "audit scan {damaged} --data {photos} --classes nowhere.txt",
        1,
        ["nowhere.txt"],
    ),
    "scan: too few class names": (
        "audit scan {damaged} --data {photos} --classes {two_classes}",
        1,
        ["2", "3"],
    ),
    "scan: wrong layer": (
        "audit scan {damaged} --data {photos} --layers block2_conv9",
        1,
        ["no layer 'block2_conv9'", "closest: block2_conv"],
    ),
    "scan: pickled model": ("audit scan {pickled} --data {photos}", 1, ["--trust-pickle", "code"]),
    "scan: damaged file": ("audit scan {truncated} --data {photos}", 1, ["truncated.safetensors"]),
    "scan: no architecture": ("audit scan {bare} --data {photos}", 1, ["--arch"]),
    "scan: unknown architecture": (
        "audit scan {damaged} --data {photos} --arch torchvision:nonsense",
        1,
        ["nonsense"],
    ),
    "scan: another architecture": (
        "audit scan {bare} --data {photos} --arch torchvision:squeezenet1_1",
        1,
        ["bare.safetensors", "squeezenet1_1"],
    ),
    "scan: unknown method": (
        "audit scan {damaged} --data {photos} --method magic",
        2,
        ["--method is 'magic'", "gradcam"],
    ),
    "scan: unknown device": (
        "audit scan {damaged} --data {photos} --device tpu",
        2,
        ["--device is 'tpu'"],
    ),
    "scan: output is a file": (
        "audit scan {damaged} --data {photos} --out {file}",
        1,
        ["file.txt"],
    ),
    "scan: no limit of images": ("audit scan {damaged} --data {photos} --limit 0", 2, ["--limit"]),
    "scan: negative seed": ("audit scan {damaged} --data {photos} --seed -1", 2, ["--seed"]),
    "scan: no data": ("audit scan {damaged}", 2, ["--data"]),
    "scan: unknown option": (
        "audit scan {damaged} --data {photos} --nonsense",
        2,
        ["--nonsense"],
    ),
    # ---- audit layers, audit report, no such command
    "layers: missing model": ("audit layers nowhere.pt", 1, ["nowhere.pt"]),
    "layers: pickled model": ("audit layers {pickled}", 1, ["--trust-pickle"]),
    "layers: unknown registry": ("audit layers nowhere:vgg16", 1, ["nowhere:vgg16"]),
    "layers: unknown option": ("audit layers {damaged} --nonsense", 2, ["--nonsense"]),
    "layers: no model": ("audit layers", 2, ["MODEL"]),
    "report: no run": ("audit report", 1, ["no complete run under ./runs", "audit scan"]),
    "report: missing run": ("audit report nowhere", 1, ["nowhere"]),
    "report: not a run": ("audit report {photos}", 1, ["no run under", "audit scan"]),
    "report: unknown option": ("audit report --nonsense", 2, ["--nonsense"]),
    "gate: no run": ("audit gate --min-accuracy .9", 1, ["no complete run", "audit scan"]),
    "gate: no criterion": ("audit gate {run}", 2, ["--min-accuracy", "--max-case3"]),
    "gate: no share": ("audit gate {run} --min-accuracy 90", 2, ["--min-accuracy"]),
    "gate: no accepted repair": (
        "audit gate {run} --min-accuracy .9 --repair",
        1,
        ["no accepted repair", "repair layer --run"],
    ),
    "gate: unknown option": ("audit gate --nonsense", 2, ["--nonsense"]),
    "audit: unknown command": ("audit nonsense", 2, ["nonsense"]),
    # ---- repair
    "repair: no run": ("repair layer", 1, ["no complete run under ./runs", "audit scan"]),
    "repair: missing run": ("repair layer --run nowhere", 1, ["nowhere"]),
    "repair: wrong layer": (
        "repair layer --run {run} --name block2_conv9",
        1,
        ["no layer 'block2_conv9'", "closest: block2_conv"],
    ),
    "repair: model has gone": (
        "repair layer --run {run} --model nowhere.safetensors",
        1,
        ["nowhere.safetensors"],
    ),
    "repair: another model": (
        "repair layer --run {run} --model {healthy}",
        1,
        ["is not the model that", "--model"],
    ),
    "repair: images have gone": (
        "repair layer --run {run} --data {empty}",
        1,
        ["none of the run's", "--data DIR"],
    ),
    "repair: unknown loss": ("repair layer --run {run} --loss hope", 2, ["--loss is 'hope'"]),
    "repair: unknown option": ("repair layer --nonsense", 2, ["--nonsense"]),
    "export: no run": ("repair export", 1, ["no complete run under ./runs"]),
    "export: no repair": ("repair export --run {run}", 1, ["no finished repair"]),
    "export: contradiction": (
        "repair export --run {run} --original --repair x",
        2,
        ["--original and --repair"],
    ),
    "export: unknown option": ("repair export --nonsense", 2, ["--nonsense"]),
    "repair: unknown command": ("repair nonsense", 2, ["nonsense"]),
    # ---- dashboard
    "dashboard: missing folder": ("dashboard nowhere", 1, ["nowhere", "audit scan"]),
    "dashboard: unknown option": ("dashboard --nonsense", 2, ["--nonsense"]),
    "dashboard: no such port": ("dashboard {photos} --port 70000", 2, ["--port"]),
}

# The wrong inputs that go through a process of their own as well, as a shell starts it.
IN_A_PROCESS = (
    "scan: unknown classes",
    "scan: pickled model",
    "repair: wrong layer",
    "dashboard: missing folder",
)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def run(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished scan of the damaged network."""
    out = tmp_path_factory.mktemp("scanned")
    request = ScanRequest(model=str(shapes.damaged), data=shapes.photos, out=out)
    return scan_model(request, ScanConfig())


@pytest.fixture
def places(shapes: Shapes, run: Run, tmp_path: Path) -> dict[str, Path]:
    """Models and folders, good and bad, that the command lines name."""
    folder = tmp_path / "places"
    for name in ("empty", "hollow/disk", "pets/cat", "pets/dog"):
        (folder / name).mkdir(parents=True)
    for pet, color in (("cat", "red"), ("dog", "blue")):
        Image.new("RGB", (40, 40), color).save(folder / "pets" / pet / "1.png")
    (folder / "file.txt").write_text("no images")
    (folder / "two.txt").write_text("disk\nsquare\n")
    (folder / "truncated.safetensors").write_bytes(shapes.damaged.read_bytes()[:1000])
    save_file(load_file(shapes.damaged), folder / "bare.safetensors")
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    module.hook = Payload(tmp_path / "marker")
    torch.save(module, folder / "pickled.pt")
    return {
        "photos": shapes.photos,
        "damaged": shapes.damaged,
        "healthy": shapes.healthy,
        "run": run.path,
        "empty": folder / "empty",
        "hollow": folder / "hollow",
        "pets": folder / "pets",
        "file": folder / "file.txt",
        "two_classes": folder / "two.txt",
        "truncated": folder / "truncated.safetensors",
        "bare": folder / "bare.safetensors",
        "pickled": folder / "pickled.pt",
    }


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Call a command's `main` in this process, in an empty folder: exit code, stdout, stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(program: str, *arguments: Any) -> tuple[int, str, str]:
        main = importlib.import_module(f"{program}.cli").main
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        written = capfd.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


def typed(line: str, places: dict[str, Path]) -> list[str]:
    return [part.format_map(places) for part in line.split()]


def is_one_clear_line(err: str, words: list[str]) -> bool:
    lines = err.splitlines()
    *progress, last = lines or [""]
    # A step may have been announced before the error; nothing but that may stand above it.
    announced = all(re.fullmatch(r"[a-z ]+(:| \(| \.\.\.).*", line) for line in progress)
    return announced and last.startswith("error: ") and all(word in last for word in words)


# -------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(("line", "code", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_input_ends_with_its_exit_code_and_one_clear_line(
    command: Command,
    places: dict[str, Path],
    tmp_path: Path,
    line: str,
    code: int,
    words: list[str],
) -> None:
    ended, out, err = command(*typed(line, places))
    assert ended == code, err
    assert out == ""
    assert "Traceback" not in err and "internal error" not in err
    assert is_one_clear_line(err, words), err
    assert err.count("error: ") == 1
    assert not (tmp_path / "marker").exists(), "the pickled model ran its code"
    assert list((tmp_path / "here").iterdir()) == []  # nothing was left behind


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_a_wrong_input_ends_the_same_in_a_process_of_its_own(
    run_command: Callable[..., Any], places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    line, code, words = WRONG[name]
    finished = run_command(*typed(line, places))
    assert finished.returncode == code, finished.stderr
    assert finished.stdout == "" and "Traceback" not in finished.stderr
    assert is_one_clear_line(finished.stderr, words), finished.stderr
    assert not (tmp_path / "marker").exists()


def test_the_pickled_models_code_would_have_run(tmp_path: Path, places: dict[str, Path]) -> None:
    torch.load(places["pickled"], weights_only=False)
    assert (tmp_path / "marker").exists()


def test_debug_lets_the_error_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from audit.cli import main
    from audit.errors import NetworkError

    monkeypatch.setattr(sys, "argv", ["audit", "layers", "nowhere.pt", "--debug"])
    with pytest.raises(NetworkError):
        main()


# -------------------------------------------------------------------- what they print


def test_scan_prints_one_json_document_and_exits_with_3_where_a_layer_is_flagged(
    run_command: Callable[..., Any], shapes: Shapes, tmp_path: Path
) -> None:
    arguments = [str(shapes.damaged), "--data", str(shapes.photos), "--json", "--fail-on-flag"]
    finished = run_command("audit", "scan", *arguments)
    assert finished.returncode == 3, finished.stderr
    document = json.loads(finished.stdout)
    found = newest_run(tmp_path / "runs")
    flagged = ", ".join(found.verdict["layers"][:3])
    told = f"error: the scan flagged {flagged} ({found.verdict['verdict']})"
    assert finished.stderr.splitlines()[-1] == told
    assert re.search(r"trial repairs: (\d+) of \1", finished.stderr)
    assert document["run"] == f"runs/{found.name}"
    assert document["verdict"] == found.verdict
    assert document["verdict"]["layers"][0] == DAMAGED
    assert {key: document[key] for key in found.info} == found.info
    assert document["command"] == ["audit", "scan", *arguments]


def test_a_healthy_model_passes_the_flag(command: Command, shapes: Shapes) -> None:
    code, out, err = command(
        "audit", "scan", shapes.healthy, "--data", shapes.photos, "--fail-on-flag"
    )
    assert code == 0, err
    assert out.startswith("Verdict: no layer at fault")
    assert "error" not in err


def test_scan_prints_verdict_numbers_and_where_the_run_is(command: Command, shapes: Shapes) -> None:
    code, out, _ = command("audit", "scan", shapes.damaged, "--data", shapes.photos)
    assert code == 0  # a flag is no failure unless asked to be
    found = newest_run(Path("runs"))
    count = len(found.verdict["layers"])
    told = f"Verdict: spread over {count} layers; to be repaired is {found.flagged_layer}\n"
    assert out.startswith(told)
    flat = " ".join(out.split())
    for reason in found.verdict["reasons"]:
        assert reason in flat or reason.replace("`", "") in flat
    for split in ("all", "train", "val", "test"):
        numbers = found.info["metrics"][split]
        assert re.search(rf"{split} +│ +{numbers['n']} +│ {numbers['accuracy']['value']:.1%}", out)
    best = found.layers.sort_values("rank").iloc[0]
    assert re.search(rf"1 +│ {DAMAGED} +│ {best['blame']:.0%} +│ {best['trial_gain']:.0%} \[", out)
    assert "block3_conv1 (last_conv)" in out
    assert "204 images scanned, 0 files left out" in out
    assert f"Run folder: {found.path}" in out


def test_layers_lists_every_layer_with_its_aliases(command: Command, shapes: Shapes) -> None:
    code, out, err = command("audit", "layers", shapes.damaged, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["model"] == str(shapes.damaged)
    rows = {row["name"]: row for row in document["layers"]}
    assert list(rows) == [
        "block1_conv1",
        "block2_conv1",
        "block2_conv2",
        "block3_conv1",
        "predictions",
    ]
    assert rows["block3_conv1"]["aliases"] == ["last_conv"]
    assert rows["block3_conv1"]["alias"] == "last_conv"
    assert rows["block2_conv2"] == {
        "name": "block2_conv2",
        "alias": "",
        "aliases": [],
        "kind": "conv2d",
        "shape": [12, 12, 3, 3],
        "parameters": 12 * 12 * 9 + 12,
    }
    code, out, _ = command("audit", "layers", shapes.damaged)
    assert code == 0
    assert re.search(r"block3_conv1 +│ last_conv +│ conv2d +│ 16x12x3x3 +│ +1,744 ", out)
    total = sum(row["parameters"] for row in rows.values())
    assert re.search(rf"5 layers +│.+│ +{total:,} ", out)


def test_report_writes_one_page_about_the_newest_run(
    command: Command, shapes: Shapes, run: Run
) -> None:
    code, out, err = command("audit", "report", run.path, "--out", "page.html")
    assert code == 0, err
    assert out.strip() == "page.html"
    page = Path("page.html").read_text()
    assert DAMAGED in page and "<html" in page


def test_a_gate_trips_on_a_scan_that_flags_a_layer(
    run_command: Callable[..., Any], run: Run
) -> None:
    passing = ("--max-cross-entropy", "100", "--max-groups", "100", "--json")
    finished = run_command("audit", "gate", str(run.path), *passing)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["passed"] is True
    finished = run_command("audit", "gate", str(run.path), "--no-flag")
    assert finished.returncode == 3
    assert "Tripped: 0 of 1 criteria met." in finished.stdout
    flagged = len(run.verdict["layers"])
    told = f"error: the gate tripped: flagged layers {flagged} is above 0 (--no-flag)\n"
    assert flagged and finished.stderr == told


def test_a_layer_is_repaired_by_its_alias(command: Command, shapes: Shapes, run: Run) -> None:
    code, out, err = command(
        *("repair", "layer", "--run", run.path, "--name", "last_conv"),
        *("--epochs", "1", "--no-controls", "--json"),
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["layer"] == "block3_conv1"
    changed = ["block3_conv1.bias", "block3_conv1.weight"]
    assert sorted(record["frozen"]["changed"]) == changed


@pytest.mark.parametrize(
    "line",
    [
        "audit",
        "audit scan",
        "audit layers",
        "audit report",
        "audit gate",
        "audit demo",
        "repair",
        "repair layer",
        "repair export",
        "dashboard",
    ],
)
def test_help_of_every_command_says_what_it_does(command: Command, line: str) -> None:
    code, out, err = command(*line.split(), "--help")
    assert code == 0 and err == ""
    assert "Usage:" in out and "--help" in out
    assert "Traceback" not in out
    (program, *_) = line.split()
    assert f"{line} " in out and program in out


def test_the_installed_commands_are_those_tested_here() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert settings["project"]["scripts"] == {
        name: f"{name}.cli:main" for name in ("audit", "repair", "dashboard")
    }
