"""A scan with masks and without: what its images, its record and its report say of the cases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from audit import console
from audit.cases import by_proxy, case_table
from audit.cases_section import PROXY_CAUTION, cases_section
from audit.errors import ImageError, UsageError
from audit.map_scores import proxy_positions
from audit.networks import open_network
from audit.report import write_report
from audit.runs import Run, open_run
from audit.saliency import layer_maps, normalize_maps, resize_maps
from audit.scan import ScanConfig, ScanRequest, scan_model
from audit.statistics import wilson
from audit.summary import scan_summary
from tests.shapes import CLASSES, SIDE, Shapes, draw, normalized

LAYER = "block3_conv1"
LIMIT = 60


def scan(shapes: Shapes, out: Path, *, masks: Path | None = None, **settings: Any) -> Run:
    request = ScanRequest(
        model=str(shapes.damaged), data=shapes.photos, masks=masks, out=out, command=("audit",)
    )
    config = ScanConfig(**{"limit": LIMIT, "layers": LAYER, **settings})
    return open_run(scan_model(request, config).path)


@pytest.fixture(scope="module")
def masks(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes' own masks: what is brighter than any noise can be, and none for some photos."""
    root = tmp_path_factory.mktemp("masks")
    for photo in sorted(shapes.photos.rglob("*.png")):
        if int(photo.stem) % 10 == 7:
            continue
        mask = np.asarray(Image.open(photo)).min(axis=2) >= 120
        target = root / photo.relative_to(shapes.photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8)).save(target)
    return root


@pytest.fixture(scope="module")
def masked(shapes: Shapes, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return scan(shapes, tmp_path_factory.mktemp("runs"), masks=masks, map_threshold=0.4)


@pytest.fixture(scope="module")
def unmasked(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return scan(shapes, tmp_path_factory.mktemp("runs"))


def test_the_shapes_fill_some_of_their_images() -> None:
    pixels, _ = draw(4, seed=0)
    assert pixels.shape[1:3] == (SIDE, SIDE)


def test_scores_against_masks_are_those_of_the_maps_made_anew(
    masked: Run, shapes: Shapes, masks: Path
) -> None:
    program = open_network(str(shapes.damaged)).program
    table = masked.images
    paths = list(table["path"])
    photos = np.stack([np.asarray(Image.open(shapes.photos / path)) for path in paths])
    targets = torch.tensor([CLASSES.index(path.split("/")[1]) for path in paths])
    raw = layer_maps(program, normalized(photos), targets, layers=[LAYER])[LAYER]
    maps = resize_maps(normalize_maps(raw), (SIDE, SIDE)).double().numpy()
    assert table["map_energy_inside"].notna().sum() > LIMIT // 2
    for row, heat in zip(table.to_dict("records"), maps, strict=True):
        if not (masks / row["path"]).exists():
            assert math.isnan(row["map_energy_inside"]) and math.isnan(row["mask_area"])
            assert row["map_pointing_hit"] is None and row["map_accurate"] is None
            assert math.isnan(row["case"])
            continue
        mask = np.asarray(Image.open(masks / row["path"])) > 0
        energy = (heat * mask).sum() / heat.sum() if heat.sum() else 0.0
        assert row["map_energy_inside"] == pytest.approx(energy, abs=1e-4)
        assert row["mask_area"] == pytest.approx(mask.mean())
        assert row["map_pointing_hit"] == (heat.sum() > 0 and bool(mask.flat[heat.argmax()]))
        assert row["map_accurate"] == (row["map_energy_inside"] >= 0.4)
        expected = {(1, 1): 1, (0, 1): 2, (1, 0): 3, (0, 0): 4}
        assert row["case"] == expected[int(row["right"]), int(row["map_accurate"])]
    assert table["map_faithfulness"].isna().all()


def test_evidence_on_the_shown_layer_is_the_mean_over_images_outside_the_test_split(
    masked: Run, unmasked: Run
) -> None:
    table = masked.images[masked.images["split"] != "test"]
    known = table[table["map_energy_inside"].notna()]
    assert 10 < len(known) < len(table)
    (row,) = masked.layers.to_dict("records")
    assert row["energy_inside"] == pytest.approx(known["map_energy_inside"].mean())
    assert row["pointing_game"] == pytest.approx(known["map_pointing_hit"].astype(float).mean())
    assert math.isnan(row["energy_drop"])
    columns = ["energy_inside", "pointing_game", "energy_drop"]
    assert unmasked.layers[columns].isna().all(axis=None)


def test_the_record_of_the_run_adds_the_cases_up(masked: Run) -> None:
    cases, table = masked.info["cases"], masked.images
    known = table["case"].dropna()
    assert (cases["source"], cases["threshold"]) == ("masks", 0.4)
    assert (cases["layer"], cases["method"]) == (LAYER, "gradcam")
    assert cases["images"] == len(known) and cases["without"] == LIMIT - len(known) > 0
    assert "40%" in cases["rule"]
    whole = cases["table"][0]
    for case in (1, 2, 3, 4):
        count = int((known == case).sum())
        assert whole[f"case{case}"] == {"count": count, **wilson(count, len(known)).as_dict()}
    for row in cases["table"][1:]:
        of_class = table[table["label_name"] == row["class"]]["case"]
        assert row["n"] == of_class.notna().sum()
        assert row["case4"]["count"] == (of_class == 4).sum()
    scores = cases["scores"]
    assert scores["energy_inside"]["value"] == pytest.approx(table["map_energy_inside"].mean())
    assert scores["energy_by_chance"] == pytest.approx(table["mask_area"].mean())
    assert cases["masks"]["kind"] == "folder" and cases["masks"]["matched"] == len(known)


def test_without_masks_the_proxy_judges_and_is_called_one(unmasked: Run) -> None:
    cases, table = unmasked.info["cases"], unmasked.images
    assert cases["source"] == "proxy" and cases["rule"].startswith("Proxy:")
    assert table["map_faithfulness"].between(0, 1).all() and table["case"].notna().all()
    assert (table["map_accurate"] == (table["map_faithfulness"] >= cases["threshold"])).all()
    assert table["map_energy_inside"].isna().all() and "masks" not in cases


def test_the_proxy_judges_a_seeded_draw_of_the_images_that_loaded() -> None:
    loaded = np.arange(2000) % 3 > 0
    drawn = proxy_positions(loaded, seed=5)
    assert len(drawn) == len(set(drawn)) == 512 and loaded[drawn].all()
    assert drawn == proxy_positions(loaded, seed=5) != proxy_positions(loaded, seed=6)
    assert proxy_positions(loaded[:30], seed=5) == np.flatnonzero(loaded[:30]).tolist()


def test_masks_change_no_prediction_and_no_evidence(masked: Run, unmasked: Run) -> None:
    same = ["path", "predicted", "p_true", "ce", "map_mean", "map_peak_x", "split"]
    assert masked.images[same].equals(unmasked.images[same])
    by_masks = ["energy_inside", "pointing_game", "energy_drop"]
    without = [run.layers.drop(columns=by_masks) for run in (masked, unmasked)]
    assert without[0].equals(without[1]) and masked.verdict == unmasked.verdict


def test_masks_that_belong_to_nothing_leave_no_run_behind(shapes: Shapes, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.new("L", (SIDE, SIDE), 1).save(tmp_path / "masks" / "other.png")
    with pytest.raises(ImageError, match="name masks like their photos"):
        scan(shapes, tmp_path / "runs", masks=tmp_path / "masks")
    assert not (tmp_path / "runs").exists()


def test_one_bad_mask_is_counted_and_named(shapes: Shapes, masks: Path, tmp_path: Path) -> None:
    for mask in masks.rglob("*.png"):
        target = tmp_path / "masks" / mask.relative_to(masks)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(mask.read_bytes())
    everything = scan(shapes, tmp_path / "first", masks=tmp_path / "masks")
    bad = str(everything.images.dropna(subset=["case"])["path"].iloc[0])
    Image.new("L", (5, 5), 1).save(tmp_path / "masks" / bad)
    run = scan(shapes, tmp_path / "second", masks=tmp_path / "masks")
    refused = run.info["cases"]["masks"]["refused_files"]
    assert [one["path"] for one in refused] == [bad] and "5 x 5" in refused[0]["reason"]
    assert run.info["cases"]["images"] == everything.info["cases"]["images"] - 1
    assert run.images.set_index("path")["case"].isna()[bad]


@pytest.mark.parametrize("threshold", [0.0, 1.01, -1, float("nan")])
def test_a_threshold_outside_its_range_is_wrong_usage(threshold: float) -> None:
    with pytest.raises(UsageError, match="--map-threshold"):
        ScanConfig(map_threshold=threshold)


def test_a_threshold_that_no_map_reaches_is_said(
    shapes: Shapes, masks: Path, tmp_path: Path, masked: Run
) -> None:
    run = scan(shapes, tmp_path / "runs", masks=masks, map_threshold=1.0)
    note = run.info["cases"]["note"]
    assert "threshold of 100%" in note and masked.info["cases"]["note"] == ""
    section = cases_section(run.info)
    assert section and section["caution"] == note


def test_report_and_summary_show_the_cases_and_name_the_source(
    masked: Run, unmasked: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, source in ((masked, "by masks"), (unmasked, "by proxy")):
        html = write_report(run, tmp_path / f"{source}.html").read_text()
        assert f"Cases 1 to 4, {source}" in html
        assert ("These cases come from a proxy" in html) == (source == "by proxy")
        console.stdout.print(scan_summary(run))
        printed = " ".join(capsys.readouterr().out.split())
        assert f"Cases 1 to 4, {source}" in printed
        assert (PROXY_CAUTION in printed) == (source == "by proxy")
        section = cases_section(run.info)
        assert section is not None
        whole = run.info["cases"]["table"][0]
        for case, figure in enumerate(section["figures"], start=1):
            share = 100 * whole[f"case{case}"]["value"]
            assert figure.value == f"{share:.1f}\N{NO-BREAK SPACE}%"
            assert figure.value in html
            assert ("(proxy)" in figure.label) == (source == "by proxy")


def test_a_proxy_that_says_nothing_is_shown_as_that(
    unmasked: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(unmasked.path)
    accuracy = by_proxy([0.2] * 60, 0.99)
    table = case_table(accuracy.accurate, ["disk"] * 60)  # no case anywhere
    run.info["cases"] |= {"table": table, "note": accuracy.note, "images": 0, "without": 60}
    html = write_report(run, tmp_path / "r.html").read_text()
    assert accuracy.note in html and "Case 1:" not in html and "nan" not in html
    console.stdout.print(scan_summary(run))
    assert f"by proxy: {accuracy.note}" in " ".join(capsys.readouterr().out.split())


def test_runs_from_before_cases_still_open_and_their_report_has_no_such_section(
    unmasked: Run, tmp_path: Path
) -> None:
    old = tmp_path / unmasked.path.name
    old.mkdir()
    for name in ("run.json", "layers.parquet", "verdict.json"):
        (old / name).write_bytes((unmasked.path / name).read_bytes())
    table = pq.read_table(unmasked.path / "images.parquet")
    added = [name for name in table.column_names if name.startswith(("map_", "mask_"))]
    added = [name for name in added if name not in ("map_mean", "map_peak_x", "map_peak_y")]
    assert len(added) == 5
    pq.write_table(table.drop_columns(added), old / "images.parquet")
    run = open_run(old)
    assert list(run.images.columns) == list(unmasked.images.columns)
    assert run.images[added].isna().all().all()
    assert run.images["ce"].equals(unmasked.images["ce"])
    assert cases_section({key: run.info[key] for key in run.info if key != "cases"}) is None
    run.info.pop("cases")
    assert "Cases 1 to 4" not in write_report(run, tmp_path / "r.html").read_text()


def test_the_command_takes_masks_and_a_threshold(
    shapes: Shapes, masks: Path, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    options = ("--data", shapes.photos, "--layers", LAYER, "--limit", "30", "--json")
    finished = run_command(
        *("audit", "scan", shapes.damaged, *options, "--masks", masks, "--map-threshold", ".3")
    )
    assert finished.returncode == 0, finished.stderr
    cases = json.loads(finished.stdout)["cases"]
    assert (cases["source"], cases["threshold"]) == ("masks", 0.3)
    missing = run_command("audit", "scan", shapes.damaged, *options, "--masks", tmp_path / "none")
    assert missing.returncode == 1
    assert "give a folder of mask images or a COCO JSON file" in " ".join(missing.stderr.split())
