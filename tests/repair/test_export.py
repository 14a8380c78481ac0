"""Exports that are what they claim to be, and exports that are caught not being it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

import repair.export
import repair.onnx_comparison
from audit.errors import ExportError, RunError
from audit.files import read_json
from audit.images import ImageFolder, load_pixels
from audit.networks import ModelCard, Network, open_network, write_card
from audit.runs import RepairFolder, Run
from repair.export import Exported, ExportRequest, export_network
from repair.layer import RepairRequest, repair_layer
from repair.onnx_serving import Form

from .conftest import CLASSES, CONFIG, DAMAGED, write_run


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, Form], onnx.ModelProto]:
    """What the exporter returned so far, by network and form."""
    return {}


@pytest.fixture(autouse=True, scope="module")
def each_network_exported_once(models: dict[tuple[str, Form], onnx.ModelProto]) -> Iterator[None]:
    export = repair.export.onnx_model

    def remembered(network: Network, form: Form) -> onnx.ModelProto:
        key = (network.sha256, form)
        if key not in models:
            models[key] = export(network, form)
        copy = onnx.ModelProto()
        copy.CopyFrom(models[key])
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair.export, "onnx_model", remembered)
        yield


@pytest.fixture(scope="module")
def exported(finished: tuple[Run, RepairFolder]) -> Exported:
    run, _ = finished
    return export_network(run, ExportRequest())


def test_the_export_passes_with_the_class_of_every_test_image_equal(
    exported: Exported, finished: tuple[Run, RepairFolder], folder: ImageFolder
) -> None:
    _, repair = finished
    proof = read_json(repair.path / "onnx.json")
    assert exported.model == repair.path / "model.onnx" == repair.onnx_model
    assert (proof["status"], proof["checker"], proof["reasons"]) == ("passed", "ok", [])
    assert proof["images"] == proof["top1_equal"] == len(folder.positions("test"))
    assert proof["max_rel_error"] < 1e-5
    assert proof["opset"] == 18
    assert not list(repair.path.glob("*failed*"))


@pytest.mark.parametrize("batch", [1, 2, 7, 30])
def test_onnxruntime_gives_the_logits_of_a_plain_module(
    exported: Exported,
    finished: tuple[Run, RepairFolder],
    network: Network,
    folder: ImageFolder,
    batch: int,
) -> None:
    from audit.networks.small_vgg import SmallVGG

    from .conftest import CONVOLUTIONS, WIDTHS

    module = SmallVGG(classes=3, widths=WIDTHS, convolutions=CONVOLUTIONS).eval()
    module.load_state_dict(load_file(finished[1].weights))
    pixels = load_pixels(folder, folder.positions("test")[:batch], network.card.preprocessing)
    images = network.normalize(pixels.pixels)
    session = onnxruntime.InferenceSession(exported.model, providers=["CPUExecutionProvider"])
    (given,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(given, module(images).numpy(), rtol=1e-4, atol=1e-4)


def test_only_the_repaired_layer_differs_between_the_two_exports(exported: Exported) -> None:
    assert set(exported.proof["changed_initializers"]) == {f"{DAMAGED}.weight", f"{DAMAGED}.bias"}


def test_the_model_carries_what_its_user_needs_and_no_path(
    exported: Exported, network: Network
) -> None:
    model = onnx.load(exported.model)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["layermend.classes"]) == list(CLASSES)
    assert json.loads(notes["layermend.preprocessing"])["input_size"] == [24, 24]
    assert notes["layermend.layer"] == DAMAGED
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    raw = exported.model.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in raw
    assert str(Path(__file__).parents[2]).encode() not in raw


def corrupt(model: onnx.ModelProto, factor: float) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == f"{DAMAGED}.weight":
            changed = numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(-1.0, "another class than PyTorch"), (1.01, "tolerated are"), (np.nan, "not finite")],
)
def test_an_export_with_other_weights_is_not_called_good(
    finished_copy: tuple[Run, RepairFolder],
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    reason: str,
) -> None:
    run, repair_folder = finished_copy
    export = repair.export.onnx_model

    def corrupting(network: Network, form: Form) -> onnx.ModelProto:
        model = export(network, form)
        corrupt(model, factor)
        return model

    monkeypatch.setattr(repair.export, "onnx_model", corrupting)
    out = run.path / "copy.onnx"
    exported = export_network(run, ExportRequest(out=out))
    proof = read_json(repair_folder.path / "onnx.json")
    assert proof["status"] == "failed"
    assert any(reason in line for line in proof["reasons"]), proof["reasons"]
    assert exported.model.name == "model.failed.onnx" and exported.model.is_file()
    assert not repair_folder.onnx_model.exists() and not out.exists()


def test_a_graph_that_the_checker_refuses_is_not_called_good(
    finished_copy: tuple[Run, RepairFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished_copy
    export = repair.export.onnx_model

    def corrupting(network: Network, form: Form) -> onnx.ModelProto:
        model = export(network, form)
        model.graph.node[0].op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(repair.export, "onnx_model", corrupting)
    proof = export_network(run, ExportRequest()).proof
    assert proof["status"] == "failed" and proof["checker"] != "ok"
    assert proof["images"] == 0 and proof["max_abs_error"] is None


def test_a_failed_export_leaves_no_older_model_that_looks_good(
    finished_copy: tuple[Run, RepairFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, repair_folder = finished_copy
    assert export_network(run, ExportRequest()).passed
    monkeypatch.setattr(repair.onnx_comparison, "TOLERANCE", 0.0)
    assert not export_network(run, ExportRequest()).passed
    assert not repair_folder.onnx_model.exists()
    assert repair_folder.onnx is not None and repair_folder.onnx["status"] == "failed"


def test_the_scanned_network_can_be_exported_itself(
    finished_copy: tuple[Run, RepairFolder], tmp_path: Path
) -> None:
    run, _ = finished_copy
    out = tmp_path / "deep" / "scanned.onnx"
    exported = export_network(run, ExportRequest(original=True, out=out))
    assert exported.passed and exported.model == run.path / "model.onnx"
    assert out.read_bytes() == exported.model.read_bytes()
    assert exported.proof["layer"] is None and exported.proof["changed_initializers"] == []


def test_another_operator_set_is_given_or_refused(network: Network) -> None:
    model = repair.export.onnx_model(network, Form(opset=20))
    assert [entry.version for entry in model.opset_import] == [20]
    with pytest.raises(ExportError, match="operator set|cannot export"):
        repair.export.onnx_model(network, Form(opset=3))


def test_a_run_without_repair_offers_the_original(make_run: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match="`repair layer`, or export the scanned model"):
        export_network(make_run(), ExportRequest())


def test_weights_that_the_repair_did_not_write_are_refused(
    finished_copy: tuple[Run, RepairFolder], model_file: Path
) -> None:
    run, repair_folder = finished_copy
    repair_folder.weights.write_bytes(model_file.read_bytes())
    with pytest.raises(RunError, match="is not the file that the repair wrote"):
        export_network(run, ExportRequest())


def test_a_residual_network_with_batch_norm_is_repaired_and_exported(
    tmp_path: Path, photos: Path, folder: ImageFolder, card: ModelCard
) -> None:
    from audit.networks import architectures

    arch_args = {"num_classes": len(CLASSES)}
    card = replace(card, arch="timm:test_resnet", arch_args=arch_args)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = architectures.build("timm:test_resnet", arch_args)
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):  # else the last of a block silences it
                torch.nn.init.uniform_(part.weight, 0.5, 1.5)
                torch.nn.init.uniform_(part.running_mean, -0.5, 0.5)
                torch.nn.init.uniform_(part.running_var, 0.5, 2)
    path = tmp_path / "residual.safetensors"
    save_file(module.state_dict(), path)
    write_card(card, path.with_suffix(".toml"))
    network = open_network(str(path))
    layer = "layer2.0.conv2"
    assert len(network.program.split(layer).crossing_shapes) == 2  # the shortcut passes it by
    run = write_run(tmp_path / "runs", photos, path, network, folder)
    config = replace(CONFIG, epochs=1, controls=(), keep="last")
    repaired = repair_layer(run, config, RepairRequest(layer=layer))
    frozen = repaired.info["frozen"]
    assert frozen["identical"] == frozen["tensors"] == len(module.state_dict()) - 1
    assert frozen["changed"] == [f"{layer}.weight"]
    exported = export_network(run, ExportRequest())
    assert exported.passed, exported.proof["reasons"]
    assert exported.proof["changed_initializers"] == [f"{layer}.weight"]
    with_norm = repair_layer(run, replace(config, with_norm=True), RepairRequest(layer=layer))
    frozen = with_norm.info["frozen"]
    assert frozen["identical"] == frozen["tensors"] == len(module.state_dict()) - 3
    norm = layer.replace("conv2", "bn2")
    assert set(frozen["changed"]) == {f"{layer}.weight", f"{norm}.weight", f"{norm}.bias"}
    exported = export_network(run, ExportRequest())
    assert exported.passed, exported.proof["reasons"]
    # The norm is folded into the convolution, and its trained scale and shift with it.
    explained = exported.proof["initializers"]["explained"]
    assert set(explained) == {f"{layer}.weight", f"{layer}.weight_bias"}
    assert all("with the batch norm behind it folded in" in text for text in explained.values())
    module.load_state_dict(load_file(with_norm.weights), strict=False)
    pixels = load_pixels(folder, range(9), network.card.preprocessing).pixels
    session = onnxruntime.InferenceSession(exported.model, providers=["CPUExecutionProvider"])
    (given,) = session.run(["logits"], {"images": network.normalize(pixels).numpy()})
    with torch.no_grad():
        expected = module.eval()((pixels / 255 - 0.5) / 0.25)
    np.testing.assert_allclose(given, expected.numpy(), rtol=1e-4, atol=1e-5)
