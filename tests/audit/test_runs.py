"""Run folders: written and read back alike, and refused in one clear line when they cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from audit.errors import RunError
from audit.runs import (
    SCHEMA_VERSION,
    list_damaged_runs,
    list_runs,
    newest_run,
    open_repair,
    open_run,
    start_run,
    write_maps,
)


def test_a_started_run_is_running_until_it_finishes(tmp_path: Path) -> None:
    run = start_run(tmp_path, "vgg16", {"seed": 7})
    on_disk = json.loads((run.path / "run.json").read_text())
    assert (on_disk["status"], on_disk["schema_version"], on_disk["seed"]) == ("running", 1, 7)
    run.write_info(metrics={"all": {"n": 3}})
    run.finish(peak_memory_mib=10.5)
    again = open_run(run.path)
    assert again.status == "complete"
    assert again.info["metrics"] == {"all": {"n": 3}}
    assert again.info["peak_memory_mib"] == 10.5
    assert again.info["finished_utc"] >= again.info["created_utc"]


def test_runs_started_within_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    runs = [start_run(tmp_path, "m") for _ in range(5)]
    assert len({run.path for run in runs}) == 5
    assert [run.path for run in list_runs(tmp_path)] == [run.path for run in reversed(runs)]
    assert newest_run(tmp_path).path == runs[-1].path


def test_a_model_name_cannot_leave_the_runs_folder(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = start_run(root, "../../etc/<b>passwd", {})
    assert run.path.parent == root
    assert run.path.name.endswith("-etc-b-passwd")


def test_tables_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    run.write_images(
        {
            "path": ["a/1.png", "b/2.png"],
            "label": np.array([0, 1]),
            "right": np.array([True, False]),
            "ce": np.array([0.25, np.nan]),
            "own_column": [1.5, 2.5],
        }
    )
    images = open_run(run.path).images
    assert images["path"].tolist() == ["a/1.png", "b/2.png"]
    assert images["label"].tolist() == [0, 1]
    assert images["right"].tolist() == [True, False]
    assert images["ce"][0] == 0.25 and np.isnan(images["ce"][1])
    assert images["case"].isna().all()
    assert images["own_column"].tolist() == [1.5, 2.5]


def test_rows_and_columns_write_the_same_table(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    run.write_layers([{"name": "conv1", "rank": 2}, {"name": "conv2", "rank": 1}])
    by_rows = run.layers
    run.write_layers({"name": ["conv1", "conv2"], "rank": [2, 1]})
    assert by_rows.equals(run.layers)


@pytest.mark.parametrize(
    ("verdict", "flagged"),
    [
        ({"verdict": "spread", "layers": ["a", "b"], "flagged": "b"}, "b"),
        ({"verdict": "spread", "layers": ["a", "b"]}, "a"),  # as runs were written before
        ({"verdict": "none", "layers": [], "flagged": None}, None),
    ],
)
def test_a_run_says_which_layer_to_repair(
    verdict: dict[str, object], flagged: str | None, tmp_path: Path
) -> None:
    run = start_run(tmp_path, "m")
    run.write_verdict(verdict)
    assert open_run(run.path).flagged_layer == flagged


def test_only_layers_that_have_an_alias_are_given_one(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    run.write_layers({"name": ["a", "b", "c", "d"], "alias": ["block1_conv1", None, "", "d"]})
    assert run.aliases == {"a": "block1_conv1"}


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different lengths"):
        start_run(tmp_path, "m").write_layers({"name": ["a"], "rank": [1, 2]})


def test_maps_come_back_in_half_precision_whatever_the_layer_is_called(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    maps = np.random.default_rng(0).random((3, 4, 5), dtype=np.float32)
    for layer in ("features.28", "a/../../b", "..", ".hidden", "block<1>"):
        run.write_maps("gradcam", layer, maps)
        assert np.array_equal(run.maps("gradcam", layer), maps.astype(np.float16))
    written = list(tmp_path.rglob("*.npz"))
    assert len(written) == 5
    assert all(path.parent == run.path / "maps" / "gradcam" for path in written)


def test_missing_maps_name_the_layers_that_have_them(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    run.write_gallery({"images": [], "layers": ["conv1"], "methods": ["gradcam"]}, [])
    with pytest.raises(RunError, match=r"no gradcam maps of conv9 .*layers: conv1"):
        run.maps("gradcam", "conv9")


def test_gallery_pictures_are_kept_exactly(tmp_path: Path) -> None:
    from PIL import Image

    run = start_run(tmp_path, "m")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    run.write_gallery({"images": [{"id": "0000"}], "layers": [], "methods": []}, [pixels])
    with Image.open(run.gallery_image("0000")) as picture:
        assert np.array_equal(np.asarray(picture), pixels)
    assert run.gallery["images"] == [{"id": "0000"}]
    with pytest.raises(ValueError, match="names 1 images, 0 were given"):
        run.write_gallery({"images": [{"id": "0000"}]}, [])


def test_a_repair_lives_in_its_run(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    first = run.start_repair("features.28", {"config": {"lr": 0.01}})
    second = run.start_repair("features.28")
    first.finish(decision="rejected")
    first.write_history([{"role": "repair", "epoch": 1, "loss": 0.5, "best": True}])
    first.write_images([{"path": "a.png", "ssim": 0.5}])
    maps = np.ones((1, 2, 2), dtype=np.float32)
    first.write_maps("gradcam", "features.28", maps, "before")
    first.write_maps("gradcam", "features.28", maps / 2, "after")
    first.write_onnx({"status": "passed"})

    assert [repair.path for repair in run.repairs] == [second.path, first.path]
    again = open_repair(first.path)
    assert (again.layer, again.decision, again.run_path) == ("features.28", "rejected", run.path)
    assert again.history["loss"].tolist() == [0.5]
    assert again.images["ssim"].tolist() == [0.5]
    assert again.maps("gradcam", "features.28", "after").max() == 0.5
    assert again.onnx == {"status": "passed"}
    assert (second.decision, second.onnx) == (None, None)


def test_maps_of_a_run_and_of_a_repair_do_not_mix(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    write_maps(run.path, "gradcam", "conv1", np.zeros((1, 2, 2)))
    assert run.has_maps("gradcam", "conv1")
    assert not run.has_maps("gradcam", "conv1", "before")


@pytest.mark.parametrize("missing", ["runs", "runs/empty"])
def test_no_run_names_the_command_that_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(RunError) as error:
        newest_run(Path(missing))
    assert str(error.value) == (
        f"no run under ./{missing}; start with `audit scan MODEL --data DIR`"
    )


def test_a_folder_of_runs_opens_the_newest(tmp_path: Path) -> None:
    start_run(tmp_path, "old")
    new = start_run(tmp_path, "new")
    assert open_run(tmp_path).path == new.path
    assert open_run(new.path / "run.json").path == new.path


def test_the_newest_run_of_a_status_skips_the_others(tmp_path: Path) -> None:
    done = start_run(tmp_path, "done")
    done.finish()
    start_run(tmp_path, "still-running")
    assert newest_run(tmp_path, status="complete").path == done.path
    with pytest.raises(RunError, match="no failed run"):
        newest_run(tmp_path, status="failed")


def test_damaged_runs_are_reported_and_the_others_listed(tmp_path: Path) -> None:
    good = start_run(tmp_path, "good")
    cut = start_run(tmp_path, "cut")
    (cut.path / "run.json").write_text('{"schema_version": 1, "sta')
    (tmp_path / "20260101T000000Z-empty").mkdir()
    (tmp_path / "notes").mkdir()
    assert [run.path for run in list_runs(tmp_path)] == [good.path]
    damaged = {found.path.name: found.reason for found in list_damaged_runs(tmp_path)}
    assert set(damaged) == {cut.path.name, "20260101T000000Z-empty"}
    assert all("\n" not in reason and len(reason) > 20 for reason in damaged.values())
    assert open_run(tmp_path).path == good.path
    with pytest.raises(RunError):
        open_run(cut.path)


def test_a_newer_schema_is_refused_and_says_to_update(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m", {"schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(RunError, match=r"newer layermend .*update layermend"):
        open_run(run.path)
    assert list_runs(tmp_path) == []


def test_a_damaged_table_or_map_is_one_clear_line(tmp_path: Path) -> None:
    run = start_run(tmp_path, "m")
    with pytest.raises(RunError, match=r"layers\.parquet is not there; the run is running"):
        _ = run.layers
    (run.path / "layers.parquet").write_bytes(b"PAR1 not a table")
    run.write_maps("gradcam", "conv1", np.zeros((1, 2, 2)))
    (run.path / "maps" / "gradcam" / "conv1.npz").write_bytes(b"not an archive")
    for read in (lambda: open_run(run.path).layers, lambda: run.maps("gradcam", "conv1")):
        with pytest.raises(RunError) as error:
            read()
        assert "is damaged" in str(error.value) and "\n" not in str(error.value)


def test_a_table_of_another_shape_names_the_missing_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = start_run(tmp_path, "m")
    pq.write_table(pa.table({"name": ["conv1"]}), run.path / "layers.parquet")
    with pytest.raises(RunError, match=r"lacks the columns .*trial_gain"):
        _ = run.layers


def test_reading_runs_needs_no_torch() -> None:
    import subprocess
    import sys

    check = "import sys, audit.runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
