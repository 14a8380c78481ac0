"""Two checkpoints side by side, against what each of them says by itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from skimage.metrics import structural_similarity
from torch import nn

import repair.cli
from audit.images import ImageFolder, load_pixels
from audit.networks import ModelCard, Network, open_network, write_card
from audit.saliency import layer_maps
from repair.comparison import ComparisonRequest, compare_networks

LAYER = "block3_conv2"


@pytest.fixture(scope="module")
def other_file(model_file: Path, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with permuted channels in one layer, and its classes in another order."""
    state = load_file(model_file)
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"].roll(3, dims=0).clone()
    turned = [2, 0, 1]
    for kind in ("weight", "bias"):
        state[f"predictions.{kind}"] = state[f"predictions.{kind}"][turned].clone()
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_file(state, path)
    classes = tuple(card.classes[i] for i in turned)
    write_card(dataclasses.replace(card, classes=classes), path.with_suffix(".toml"))
    return path


def test_both_networks_are_judged_on_the_same_images_by_class_name(
    model_file: Path, other_file: Path, photos: Path, folder: ImageFolder, network: Network
) -> None:
    found = compare_networks(
        ComparisonRequest(first=str(model_file), second=str(other_file), data=photos, layer=LAYER)
    )
    other = open_network(str(other_file))
    batch = load_pixels(folder, folder.positions("test"), network.card.preprocessing)
    labels = torch.tensor([folder.records[i].label for i in batch.indices.tolist()])
    names = np.array(network.card.classes)
    truth = names[labels.numpy()]
    right, maps, nats = [], [], []
    for one in (network, other):
        images = one.normalize(batch.pixels)
        with torch.no_grad():
            logits = one.program.logits(images)
        said = np.array(one.card.classes)[logits.argmax(dim=1).numpy()]
        right.append(said == truth)
        targets = torch.tensor([one.card.classes.index(name) for name in truth])
        nats.append(nn.functional.cross_entropy(logits.double(), targets, reduction="none"))
        raw = layer_maps(one.program, images, targets, layers=[LAYER])[LAYER]
        maps.append([m / m.max() if m.max() > 0 else m for m in raw.double()])
    assert found["images"] == len(labels)
    for which, hits in zip(("first", "second"), right, strict=True):
        assert found[which]["accuracy"]["value"] == pytest.approx(hits.mean())
    fixed, broken = int((~right[0] & right[1]).sum()), int((right[0] & ~right[1]).sum())
    test = found["difference"]["mcnemar"]
    assert (test["fixed"], test["broken"]) == (fixed, broken) and broken > 0
    assert test["p_value"] == pytest.approx(binomtest(fixed, fixed + broken).pvalue)
    change = float((nats[1] - nats[0]).mean())
    assert found["difference"]["cross_entropy"]["value"] == pytest.approx(change, rel=1e-5)
    factor = -(-7 // maps[0][0].shape[0])
    sizes = [factor * side for side in maps[0][0].shape]
    enlarged = [
        [
            nn.functional.interpolate(m[None, None], size=sizes, mode="bilinear")[0, 0].numpy()
            for m in chosen
        ]
        for chosen in maps
    ]
    similar = [
        structural_similarity(a, b, win_size=7, data_range=1.0)
        for a, b in zip(*enlarged, strict=True)
    ]
    assert found["maps"]["ssim"]["value"] == pytest.approx(np.mean(similar), abs=1e-4)
    assert set(found["changed"]["differing"]) == {
        f"{LAYER}.weight",
        "predictions.weight",
        "predictions.bias",
    }


def test_a_network_is_equal_to_itself(model_file: Path, photos: Path) -> None:
    found = compare_networks(
        ComparisonRequest(first=str(model_file), second=str(model_file), data=photos, split="all")
    )
    test = found["difference"]["mcnemar"]
    assert (found["images"], test["fixed"], test["broken"], test["p_value"]) == (180, 0, 0, 1.0)
    assert found["maps"]["ssim"]["value"] == pytest.approx(1.0)
    assert found["changed"]["differing"] == []


def run_repair(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["repair", *map(str, arguments)])
        repair.cli.main()
    return int(ended.value.code or 0)


def test_the_command_prints_both_and_the_difference(
    model_file: Path, other_file: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_repair("compare", model_file, other_file, "--data", photos) == 0
    out = capfd.readouterr().out
    assert "shapes.safetensors" in out and "other.safetensors" in out
    assert "Second minus first:" in out and "Tensors that differ: 3 of 10" in out
    assert run_repair("compare", model_file, other_file, "--data", photos, "--json") == 0
    assert json.loads(capfd.readouterr().out)["split"] == "test"


def test_networks_of_other_classes_are_refused(
    model_file: Path,
    card: ModelCard,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(load_file(model_file), path)
    write_card(
        dataclasses.replace(card, classes=("disk", "square", "ring")), path.with_suffix(".toml")
    )
    assert run_repair("compare", model_file, path, "--data", photos) == 2
    assert "only networks with the same classes can be compared" in capfd.readouterr().err
    assert run_repair("compare", model_file, model_file, "--data", photos, "--split", "x") == 2
    assert "--split is 'x'; expected one of test, val, train, all" in capfd.readouterr().err
