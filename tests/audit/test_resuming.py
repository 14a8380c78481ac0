"""A scan that was stopped at any point goes on there and ends with the numbers of one that was not.

Bit for bit, on a CPU; only times may differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import audit.scan
from audit.checkpoints import Checkpoint, Checkpoints
from audit.errors import RunError, UsageError
from audit.networks import open_network
from audit.resuming import unfinished_scan
from audit.runs import Run, list_runs, open_run
from audit.scan import ScanConfig, ScanRequest, scan_model
from tests.conftest import PROJECT
from tests.shapes import Shapes

TIMES = {"timings_s", "peak_memory_mib", "created_utc", "finished_utc", "command"}
CONFIG = ScanConfig(limit=64, batch_size=8, device="cpu")


def request(shapes: Shapes, out: Path, **given: Any) -> ScanRequest:
    return ScanRequest(model=str(shapes.damaged), data=shapes.photos, out=out, **given)


@pytest.fixture(scope="module")
def undisturbed(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return scan_model(request(shapes, tmp_path_factory.mktemp("undisturbed")), CONFIG)


def assert_same_numbers(run: Run, expected: Run) -> None:
    pd.testing.assert_frame_equal(run.images, expected.images, check_exact=True)
    pd.testing.assert_frame_equal(run.layers, expected.layers, check_exact=True)
    info, wanted = json.loads(json.dumps(run.info)), json.loads(json.dumps(expected.info))
    assert {k: v for k, v in info.items() if k not in TIMES} == {
        k: v for k, v in wanted.items() if k not in TIMES
    }
    files = {path.relative_to(run.path) for path in run.path.rglob("*")}
    assert files == {path.relative_to(expected.path) for path in expected.path.rglob("*")}
    for name in ("verdict.json", "groups.json", "maps/index.json"):
        assert (run.path / name).read_bytes() == (expected.path / name).read_bytes()


class Interruptions:
    """Keep a checkpoint after each batch and each trial; stop the scan after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stops: set[tuple[str, int]]) -> None:
        self.saves: list[str] = []
        self.stops = stops
        save = Checkpoint.save

        def saving(checkpoint: Checkpoint, state: Any) -> None:
            save(checkpoint, state)
            name = checkpoint._part.name.rpartition("-")[0]
            self.saves.append(name)
            if (name, self.saves.count(name)) in self.stops:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoint, "save", saving)
        monkeypatch.setattr(Checkpoint, "due", lambda *_: True)


def test_a_scan_stopped_again_and_again_ends_with_the_same_bits(
    undisturbed: Run,
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stops = {("evidence", 2), ("evidence", 4), ("test", 1), ("cases", 3)}
    stops |= {("moves", 1), ("moves", 3)}
    stops |= {("trials-weights", 2), ("trials-weights", 8), ("trials-channels", 4)}
    interruptions = Interruptions(monkeypatch, stops)
    asked = request(shapes, tmp_path)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            scan_model(asked, CONFIG)
        (run,) = list_runs(tmp_path)
        assert run.status == "failed" and "goes on" in run.info["failure"]
        assert f"--out {tmp_path} --resume" in capsys.readouterr().err
        asked = replace(asked, resume=True)
    run = scan_model(asked, CONFIG)
    assert "trials-channels" in interruptions.saves
    assert_same_numbers(open_run(run.path), undisturbed)
    assert [found.path for found in list_runs(tmp_path)] == [run.path]


def test_finished_steps_are_not_done_again(
    undisturbed: Run, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(audit.scan, "_write_gallery", fail)
        scan_model(request(shapes, tmp_path), CONFIG)
    for step in ("audit.evidence.Gathering.add", "audit.observing._predict"):
        monkeypatch.setattr(step, fail)
    monkeypatch.setattr(audit.scan, "error_groups", fail)
    monkeypatch.setattr("audit.moves._tried", fail)
    monkeypatch.setattr("audit.trials._Trial.advance", fail)
    run = scan_model(request(shapes, tmp_path, resume=True), CONFIG)
    assert_same_numbers(run, undisturbed)
    assert run.info["timings_s"]["evidence"] > 0


# -------------------------------------------------------------------- what is resumed


def stop(shapes: Shapes, out: Path, config: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Start a scan and stop it before its trials."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(audit.scan, "observe", interrupt)
        scan_model(request(shapes, out), config)
    return list_runs(out)[0]


def test_the_newest_scan_of_the_stated_settings_goes_on(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, limit=24)
    first = stop(shapes, tmp_path, replace(config, seed=1), monkeypatch)
    second = stop(shapes, tmp_path, replace(config, seed=2), monkeypatch)

    network = open_network(str(shapes.damaged))

    def resumed(config: ScanConfig, *stated: str) -> tuple[Path, ScanConfig]:
        asked = request(shapes, tmp_path, resume=True, stated=frozenset(stated))
        run, used, _ = unfinished_scan(network, config, asked)
        run.release()
        return run.path, used

    with pytest.raises(UsageError, match="was started with seed 2, not 3; leave it out to resume"):
        resumed(replace(config, seed=3), "seed")
    assert resumed(replace(config, seed=1), "seed") == (first.path, replace(config, seed=1))
    # What is not stated is that of the scan.
    assert resumed(ScanConfig()) == (second.path, replace(config, seed=2))
    for run in (first, second):
        run.finish()
    with pytest.raises(RunError, match="no unfinished scan of .* start one without --resume"):
        resumed(config)


def test_changed_images_are_not_mixed_with_earlier_numbers(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stop(shapes, tmp_path, CONFIG, monkeypatch)
    run.write_info(data={**run.info["data"], "fingerprint": "another"})
    with pytest.raises(RunError, match="have changed since .* was started"):
        scan_model(request(shapes, tmp_path, resume=True), CONFIG)


def test_a_damaged_checkpoint_is_one_clear_line_and_runs_no_code(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stop(shapes, tmp_path, CONFIG, monkeypatch)
    checkpoint = run.path / "progress" / "evidence-0of1.pt"
    for content in ({"state": open_run}, None):  # a function would be imported
        torch.save(content, checkpoint)
        with pytest.raises(RunError, match="is damaged; start the scan again without --resume"):
            Checkpoints(run.path).step("evidence")
    checkpoint.write_bytes(b"PK")
    with pytest.raises(RunError, match="is damaged"):
        Checkpoints(run.path).step("evidence")


def test_a_scan_under_way_is_left_alone(
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = stop(shapes, tmp_path, CONFIG, monkeypatch)
    code = (
        "import sys; from pathlib import Path; from audit.runs import open_run\n"
        "print(open_run(Path(sys.argv[1])).claim(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with pytest.raises(RunError, match="another process is at work on"):
            scan_model(request(shapes, tmp_path, resume=True), CONFIG)
        other.kill()
    assert open_run(run.path).claim()


def test_checkpoints_cost_a_twentieth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("audit.checkpoints.time.perf_counter", lambda: now[0])
    step = Checkpoints(tmp_path).step("evidence")

    def slow_disk(*_: Any) -> None:
        now[0] += 3.0

    monkeypatch.setattr("audit.checkpoints._write", slow_disk)
    writing = 0.0
    while now[0] < 2000:
        now[0] += 0.5
        if step.due(10**9):
            step.save({})
            writing += 3.0
    assert 0.03 * now[0] < writing < 0.05 * now[0]
