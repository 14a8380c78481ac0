"""Photographs of any size in the exported graph: the pixels of Pillow, to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from audit.errors import UsageError
from audit.images.decoding import preprocess
from audit.networks import Network, Preprocessing
from audit.networks.card import Interpolation
from repair.onnx_graph import onnx_model
from repair.onnx_half import to_half
from repair.onnx_resizing import resized
from repair.onnx_serving import Form
from repair.onnx_verify import VerifyRequest, verify_model

from .conftest import PhotoModel

# Wider and narrower, larger and smaller than the network's input, odd, thin, and of its very size.
SIZES = ((75, 61), (24, 100), (31, 24), (24, 24), (7, 5), (201, 67), (40, 90), (1, 30), (100, 203))


def settings_of(
    interpolation: Interpolation, crop: float = 0.875, size: tuple[int, int] = (24, 24)
) -> Preprocessing:
    return Preprocessing(
        input_size=size,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        interpolation=interpolation,
        crop=crop,
    )


def photo(size: tuple[int, int]) -> np.ndarray:
    """Return black and white noise, which shows every rounding, uint8 (H, W, 3)."""
    generator = np.random.default_rng(size)
    return generator.integers(0, 2, size=(*size[::-1], 3), dtype=np.uint8) * 255


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("crop", "input_size"), [(0.875, (24, 24)), (1.0, (24, 24)), (0.9, (31, 20))]
)
def test_photographs_are_scaled_and_cut_as_pillow_does_to_the_bit(
    interpolation: Interpolation, crop: float, input_size: tuple[int, int]
) -> None:
    settings = settings_of(interpolation, crop, input_size)
    for size in SIZES:
        given = photo(size)
        found = resized(torch.from_numpy(given).permute(2, 0, 1)[None], settings)[0]
        np.testing.assert_array_equal(
            found.numpy(), preprocess(Image.fromarray(given), settings), err_msg=str(size)
        )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_onnxruntime_gives_the_same_bits(interpolation: Interpolation) -> None:
    class Alone(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return resized(images.permute(0, 3, 1, 2), settings)

    settings = settings_of(interpolation)
    axes = {0: torch.export.Dim("n"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    example = (torch.zeros(2, 30, 40, 3, dtype=torch.uint8),)
    traced = torch.export.export(Alone(), example, dynamic_shapes=(axes,))
    program = torch.onnx.export(traced, dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for size in SIZES:
        given = photo(size)
        (found,) = session.run(None, {session.get_inputs()[0].name: given[None]})
        expected = preprocess(Image.fromarray(given), settings)
        np.testing.assert_array_equal(found[0], expected, err_msg=str(size))


def test_a_graph_for_photographs_is_proven_and_says_what_it_takes(photo_model: PhotoModel) -> None:
    _, exported = photo_model
    assert exported.passed, exported.proof["reasons"]
    assert exported.proof["batches"] == [1, 2, 7, 64]
    model = onnx.load(exported.model)
    axes = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", "height", "width", 3]
    (notes,) = (e.value for e in model.metadata_props if e.key == "layermend.class_names")
    assert notes.split("\n") == ["disk", "square", "stripes"]
    card = exported.model.with_name("model.md").read_text()
    assert "upright RGB photographs of any size" in card and "to the bit as Pillow does" in card


def test_photographs_give_the_probabilities_of_pytorch(
    photo_model: PhotoModel, network: Network
) -> None:
    repaired, exported = photo_model
    after = network.with_state(load_file(repaired.weights))
    session = onnxruntime.InferenceSession(exported.model, providers=["CPUExecutionProvider"])
    for size in SIZES:
        given = photo(size)
        both = np.stack([given, 255 - given])
        (found,) = session.run(["probabilities"], {"images": both})
        seen = [preprocess(Image.fromarray(one), network.card.preprocessing) for one in both]
        logits = after.program.logits(after.normalize(torch.from_numpy(np.stack(seen))))
        np.testing.assert_allclose(found, logits.softmax(1).detach().numpy(), atol=1e-5)


def test_half_precision_prepares_photographs_in_full(network: Network) -> None:
    model = to_half(onnx_model(network, Form(preprocess="photo", half=True)))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = photo((75, 61))
    (found,) = session.run(["probabilities"], {"images": given[None]})
    seen = preprocess(Image.fromarray(given), network.card.preprocessing)
    logits = network.program.logits(network.normalize(torch.from_numpy(seen)[None]))
    np.testing.assert_allclose(found, logits.softmax(1).detach().numpy(), atol=5e-3)


def test_the_proof_can_be_repeated_without_the_network(
    photo_model: PhotoModel, photos: Path, tmp_path: Path
) -> None:
    repaired, _ = photo_model
    for name in ("model.onnx", "onnx.json"):
        shutil.copy(repaired.path / name, tmp_path / name)
    proof = verify_model(tmp_path / "model.onnx", VerifyRequest(data=photos))
    assert proof["status"] == "passed", proof["reasons"]
    known = json.loads((tmp_path / "onnx.json").read_text())["reference"]["images"]
    assert proof["against"].startswith("what PyTorch said") and proof["images"] == len(known) > 0


def test_a_way_to_scale_that_the_graph_does_not_know_is_refused(network: Network) -> None:
    nearest = replace(network.card.preprocessing, interpolation="nearest")
    other = replace(network, card=replace(network.card, preprocessing=nearest))
    with pytest.raises(UsageError, match="scales bilinear, bicubic, lanczos, and .* nearest; take"):
        onnx_model(other, Form(preprocess="photo"))
