"""One repair from run folder to run folder, and every way in which it should refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import structural_similarity

import repair.layer
from audit.errors import LayerNotFoundError, RunError, UsageError
from audit.files import read_json, sha256_file, write_json
from audit.images import ImageFolder, load_pixels
from audit.networks import ModelCard, Network, open_network, read_card, write_card
from audit.runs import RepairFolder, Run, open_repair, open_run, start_run
from audit.saliency import layer_maps, normalize_maps
from audit.statistics import mcnemar
from repair.config import RepairConfig
from repair.layer import RepairRequest, flagged_layer, repair_layer

from .conftest import (
    CLASSES,
    CONFIG,
    DAMAGED,
    draw_photos,
    whole_network_predictions,
    write_run,
)

MakeRun = Callable[..., Run]


def test_the_layer_that_the_verdict_would_have_repaired_is_the_one(tmp_path: Path) -> None:
    run = start_run(tmp_path, "shapes")
    run.write_verdict({"verdict": "spread", "layers": ["a", "b"], "flagged": "b"})
    assert flagged_layer(run) == "b"
    run.write_verdict({"verdict": "none", "layers": [], "flagged": None})
    with pytest.raises(RunError, match=r"found no layer at fault .* name it with --name LAYER$"):
        flagged_layer(run)
    run.write_layers({"name": ["a", "b", "c"], "rank": [1, 2, 3], "trial_gain": [0.1, 0.2, None]})
    with pytest.raises(
        RunError, match="--name LAYER, such as --name b, whose short repair did most"
    ):
        flagged_layer(open_run(run.path))


def test_the_flagged_layer_is_repaired_and_accepted(finished: tuple[Run, RepairFolder]) -> None:
    run, repair = finished
    info = read_json(repair.path / "repair.json")
    assert (info["status"], info["layer"], info["alias"]) == ("complete", DAMAGED, "")
    assert info["decision"] == "accepted", info["reasons"]
    assert info["after"]["accuracy"]["value"] > info["before"]["accuracy"]["value"]
    assert info["penalty"]["sentence"].startswith("The penalty")
    assert [r.name for r in open_run(run.path).repairs] == [repair.name]
    assert not list(repair.path.glob("state-*"))


def test_only_the_repaired_layer_differs_in_the_written_weights(
    finished: tuple[Run, RepairFolder], model_file: Path
) -> None:
    _, repair = finished
    before, after = load_file(model_file), load_file(repair.weights)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {f"{DAMAGED}.weight", f"{DAMAGED}.bias"}
    frozen = repair.info["frozen"]
    assert set(frozen["changed"]) == changed
    assert frozen["identical"] == frozen["tensors"] == len(before) - len(changed)
    assert repair.info["model"]["sha256_after"] == sha256_file(repair.weights)


def test_a_tensor_that_changed_outside_the_layer_rejects_the_repair(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupting(tensors: dict[str, torch.Tensor], path: Path) -> None:
        tensors["block1_conv1.weight"] = tensors["block1_conv1.weight"] + 1e-7
        save(tensors, path)

    save = repair.layer.save_file
    monkeypatch.setattr(repair.layer, "save_file", corrupting)
    info = repair_layer(make_run(), replace(CONFIG, controls=()), RepairRequest()).info
    assert info["decision"] == "rejected"
    assert info["reasons"][0].startswith("Tensors outside the layer changed")
    assert info["frozen"]["identical"] == info["frozen"]["tensors"] - 1


def test_the_written_network_opens_and_says_what_the_record_says(
    finished: tuple[Run, RepairFolder], folder: ImageFolder
) -> None:
    _, repair = finished
    repaired = open_network(str(repair.weights))
    predictions = whole_network_predictions(repaired, folder, folder.positions("test"))
    table = repair.images
    assert table["path"].tolist() == [folder.records[i].path for i in folder.positions("test")]
    assert table["predicted_after"].tolist() == predictions.predicted.tolist()
    np.testing.assert_allclose(table["ce_after"], predictions.cross_entropies, rtol=1e-4, atol=1e-6)
    assert repair.info["after"]["accuracy"]["value"] == predictions.right.mean()
    card = read_card(repair.card)
    assert card.classes == CLASSES
    assert card.provenance["repaired_layer"] == DAMAGED


def test_a_network_without_a_named_architecture_is_written_as_a_program(
    network: Network,
    photos: Path,
    folder: ImageFolder,
    card: ModelCard,
    tmp_path: Path,
) -> None:
    source = tmp_path / "shapes.pt2"
    torch.export.save(network.program.to_exported(), source)
    write_card(replace(card, arch=None, arch_args={}), source.with_suffix(".toml"))
    program = open_network(str(source))
    run = write_run(tmp_path / "runs", photos, source, program, folder)
    repair = repair_layer(run, replace(CONFIG, epochs=1, controls=()), RepairRequest())
    again = open_network(str(repair.program))
    weights = load_file(repair.weights)
    assert all(torch.equal(again.program.state[name], value) for name, value in weights.items())
    predictions = whole_network_predictions(again, folder, folder.positions("test"))
    assert repair.images["predicted_after"].tolist() == predictions.predicted.tolist()


def test_the_comparison_is_computed_from_the_table(finished: tuple[Run, RepairFolder]) -> None:
    _, repair = finished
    table, info = repair.images, repair.info
    test = mcnemar(table["right_before"], table["right_after"])
    assert info["difference"]["mcnemar"] == test.as_dict()
    (control,) = info["controls"]
    versus = mcnemar(table["right_control"], table["right_after"])
    assert control["versus_repair"]["mcnemar"] == versus.as_dict()
    change = float((table["ce_after"] - table["ce_before"]).mean())
    assert info["difference"]["cross_entropy"]["value"] == pytest.approx(change)


def test_the_control_takes_as_many_steps_as_the_repair(finished: tuple[Run, RepairFolder]) -> None:
    _, repair = finished
    assert repair.info["training"]["steps"] == repair.info["controls"][0]["steps"] > 0
    history = repair.history
    assert history["role"].tolist() == ["repair"] * 5 + ["ce"] * 5
    trained = history[(history["role"] == "repair") & (history["epoch"] > 0)]
    assert trained[["loss", "ce", "saliency_mean", "r1", "r2", "val_ce"]].notna().all(axis=None)
    assert history.groupby("role")["best"].sum().tolist() == [1, 1]


def test_the_test_split_takes_no_part_in_training(
    finished: tuple[Run, RepairFolder], folder: ImageFolder
) -> None:
    _, repair = finished
    assert set(repair.images["split"]) == {"test"}
    sizes = {split: len(folder.positions(split)) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert repair.info["splits"] == sizes


def test_maps_and_their_similarity_equal_those_of_the_uncut_networks(
    finished: tuple[Run, RepairFolder], network: Network, folder: ImageFolder
) -> None:
    _, repair = finished
    gallery = repair.gallery["images"]
    place = {folder.records[i].path: i for i in range(len(folder.records))}
    shown = [place[entry["path"]] for entry in gallery]
    repaired = open_network(str(repair.weights))
    images = network.normalize(load_pixels(folder, shown, network.card.preprocessing).pixels)
    labels = torch.tensor([folder.records[i].label for i in shown])

    def maps(net: Network) -> np.ndarray:
        raw = layer_maps(net.program, images, labels, layers=[DAMAGED])[DAMAGED]
        return normalize_maps(raw).numpy()

    before, after = maps(network), maps(repaired)
    np.testing.assert_allclose(repair.maps("gradcam", DAMAGED, "before"), before, atol=2e-3)
    np.testing.assert_allclose(repair.maps("gradcam", DAMAGED, "after"), after, atol=2e-3)
    for entry, one, other in zip(gallery, before, after, strict=True):
        expected = structural_similarity(one, other, data_range=1.0)  # type: ignore[no-untyped-call]
        assert entry["ssim"] == pytest.approx(expected, abs=2e-3)
        assert repair.gallery_image(entry["id"]).is_file()
    assert repair.info["ssim"]["n"] == len(repair.images)
    assert repair.info["ssim"]["value"] == pytest.approx(repair.images["ssim"].mean())


class Killed(BaseException):
    """What a killed process looks like from inside."""


@pytest.mark.parametrize("killed", [("trust", 2), ("ce", 1)])
def test_a_killed_repair_resumes_to_the_same_weights_and_numbers(
    make_run: MakeRun,
    finished: tuple[Run, RepairFolder],
    monkeypatch: pytest.MonkeyPatch,
    killed: tuple[str, int],
) -> None:
    run = make_run()
    train = repair.layer.train_layer

    def killing(*given: Any, loss: str, on_epoch: Any, **more: Any) -> Any:
        def kill(row: dict[str, Any]) -> None:
            on_epoch(row)
            if (loss, row["epoch"]) == killed:
                raise Killed

        return train(*given, loss=loss, on_epoch=kill, **more)

    with monkeypatch.context() as patch:
        patch.setattr(repair.layer, "train_layer", killing)
        with pytest.raises(Killed):
            repair_layer(run, CONFIG, RepairRequest())
    (begun,) = run.repairs
    assert begun.status == "running"
    # The settings come from the folder, not from the second command line.
    resumed = repair_layer(run, RepairConfig(), RepairRequest(resume=True))
    assert resumed.path == begun.path
    _, undisturbed = finished
    assert sha256_file(resumed.weights) == sha256_file(undisturbed.weights)
    for part in ("before", "after", "difference", "ssim", "decision", "reasons", "penalty"):
        assert resumed.info[part] == undisturbed.info[part]
    one, other = (r.history.drop(columns="seconds") for r in (resumed, undisturbed))
    assert one.equals(other)


def test_a_resumed_repair_refuses_other_settings(make_run: MakeRun) -> None:
    run = make_run()
    run.start_repair(DAMAGED, {"alias": "", "config": CONFIG.as_dict()})
    asked = RepairRequest(resume=True, stated=frozenset({"epochs"}))
    with pytest.raises(UsageError, match="was started with epochs 4, not 10"):
        repair_layer(run, RepairConfig(), asked)


def test_nothing_to_resume_is_an_error(finished: tuple[Run, RepairFolder]) -> None:
    run, _ = finished
    with pytest.raises(RunError, match="no unfinished repair"):
        repair_layer(run, CONFIG, RepairRequest(resume=True))


def test_a_verdict_of_none_asks_for_a_name(make_run: MakeRun) -> None:
    with pytest.raises(RunError, match="no layer at fault .* --name LAYER"):
        repair_layer(make_run("none"), CONFIG, RepairRequest())


def test_a_healthy_network_can_be_repaired_by_name_and_alias(make_run: MakeRun) -> None:
    config = RepairConfig(epochs=1, learning_rate=1e-6, loss="ce", controls=("ce", "shuffled"))
    repaired = repair_layer(make_run("none"), config, RepairRequest(layer="last_conv"))
    assert repaired.layer == "block3_conv2"
    assert repaired.info["decision"] == "rejected"
    assert repaired.info["controls"] == []
    assert repaired.info["penalty"] == {
        "earned": None,
        "sentence": "No penalty was used.",
        "sentences": ["No penalty was used."],
    }


def test_a_layer_without_maps_is_repaired_by_cross_entropy_only(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(UsageError, match="no spatial output.*--loss ce"):
        repair_layer(run, CONFIG, RepairRequest(layer="predictions"))
    config = replace(CONFIG, loss="ce", epochs=1)
    repaired = repair_layer(run, config, RepairRequest(layer="predictions"))
    assert repaired.info["ssim"] is None
    assert repaired.images["ssim"].isna().all()


def test_a_wrong_layer_name_offers_the_closest(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(LayerNotFoundError, match="closest: block2_conv1"):
        repair_layer(run, CONFIG, RepairRequest(layer="block2_conv9"))
    assert run.repairs == []


def test_added_training_images_never_include_held_out_content(
    make_run: MakeRun, tmp_path: Path, photos: Path, folder: ImageFolder
) -> None:
    more = tmp_path / "more"
    draw_photos(more, 4, seed=99)
    for split in ("train", "val", "test"):
        source = folder.records[folder.positions(split)[0]]  # type: ignore[arg-type]
        shutil.copy(photos / source.path, more / source.class_name / f"copy-{split}.png")
    (more / "disk" / "empty.png").write_bytes(b"")
    config = replace(CONFIG, epochs=1, controls=())
    info = repair_layer(make_run(), config, RepairRequest(train=more)).info
    added = info["data"]["added"]
    assert (added["added"], added["held_out"], added["known"]) == (12, 2, 1)
    assert [skip["path"] for skip in added["skipped"]] == ["disk/empty.png"]
    assert info["splits"]["train"] == len(folder.positions("train")) + 12
    assert info["splits"]["test"] == len(folder.positions("test"))


def test_images_that_changed_since_the_scan_are_left_out_and_listed(
    make_run: MakeRun, tmp_path: Path, photos: Path, folder: ImageFolder
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    gone, other = (folder.records[i].path for i in folder.positions("test")[:2])
    (moved / gone).unlink()
    shutil.copy(photos / gone, moved / other)
    config = replace(CONFIG, epochs=1, controls=())
    info = repair_layer(make_run(), config, RepairRequest(data=moved)).info
    reasons = {skip["path"]: skip["reason"] for skip in info["data"]["changed"]}
    assert reasons[gone].startswith("it cannot be read now")
    assert reasons[other] == "its content has changed since the scan"
    assert info["splits"]["test"] == len(folder.positions("test")) - 2


def test_images_that_are_all_gone_ask_for_data(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--data DIR"):
        repair_layer(make_run(), CONFIG, RepairRequest(data=tmp_path / "nowhere"))


def test_another_model_than_the_scanned_one_is_refused(
    make_run: MakeRun, finished: tuple[Run, RepairFolder]
) -> None:
    _, repair = finished
    with pytest.raises(RunError, match="its hash differs"):
        repair_layer(make_run(), CONFIG, RepairRequest(model=str(repair.weights)))


def test_a_model_that_moved_asks_for_model(make_run: MakeRun) -> None:
    run = make_run()
    document = read_json(run.path / "run.json")
    document["model"]["source"] = "gone.safetensors"
    write_json(run.path / "run.json", document)
    with pytest.raises(RunError, match="--model FILE"):
        repair_layer(open_run(run.path), CONFIG, RepairRequest())


def test_a_diverging_repair_is_rejected_and_says_so(make_run: MakeRun) -> None:
    config = replace(CONFIG, learning_rate=1e6, controls=())
    info = repair_layer(make_run(), config, RepairRequest()).info
    assert info["decision"] == "rejected"
    assert any("diverged in epoch 1" in reason for reason in info["reasons"])
    assert info["frozen"]["changed"] == []


def test_a_repair_without_memory_for_the_cache_says_so_and_gives_the_same(
    make_run: MakeRun, finished: tuple[Run, RepairFolder]
) -> None:
    _, cached = finished
    config = replace(CONFIG, controls=())
    info = repair_layer(make_run(), config, RepairRequest(cache_gib=0)).info
    assert info["cache"]["kind"] == "recompute" and info["cache"]["bytes"] == 0
    assert cached.info["cache"]["kind"] == "memory" and cached.info["cache"]["bytes"] > 0
    value, expected = (i["after"]["cross_entropy"]["value"] for i in (info, cached.info))
    assert value == pytest.approx(expected, rel=1e-4)


def test_a_failing_repair_is_marked_as_failed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*given: Any, **more: Any) -> None:
        raise OSError("No space left on device")

    run = make_run()
    monkeypatch.setattr(repair.layer, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        repair_layer(run, replace(CONFIG, epochs=1), RepairRequest())
    (failed,) = run.repairs
    assert open_repair(failed.path).status == "failed"
    assert not failed.weights.exists()
