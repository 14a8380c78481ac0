"""A scan of a small trained network: what it writes, what its numbers are, what it may look at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import audit.scan
from audit.errors import ImageError, LayerNotFoundError, UsageError
from audit.evidence import Gathering
from audit.networks import open_network
from audit.runs import RUN_IMAGES, RUN_LAYERS, Run, newest_run, open_run
from audit.saliency import layer_maps, normalize_maps
from audit.scan import ScanConfig, ScanRequest, scan_model
from tests.shapes import CLASSES, DAMAGED, SPLIT_SIZES, Shapes, damage, normalized, trained_network

COUNTS = {split: 3 * per_class for split, per_class in SPLIT_SIZES.items()}
LAYERS = ["block1_conv1", "block2_conv1", "block2_conv2", "block3_conv1", "predictions"]
WITH_MAPS = LAYERS[:-1]


def scan(shapes: Shapes, out: Path, *, data: Path | None = None, **settings: Any) -> Run:
    request = ScanRequest(
        model=str(shapes.damaged),
        data=data or shapes.photos,
        out=out,
        command=("audit", "scan", "damaged.safetensors"),
    )
    return scan_model(request, ScanConfig(**settings))


@pytest.fixture(scope="module")
def scanned(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One finished scan, read back from its folder."""
    return open_run(scan(shapes, tmp_path_factory.mktemp("runs")).path)


@pytest.fixture
def few(shapes: Shapes, tmp_path: Path) -> Path:
    """Some of the images, to be changed at will: six of each class and split."""
    for file in sorted(shapes.photos.rglob("*.png")):
        if int(file.stem) < 18:
            target = tmp_path / "few" / file.relative_to(shapes.photos)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return tmp_path / "few"


def pictures(shapes: Shapes, paths: list[str]) -> Tensor:
    """The images as the network takes them, read without anything of the audit package."""
    pixels = [np.asarray(Image.open(shapes.photos / path)) for path in paths]
    return normalized(np.stack(pixels))


def labels_of(paths: list[str]) -> Tensor:
    return torch.tensor([CLASSES.index(path.split("/")[1]) for path in paths])


# -------------------------------------------------------------------- the run folder


def test_the_run_folder_holds_every_file_of_the_contract(scanned: Run) -> None:
    files = {path.relative_to(scanned.path).as_posix() for path in scanned.path.rglob("*.*")}
    expected = {"run.json", "images.parquet", "layers.parquet", "verdict.json", "maps/index.json"}
    expected |= {f"maps/gradcam/{layer}.npz" for layer in WITH_MAPS}
    expected |= {f"maps/images/{image['id']}.png" for image in scanned.gallery["images"]}
    groups = scanned.groups["groups"]
    examples = {example["id"] for group in groups for example in group["examples"]}
    expected |= {"groups.json", "maps/groups.npz", "maps/artefacts.npz"}
    expected |= {*(f"maps/groups/{x}.png" for x in examples)}
    assert files == expected
    assert scanned.path.name.endswith("Z-damaged")


def test_run_json_says_what_was_scanned_how_and_where(scanned: Run, shapes: Shapes) -> None:
    info = json.loads((scanned.path / "run.json").read_text())
    assert info["schema_version"] == 1
    assert info["status"] == "complete"
    assert info["created_utc"] <= info["finished_utc"]
    assert info["command"] == ["audit", "scan", "damaged.safetensors"]
    assert info["seed"] == 0 and info["config"]["batch_size"] == 32
    assert {"layermend", "python", "torch"} <= set(info["versions"])
    assert info["device"]["type"] in ("cpu", "cuda") and info["device"]["threads"] >= 1
    module = trained_network()
    parameters = sum(value.numel() for value in module.parameters())
    model = info["model"]
    assert model["source"] == str(shapes.damaged)
    assert model["arch"] == "layermend:vgg"
    assert model["sha256"] == open_network(str(shapes.damaged)).sha256
    assert (model["parameters"], model["layers"]) == (parameters, len(LAYERS))
    assert model["classes"] == list(CLASSES)
    assert model["preprocessing"]["input_size"] == [32, 32]
    data = info["data"]
    assert data["root"] == str(shapes.photos) and len(data["fingerprint"]) == 64
    assert data["split_source"] == "folders" and data["splits"] == COUNTS
    assert data["images"] == sum(COUNTS.values())
    assert (data["skipped"], data["duplicates"], data["skipped_files"]) == (0, 0, [])
    assert {"evidence", "trials", "gallery", "total"} <= set(info["timings_s"])
    assert info["timings_s"]["total"] > 0 and info["peak_memory_mib"] > 50


def test_the_tables_have_the_columns_of_the_contract(scanned: Run) -> None:
    assert list(scanned.images.columns) == list(RUN_IMAGES)
    assert list(scanned.layers.columns) == list(RUN_LAYERS)
    assert len(scanned.images) == sum(COUNTS.values())
    assert scanned.images["case"].isin([1, 2, 3, 4]).all()  # by the proxy, without masks
    assert list(scanned.layers["name"]) == LAYERS
    assert list(scanned.layers["index"]) == list(range(len(LAYERS)))
    assert scanned.layers["alias"].iloc[3] == "last_conv"
    assert sorted(scanned.layers["rank"]) == [1, 2, 3, 4, 5]
    assert scanned.layers.sort_values("rank")["blame"].is_monotonic_decreasing
    assert scanned.layers["blame"].sum() == pytest.approx(1)


# -------------------------------------------------------------------- its numbers


def test_predictions_are_those_of_the_plain_module(scanned: Run, shapes: Shapes) -> None:
    module = trained_network()
    damage(module)
    paths = list(scanned.images["path"])
    targets = labels_of(paths)
    with torch.no_grad():
        logits = module(pictures(shapes, paths)).double()
    probabilities = logits.softmax(dim=1)
    table = scanned.images
    assert list(table["label"]) == targets.tolist()
    assert list(table["label_name"]) == [CLASSES[label] for label in targets]
    assert list(table["predicted"]) == logits.argmax(dim=1).tolist()
    assert list(table["predicted_name"]) == [CLASSES[k] for k in logits.argmax(dim=1)]
    assert list(table["right"]) == (logits.argmax(dim=1) == targets).tolist()
    true = probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
    np.testing.assert_allclose(table["p_true"], true, atol=1e-5)
    np.testing.assert_allclose(table["p_predicted"], probabilities.amax(dim=1), atol=1e-5)
    entropies = F.cross_entropy(logits, targets, reduction="none")
    np.testing.assert_allclose(table["ce"], entropies, rtol=1e-4, atol=1e-5)
    assert list(table["split"]) == [path.split("/")[0] for path in paths]
    for split, count in {"all": len(table), **COUNTS}.items():
        rows = table if split == "all" else table[table["split"] == split]
        metrics = scanned.info["metrics"][split]
        assert metrics["n"] == count == len(rows)
        assert metrics["accuracy"]["value"] == pytest.approx(rows["right"].mean())
        assert metrics["cross_entropy"]["value"] == pytest.approx(rows["ce"].mean())


def test_map_scores_of_images_are_those_of_the_last_convolution(
    scanned: Run, shapes: Shapes
) -> None:
    module, outputs = trained_network(), []
    damage(module)
    module.double()
    # Single precision may decide otherwise whether a rectifier lets an input pass that is zero but
    # for rounding: how near to it the nearest input of each image lies.
    nearest = torch.full((len(scanned.images),), torch.inf, dtype=torch.float64)

    def note(_module: object, inputs: tuple[Tensor, ...]) -> None:
        nearest.copy_(torch.minimum(nearest, inputs[0].detach().abs().flatten(1).amin(dim=1)))

    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.register_forward_pre_hook(note)

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # the rectifier behind it works in place

    module.get_submodule("block3_conv1").register_forward_hook(keep)
    paths = list(scanned.images["path"])
    logits = module(pictures(shapes, paths).double())
    score = logits.gather(1, labels_of(paths)[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, outputs[0])
    raw = (gradients.mean((2, 3), keepdim=True) * outputs[0]).sum(1).relu()  # Eq. 2-3
    maps = normalize_maps(raw).detach().numpy()
    difference = np.abs(scanned.images["map_mean"].to_numpy() - maps.mean(axis=(1, 2)))
    settled = (nearest > 1e-6).numpy()
    assert settled.mean() > 0.9 and difference[settled].max() < 1e-5 and difference.max() < 1e-3
    height, width = maps.shape[1:]
    for image, x, y in zip(
        maps, scanned.images["map_peak_x"], scanned.images["map_peak_y"], strict=True
    ):
        assert image[int(y * height), int(x * width)] == pytest.approx(image.max(), abs=1e-5)


def test_evidence_is_that_of_the_images_outside_the_test_split(
    scanned: Run, shapes: Shapes
) -> None:
    module = trained_network()
    damage(module)
    table = scanned.images[scanned.images["split"] != "test"]
    paths = list(table["path"])
    F.cross_entropy(module(pictures(shapes, paths)), labels_of(paths)).backward()
    for row in scanned.layers.itertuples():
        own = module.get_submodule(str(row.name))
        norm = sum(float(p.grad.square().sum()) for p in own.parameters()) ** 0.5
        assert row.gradient_norm == pytest.approx(norm, rel=1e-3)
        assert row.gradient_snr > 0
    last = scanned.layers.set_index("name").loc["block3_conv1"]
    means = table.groupby("right")["map_mean"].mean()
    assert last["map_mean_right"] == pytest.approx(means[True], rel=1e-5)
    assert last["map_mean_wrong"] == pytest.approx(means[False], rel=1e-5)
    lit, error = table["map_mean"], 1 - table["p_true"]
    penalty = (error * (1 - lit) + lit * (1 - error)).mean()
    assert last["penalty"] == pytest.approx(penalty, rel=1e-5)
    head = scanned.layers.set_index("name").loc["predictions"]
    assert head[["map_mean_right", "map_auroc", "penalty"]].isna().all()


def test_the_gallery_shows_what_the_network_saw_and_where_it_looked(
    scanned: Run, shapes: Shapes
) -> None:
    gallery = scanned.gallery
    assert gallery["methods"] == ["gradcam"] and gallery["layers"] == WITH_MAPS
    assert (gallery["shown_layer"], gallery["shown_method"]) == ("block3_conv1", "gradcam")
    shown = gallery["images"]
    assert 0 < len(shown) <= 32 and len({image["path"] for image in shown}) == len(shown)
    assert {image["right"] for image in shown} == {True, False}
    rows = scanned.images.set_index("path")
    for image in shown:
        row = rows.loc[image["path"]]
        assert image["label_name"] == row["label_name"]
        assert image["predicted_name"] == row["predicted_name"]
        assert image["right"] == row["right"] and image["split"] == row["split"]
        assert image["p_true"] == pytest.approx(row["p_true"])
        seen = np.asarray(Image.open(scanned.gallery_image(image["id"])))
        assert np.array_equal(seen, np.asarray(Image.open(shapes.photos / image["path"])))
    paths = [image["path"] for image in shown]
    program = open_network(str(shapes.damaged)).program
    for layer, raw in layer_maps(program, pictures(shapes, paths), labels_of(paths)).items():
        maps = scanned.maps("gradcam", layer)
        assert maps.min() >= 0 and maps.max() <= 1
        np.testing.assert_allclose(maps, normalize_maps(raw).numpy(), atol=2e-3)
        with np.load(scanned.path / "maps" / "gradcam" / f"{layer}.npz") as stored:
            assert stored["maps"].dtype == np.float16


def test_the_damaged_layer_is_named(scanned: Run) -> None:
    verdict = json.loads((scanned.path / "verdict.json").read_text())
    assert verdict["layers"][0] == DAMAGED  # three layers repair it as well: a close call
    assert verdict["confidence"] == scanned.layers.set_index("name").loc[DAMAGED, "blame"]
    ranks = scanned.layers.set_index("name")["rank"]
    assert ranks[DAMAGED] == 1
    assert DAMAGED in verdict["reasons"][0]
    blamed = scanned.layers.sort_values("rank").head(len(verdict["layers"]))
    assert list(blamed["name"]) == verdict["layers"]
    assert blamed["blame"].sum() >= 0.9 > blamed["blame"].iloc[:-1].sum()
    judged = scanned.images[scanned.images["split"] == "val"]
    assert verdict["numbers"]["held_out_images"] == len(judged)
    assert verdict["numbers"]["held_out_wrong"] == int((~judged["right"]).sum())
    best = scanned.layers.set_index("name").loc[verdict["numbers"]["best"]["layer"]]
    assert verdict["numbers"]["best"]["value"] == pytest.approx(best["trial_gain"])
    assert best["trial_steps"] == scanned.layers["trial_steps"].max() == 16


def test_a_healthy_network_is_not_accused(shapes: Shapes, tmp_path: Path) -> None:
    run = scan(
        Shapes(photos=shapes.photos, damaged=shapes.healthy, healthy=shapes.healthy), tmp_path
    )
    assert run.verdict["verdict"] == "none" and run.verdict["layers"] == []
    assert run.verdict["confidence"] is None


def test_the_same_seed_gives_the_same_tables(scanned: Run, shapes: Shapes, tmp_path: Path) -> None:
    again = scan(shapes, tmp_path)
    assert again.path != scanned.path
    pd.testing.assert_frame_equal(again.images, scanned.images, check_exact=True)
    pd.testing.assert_frame_equal(again.layers, scanned.layers, check_exact=True)
    assert again.verdict == scanned.verdict
    assert again.gallery == scanned.gallery


# -------------------------------------------------------------------- what it may look at


class _Spy:
    """Remembers the images that evidence and trials were given, one byte string each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.evidence: list[bytes] = []
        self.learning: list[bytes] = []
        self.judging: list[bytes] = []
        add, repair = Gathering.add, audit.scan.trial_repairs

        def add_batch(gathering: Gathering, images: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.evidence += map(_bytes, images)
            return add(gathering, images, *args, **kwargs)

        def trial_repairs(
            program: Any, images: Tensor, labels: Any, held_out: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.learning += map(_bytes, images)
            self.judging += map(_bytes, held_out)
            return repair(program, images, labels, held_out, *args, **kwargs)

        monkeypatch.setattr(Gathering, "add", add_batch)
        monkeypatch.setattr(audit.scan, "trial_repairs", trial_repairs)


def _bytes(image: Tensor) -> bytes:
    return image.cpu().numpy().tobytes()


def test_the_test_split_chooses_nothing(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = _Spy(monkeypatch)
    run = scan(shapes, tmp_path)
    split_of = {}
    network = open_network(str(shapes.damaged))
    for row in run.images.itertuples():
        pixels = torch.from_numpy(np.array(Image.open(shapes.photos / row.path))).permute(2, 0, 1)
        split_of[_bytes(network.normalize(pixels.unsqueeze(0))[0])] = row.split
    assert len(split_of) == sum(COUNTS.values())
    seen = [split_of[image] for image in spy.evidence]
    assert {split: seen.count(split) for split in set(seen)} == {"train": 96, "val": 72}
    assert {split_of[image] for image in spy.learning} == {"train"}
    assert {split_of[image] for image in spy.judging} == {"val"}
    assert len(set(spy.learning)) == 64 and len(set(spy.judging)) == 72
    assert len(spy.learning) == 2 * 64  # trials of weights, then of channels
    assert len(spy.judging) == 2 * 72


def test_trials_of_a_network_that_knows_its_training_images_use_halves_of_the_val_split(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few errors in the train split: there is nothing to learn from."""
    table = scan(shapes, tmp_path / "first").images.set_index("path")
    data = tmp_path / "known"
    for path, right in table["right"].items():
        if right or not str(path).startswith("train/"):
            target = data / str(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shapes.photos / str(path), target)
    spy = _Spy(monkeypatch)
    scan(shapes, tmp_path / "runs", data=data)
    assert len(set(spy.learning)) == len(set(spy.judging)) == COUNTS["val"] // 2
    assert not set(spy.learning) & set(spy.judging)
    of_val = [path for path in table.index if path.startswith("val/")]
    expected = set(map(_bytes, pictures(shapes, of_val)))
    assert set(spy.learning) | set(spy.judging) == expected


# -------------------------------------------------------------------- options


def test_layers_are_chosen_by_patterns_and_maps_are_kept_all_the_same(
    shapes: Shapes, tmp_path: Path
) -> None:
    run = scan(shapes, tmp_path, layers="block2_*,predictions")
    assert list(run.layers["name"]) == ["block2_conv1", "block2_conv2", "predictions"]
    assert sorted(run.layers["rank"]) == [1, 2, 3]
    assert run.verdict["layers"][0] == DAMAGED
    assert run.images["map_mean"].notna().all()  # of the last convolution, in every split
    assert run.gallery["shown_layer"] == "block3_conv1"
    assert run.gallery["layers"] == ["block2_conv1", "block2_conv2", "block3_conv1"]


def test_a_pattern_that_matches_nothing_leaves_no_run_behind(
    shapes: Shapes, tmp_path: Path
) -> None:
    with pytest.raises(LayerNotFoundError, match="block2_conv2"):
        scan(shapes, tmp_path / "runs", layers="block2_conv9")
    assert not (tmp_path / "runs").exists()


def test_a_limit_scans_a_stratified_sample(shapes: Shapes, tmp_path: Path) -> None:
    run = scan(shapes, tmp_path, limit=34)
    assert len(run.images) == run.info["data"]["images"] == 34
    assert run.images.groupby("split").size().to_dict() == {"test": 6, "train": 16, "val": 12}
    assert run.images.groupby("label_name").size().between(10, 13).all()
    # Fewer images than a batch holds: the noise of the gradient is known all the same.
    assert run.layers["gradient_snr"].gt(0).all()


@pytest.mark.parametrize("limit", [1, 2])
def test_a_handful_of_images_is_scanned_without_a_verdict(
    shapes: Shapes, tmp_path: Path, limit: int
) -> None:
    run = scan(shapes, tmp_path, limit=limit)
    assert run.status == "complete" and len(run.images) == limit
    assert run.verdict["verdict"] == "none"
    assert "at least 5 errors" in run.verdict["reasons"][0]
    json.loads((run.path / "run.json").read_text())


@pytest.mark.parametrize("method", ["guided-gradcam", "hirescam", "layercam", "gradients"])
def test_the_gallery_is_drawn_by_the_method_that_was_asked_for(
    shapes: Shapes, few: Path, tmp_path: Path, method: str
) -> None:
    run = scan(shapes, tmp_path / "runs", data=few, method=method, layers="block3_conv1")
    gallery = run.gallery
    assert gallery["methods"] == [method] and gallery["shown_method"] == method
    layer = "input" if method == "gradients" else "block3_conv1"
    assert gallery["layers"] == [layer] and gallery["shown_layer"] == layer
    maps = run.maps(method, layer)
    assert len(maps) == len(gallery["images"]) and 0 <= maps.min() <= maps.max() <= 1
    assert maps.max() == 1


def test_an_unknown_method_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--method is 'magic'; expected one of gradcam"):
        ScanConfig(method="magic")


# -------------------------------------------------------------------- when things go wrong


def test_unreadable_images_are_left_out_counted_and_listed(
    shapes: Shapes, few: Path, tmp_path: Path
) -> None:
    broken = few / "train" / "disk" / "000.png"
    broken.write_bytes(broken.read_bytes()[:400])  # a whole header and half of the pixels
    (few / "val" / "square" / "empty.png").touch()
    (few / "val" / "square" / "note.txt").write_text("not an image")
    shutil.copyfile(few / "test" / "disk" / "003.png", few / "test" / "disk" / "copy.png")
    run = scan(shapes, tmp_path / "runs", data=few)
    images = len(list(few.rglob("*.png"))) - 3  # broken, empty and the copy
    data = run.info["data"]
    assert len(run.images) == data["images"] == sum(data["splits"].values()) == images
    reasons = {file["path"]: file["reason"] for file in data["skipped_files"]}
    assert {"train/disk/000.png", "val/square/empty.png", "val/square/note.txt"} <= set(reasons)
    assert len(reasons) == data["skipped"] == 4 and data["duplicates"] == 1
    assert all(reasons.values())
    assert "train/disk/000.png" not in set(run.images["path"])
    assert run.info["metrics"]["all"]["n"] == images


def test_images_that_all_fail_to_decode_are_one_clear_error(
    shapes: Shapes, few: Path, tmp_path: Path
) -> None:
    for file in few.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(ImageError, match="none of the .* images in .*few could be decoded"):
        scan(shapes, tmp_path / "runs", data=few)
    assert newest_run(tmp_path / "runs").status == "failed"


@pytest.mark.parametrize("error", [RuntimeError("the disk is full"), KeyboardInterrupt()])
def test_a_scan_that_stops_midway_says_so_in_its_run(
    shapes: Shapes, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(audit.scan, "trial_repairs", fail)
    with pytest.raises(type(error)):
        scan(shapes, tmp_path / "runs", data=few)
    info = json.loads((newest_run(tmp_path / "runs").path / "run.json").read_text())
    assert info["status"] == "failed"
    if isinstance(error, KeyboardInterrupt):
        assert info["failure"].startswith("interrupted; `audit scan ")
        assert info["failure"].endswith("--resume` goes on")
    else:
        assert info["failure"] == str(error)
    assert info["finished_utc"] >= info["created_utc"]
    assert info["model"]["source"] == str(shapes.damaged)
