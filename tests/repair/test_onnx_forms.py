"""What the exported graph takes and gives: pixels, probabilities, maps, half precision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

import repair.export
import repair.onnx_serving
from audit.errors import ExportError, UsageError
from audit.images import ImageFolder, load_pixels
from audit.networks import Network
from audit.networks.small_vgg import SmallVGG
from audit.runs import RepairFolder, Run
from repair.export import Exported, ExportRequest, export_checkpoint, export_network
from repair.onnx_comparison import Comparison, Given
from repair.onnx_half import to_half
from repair.onnx_initializers import changed_initializers
from repair.onnx_proof import structure_error
from repair.onnx_serving import Form
from repair.onnx_versions import check_exporter

from .conftest import CLASSES, CONVOLUTIONS, DAMAGED, WIDTHS

Served = tuple[RepairFolder, Exported]


def plain_module(weights: Path) -> SmallVGG:
    module = SmallVGG(classes=3, widths=WIDTHS, convolutions=CONVOLUTIONS).eval()
    module.load_state_dict(load_file(weights))
    return module


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_pixels_give_the_probabilities_and_the_map_of_a_plain_module(
    served: Served, folder: ImageFolder, network: Network, batch: int
) -> None:
    repaired, exported = served
    assert exported.passed, exported.proof["reasons"]
    pixels = load_pixels(folder, folder.positions("test")[:batch], network.card.preprocessing)
    session = onnxruntime.InferenceSession(exported.model, providers=["CPUExecutionProvider"])
    inputs = pixels.pixels.permute(0, 2, 3, 1).contiguous().numpy()
    probabilities, maps = session.run(["probabilities", "map"], {"images": inputs})

    module, outputs = plain_module(repaired.weights), []

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output)
        return output.clone()  # the rectifier behind it works in place

    module.get_submodule(DAMAGED).register_forward_hook(keep)
    logits = module((pixels.pixels / 255 - 0.5) / 0.25)
    scores = logits.max(dim=1).values.sum()
    (gradients,) = torch.autograd.grad(scores, outputs[0])
    expected = (gradients.mean((2, 3), keepdim=True) * outputs[0]).sum(1).relu()  # Eq. 2-3
    np.testing.assert_allclose(probabilities, logits.softmax(1).detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(maps, expected.detach().numpy(), atol=1e-5)
    assert maps.max() > 0.001


def test_the_file_says_what_it_takes_and_gives(served: Served) -> None:
    _, exported = served
    model = onnx.load(exported.model)
    (images,) = model.graph.input
    assert images.type.tensor_type.elem_type == TensorProto.UINT8
    assert [axis.dim_param or axis.dim_value for axis in images.type.tensor_type.shape.dim] == [
        *("batch", 24, 24, 3)
    ]
    assert [value.name for value in model.graph.output] == ["probabilities", "map"]
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["layermend.form"])["map_layer"] == DAMAGED
    metrics = json.loads(notes["layermend.metrics"])
    assert metrics["after"]["accuracy"]["value"] > metrics["before"]["accuracy"]["value"]
    assert len(notes["layermend.layer_sha256"]) == 64
    assert set(exported.proof["changed_initializers"]) == {f"{DAMAGED}.weight", f"{DAMAGED}.bias"}
    assert exported.proof["map_max_rel_error"] < 1e-4


def test_optimizations_off_and_on_give_the_accuracy_of_pytorch(served: Served) -> None:
    accuracy = served[1].proof["accuracy"]
    assert set(accuracy) == {
        "PyTorch",
        "CPUExecutionProvider, optimizations off",
        "CPUExecutionProvider, optimizations on",
    }
    assert len(set(accuracy.values())) == 1
    assert accuracy["PyTorch"] == served[0].info["after"]["accuracy"]["value"]


def test_the_card_beside_the_model_tells_what_it_is(served: Served) -> None:
    repaired, exported = served
    card = (repaired.path / "model.md").read_text(encoding="utf-8")
    for part in (DAMAGED, *CLASSES, exported.proof["sha256"], "uint8 (batch, 24, 24, 3)", "map"):
        assert part in card
    assert f"- {DAMAGED}.weight, as trained" in card
    assert str(Path(__file__).parents[2]) not in card


def test_planar_pixels_give_the_same_bits(
    served: Served, network: Network, folder: ImageFolder, finished: tuple[Run, RepairFolder]
) -> None:
    repaired = network.with_state(load_file(finished[1].weights))
    model = repair.export.onnx_model(repaired, Form(preprocess="nchw"))
    pixels = load_pixels(folder, range(5), network.card.preprocessing).pixels.numpy()
    both = [
        onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(
            ["probabilities"], {"images": np.ascontiguousarray(images)}
        )[0]
        for source, images in (
            (model.SerializeToString(), pixels),
            (served[1].model, pixels.transpose(0, 2, 3, 1)),
        )
    ]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-6)


def test_a_map_that_is_not_ours_is_not_called_good(
    finished_copy: tuple[Run, RepairFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = repair.onnx_serving.layer_map
    monkeypatch.setattr(repair.onnx_serving, "layer_map", lambda *values: 1.05 * ours(*values))
    exported = export_network(finished_copy[0], ExportRequest(saliency=True, original=True))
    assert not exported.passed and exported.model.name == "model.failed.onnx"
    (reason,) = exported.proof["reasons"]
    assert reason.startswith("maps differ by 5.00e-02 of their peak")


def test_half_precision_passes_by_its_own_tolerance(
    finished_copy: tuple[Run, RepairFolder],
) -> None:
    request = ExportRequest(half=True, saliency=True, preprocess="nchw", original=True)
    exported = export_network(finished_copy[0], request)
    assert exported.passed, exported.proof["reasons"]
    assert exported.proof["tolerance"] == 5e-2
    assert 1e-6 < exported.proof["max_rel_error"] < 1e-2
    model = onnx.load(exported.model)
    assert TensorProto.FLOAT not in {tensor.data_type for tensor in model.graph.initializer}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {TensorProto.FLOAT}
    values = sum(np.prod(tensor.dims) for tensor in model.graph.initializer)
    assert values >= sum(tensor.numel() for tensor in load_file(finished_copy[1].weights).values())


def test_weights_beyond_half_precision_are_refused() -> None:
    weight = numpy_helper.from_array(np.array([1.0, 7e4], np.float32), "weight")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "ab"]
    node = helper.make_node("Mul", ["a", "weight"], ["b"])
    graph = helper.make_graph([node], "graph", values[:1], values[1:], [weight])
    with pytest.raises(ExportError, match="weight holds 7e\\+04, half precision ends at 65504"):
        to_half(helper.make_model(graph))


def test_half_precision_may_only_swap_classes_that_it_cannot_tell_apart() -> None:
    scores = np.array([[1.00, 0.99, 0.0], [1.0, 0.5, 0.0]], np.float32)
    swapped = Given(scores=np.array([[0.99, 1.00, 0.0], [1.0, 0.5, 0.0]], np.float32))
    half, single = Comparison(half=True), Comparison()
    for comparison in (half, single):
        comparison.add([0, 1], scores, None, swapped, "session")
    assert half.reasons() == [] and half.mismatched == {0}
    assert "another class" in single.reasons()[0]
    wrong = Given(scores=scores[:, [1, 0, 2]])
    half.add([0, 1], scores, None, wrong, "session")
    assert "gives 1 of 2 held-out images another class" in half.reasons()[0]


@pytest.mark.parametrize(("error", "passes"), [(2.4e-5, True), (2.4e-3, False)])
def test_an_image_that_is_hardly_any_class_is_no_scale_to_measure_by(
    error: float, passes: bool
) -> None:
    # As a repaired network was seen to give them: 2.4e-5 is .24 % of the second image's larger one.
    scores = np.array([[9.0, -9.0], [0.010, -0.009]])
    comparison = Comparison()
    comparison.add(
        [0, 1], scores, None, Given(scores=scores + np.array([[0.0], [error]])), "session"
    )
    assert (comparison.reasons() == []) is passes
    largest = comparison.error
    # A hundredth of the largest score of any image, .09, stands for its own.
    assert largest is not None and largest == pytest.approx((error, error / 0.09))


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        ({"map_layer": DAMAGED}, UsageError, "add --saliency"),
        (
            {"preprocess": "hwcn"},
            UsageError,
            "--preprocess is 'hwcn'; expected one of nhwc, nchw, photo",
        ),
        ({"saliency": True, "map_layer": "predictions"}, ExportError, "predictions has no map"),
        ({"saliency": True, "map_layer": "block9"}, ExportError, "no layer 'block9'"),
    ],
)
def test_forms_that_cannot_be_had_are_one_line(
    finished: tuple[Run, RepairFolder], settings: dict, error: type[Exception], line: str
) -> None:
    from audit.errors import LayermendError

    with pytest.raises(LayermendError, match=line) as caught:
        export_network(finished[0], ExportRequest(**settings))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, error) or "no layer" in line


def test_a_checkpoint_without_a_run_is_exported_and_proven(
    model_file: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported = export_checkpoint(ExportRequest(checkpoint=str(model_file), data=photos))
    assert exported.passed and exported.proof["images"] == 36
    assert exported.proof["layer"] is None and exported.proof["changed_initializers"] == []
    files = sorted(path.name for path in (tmp_path / "exports" / "shapes").iterdir())
    assert files == ["model.md", "model.onnx", "onnx.json"]
    with pytest.raises(UsageError, match="--checkpoint needs --data DIR"):
        export_checkpoint(ExportRequest(checkpoint=str(model_file)))


def test_a_tensor_that_is_not_the_repaired_layers_is_not_called_good(
    finished_copy: tuple[Run, RepairFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished_copy
    export, done = repair.export.onnx_model, []

    def touching(network: Network, form: Form) -> onnx.ModelProto:
        model = export(network, form)
        if not done:  # the repaired network is first
            tensor = next(t for t in model.graph.initializer if t.name == "block1_conv1.bias")
            values = numpy_helper.to_array(tensor) * np.float32(1 + 1e-6)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        done.append(network)
        return model

    monkeypatch.setattr(repair.export, "onnx_model", touching)
    exported = export_network(run, ExportRequest())
    assert not exported.passed
    assert exported.proof["max_rel_error"] < 1e-4
    (reason,) = exported.proof["reasons"]
    assert reason.endswith("without being the repaired layer's: block1_conv1.bias")


def test_equal_tensors_that_are_stored_once_are_no_change(network: Network) -> None:
    def model(**values: list[float]) -> onnx.ModelProto:
        tensors = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in values.items()]
        return helper.make_model(helper.make_graph([], "graph", [], [], tensors))

    before, after = model(first=[1, 2]), model(first=[3, 4], second=[1, 2])
    changes = changed_initializers(before, after, network, DAMAGED)
    assert changes.names == ["first"] and changes.unexplained == ("first",)


def test_a_batch_that_is_fixed_is_found(served: Served, tmp_path: Path) -> None:
    model = onnx.load(served[1].model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    assert "the batch axis of 'images' is 1" in str(structure_error(tmp_path / "fixed.onnx"))
    assert structure_error(served[1].model) is None


@pytest.mark.parametrize(
    ("package", "version", "line"),
    [
        ("onnxscript", "0.5.6", "pytorch issues 166797 and 169178"),
        ("torch", "2.7.1", "pytorch issue 157621"),
    ],
)
def test_exporters_known_to_be_wrong_are_refused(package: str, version: str, line: str) -> None:
    installed = {"onnxscript": "0.5.7", "torch": "2.9.0+cpu"}
    check_exporter(lambda name: installed[name])
    with pytest.raises(ExportError, match=f"{package} {version} writes wrong ONNX.*{line}.*>="):
        check_exporter(lambda name: {**installed, package: version}[name])
