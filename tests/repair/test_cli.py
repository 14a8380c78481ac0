"""The `repair` command through its entry point: streams, exit codes and one clear line each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import repair.cli
import repair.export
from audit.networks import Network
from audit.runs import RepairFolder, Run
from repair.export import Exported
from repair.onnx_serving import Form

MakeRun = Callable[..., Run]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process, as its entry point does."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["repair", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            repair.cli.main()
        written = capfd.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return run


def test_repair_and_export_print_their_outcome(
    command: Callable[..., tuple[int, str, str]],
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run()
    monkeypatch.chdir(tmp_path)  # the newest run under ./runs
    code, out, err = command("layer", "--epochs", "2", "--lr", "0.02", "--controls", "ce,shuffled")
    assert code == 0, err
    assert "Repair of block2_conv1: accepted" in out
    assert "The penalty" in out.splitlines()[1]
    assert "True maps " in out and "control: shuffled" in out
    assert "Bit-identical outside the layer: 8 of 8 tensors" in out
    assert "training the control" in err and "training" not in out
    code, out, err = command("export")
    assert code == 0, err
    assert out.startswith("ONNX export: passed")
    assert "Same class on 36 of 36 held-out images" in out
    assert "torch.onnx" not in out + err


def test_json_is_the_only_thing_on_stdout(
    command: Callable[..., tuple[int, str, str]], make_run: MakeRun
) -> None:
    run = make_run()
    code, out, err = command("layer", "--run", run.path, "--epochs", "1", "--json", "--no-controls")
    assert code == 0, err
    (finished,) = run.repairs
    assert json.loads(out) == finished.info
    assert finished.info["config"]["epochs"] == 1 and finished.info["config"]["lambda"] == 0.9
    assert finished.info["config"]["lr"] == "auto" and set(finished.info["rates"]) == {"repair"}
    assert finished.info["command"][:2] == ["repair", "layer"]
    code, out, _ = command("export", "--run", run.path, "--json")
    assert code == 0 and json.loads(out) == finished.onnx


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--name", "block2_conv9"], 1, "no layer 'block2_conv9'"),
        (["--lambda", "1.5"], 2, "lambda is 1.5"),
        (
            ["--loss", "hope"],
            2,
            "--loss is 'hope'; expected one of trust, trust-masks, energy, rrr, ce",
        ),
        (["--scale", "none"], 2, "unknown scale 'none'"),
        (["--epochs", "0"], 2, "--epochs is 0"),
        (["--donors", "0"], 2, "--donors is 0"),
        (["--controls", "ce,hope"], 2, "'hope'; expected one or more of ce,shuffled,originals,"),
        (["--controls", ""], 2, "expected one or more of ce,shuffled,originals,labels,"),
        (["--controls", "ce", "--no-controls"], 2, "--controls and --no-controls exclude"),
        (["--lr", "nan"], 2, "--lr is nan"),
        (["--device", "tpu"], 2, "--device is 'tpu'"),
        (["--train", "no-such-folder"], 1, "no-such-folder"),
        (["--resume"], 1, "no unfinished repair"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_wrong_use_ends_with_one_line_and_its_exit_code(
    command: Callable[..., tuple[int, str, str]],
    make_run: MakeRun,
    arguments: list[str],
    code: int,
    line: str,
) -> None:
    run = make_run()
    ended, out, err = command("layer", "--run", run.path, *arguments)
    assert ended == code and out == ""
    assert [text for text in err.splitlines() if text.startswith("error: ")] == err.splitlines()
    assert len(err.splitlines()) == 1 and line in err
    assert run.repairs == []


def test_no_run_and_no_verdict_are_one_line_each(
    command: Callable[..., tuple[int, str, str]],
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("layer")
    assert code == 1 and err.startswith("error: no complete run under ./runs; start with")
    make_run("none")
    code, _, err = command("layer")
    assert code == 1 and "no layer at fault (verdict: none)" in err and "--name LAYER" in err
    code, _, err = command("export")
    assert code == 1 and "no finished repair" in err


def test_a_failing_export_exits_with_one(
    command: Callable[..., tuple[int, str, str]],
    finished_copy: tuple[Run, RepairFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = finished_copy
    export = repair.export.onnx_model

    def corrupting(network: Network, form: Form) -> onnx.ModelProto:
        model = export(network, form)
        model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
        return model

    monkeypatch.setattr(repair.export, "onnx_model", corrupting)
    code, out, err = command("export", "--run", run.path)
    assert code == 1
    assert out.startswith("ONNX export: failed") and "model.failed.onnx" in out
    assert err.splitlines()[-1].startswith("error: the export is not equal to its source")


def test_resume_takes_back_settings_from_the_command_line_only_if_equal(
    command: Callable[..., tuple[int, str, str]], make_run: MakeRun
) -> None:
    run = make_run()
    config = {"epochs": 1, "r1": False, "loss": "trust", "controls": False}
    run.start_repair("block2_conv1", {"alias": "", "config": config, "model": {}})
    code, _, err = command("layer", "--run", run.path, "--resume", "--no-r2")
    assert code == 2 and "started with r2 True, not False" in err
    code, out, err = command("layer", "--run", run.path, "--resume", "--no-r1", "--json")
    assert code == 0, err
    assert json.loads(out)["config"] == config


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; sys.argv = ['repair', 'layer', '--help']\n"
        "from repair.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)\n"
    )
    project = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "--lambda" in ended.stdout


def test_a_file_is_verified_by_the_command(
    command: Callable[..., tuple[int, str, str]],
    served: tuple[RepairFolder, Exported],
    tmp_path: Path,
) -> None:
    repaired, exported = served
    code, out, err = command("export", "--verify", exported.model)
    assert code == 0, err
    assert out.startswith("ONNX export: passed") and "Same class on 36 of 36" in out
    broken = tmp_path / "model.onnx"
    broken.write_bytes(exported.model.read_bytes()[:-40])
    run = repaired.path.parent.parent
    code, out, err = command("export", "--verify", broken, "--run", run, "--json")
    assert code == 1 and json.loads(out)["status"] == "failed"
    assert err.splitlines()[-1].startswith("error: the file did not prove good, do not use it: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--verify", "model.onnx", "--saliency"],
            "--verify exports nothing; leave out --saliency",
        ),
        (["--checkpoint", "a.pt", "--original"], "--checkpoint stands for a model without a run"),
        (["--checkpoint", "a.pt"], "--checkpoint needs --data DIR"),
        (["--map-layer", "last_conv"], "add --saliency"),
        (["--preprocess", "hwc"], "--preprocess is 'hwc'; expected one of nhwc, nchw, photo"),
    ],
)
def test_exports_that_contradict_themselves_end_with_two(
    command: Callable[..., tuple[int, str, str]], arguments: list[str], line: str
) -> None:
    code, out, err = command("export", *arguments)
    assert (code, out) == (2, "") and line in err and len(err.splitlines()) == 1
