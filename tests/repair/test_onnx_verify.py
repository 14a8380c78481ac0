"""The proof repeated later: beside the run, or from what was recorded at the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from audit.errors import ExportError
from audit.files import read_json, sha256_file
from audit.runs import RepairFolder
from repair.export import Exported
from repair.onnx_verify import VerifyRequest, verify_model

from .conftest import DAMAGED

Served = tuple[RepairFolder, Exported]


@pytest.fixture
def elsewhere(served: Served, tmp_path: Path) -> Path:
    """The model and its record alone, as another machine has them."""
    for name in ("model.onnx", "onnx.json"):
        shutil.copy(served[0].path / name, tmp_path / name)
    return tmp_path / "model.onnx"


def damage(path: Path, factor: float) -> None:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == f"{DAMAGED}.weight":
            values = numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def test_beside_its_run_a_file_is_compared_with_pytorch(served: Served) -> None:
    proof = verify_model(served[1].model, VerifyRequest())
    earlier = served[1].proof
    assert (proof["status"], proof["against"]) == ("passed", "PyTorch")
    for key in ("images", "top1_equal", "max_abs_error", "map_max_abs_error", "sha256"):
        assert proof[key] == earlier[key]


def test_alone_it_is_compared_with_what_was_recorded(elsewhere: Path, photos: Path) -> None:
    alone = verify_model(elsewhere, VerifyRequest())
    assert alone["status"] == "passed" and alone["against"].startswith("what PyTorch said")
    assert (alone["images"], alone["noise_images"]) == (0, 7)
    assert alone["max_rel_error"] < 1e-4 and alone["map_max_rel_error"] < 1e-3
    proof = verify_model(elsewhere, VerifyRequest(data=photos))
    assert proof["images"] == proof["top1_equal"] == 36


def test_other_weights_are_found_without_the_network(elsewhere: Path, photos: Path) -> None:
    damage(elsewhere, -1)
    proof = verify_model(elsewhere, VerifyRequest())
    assert proof["status"] == "failed"
    assert "its hash differs" in proof["reasons"][0]
    assert any("probabilities differ by" in reason for reason in proof["reasons"])
    damage(elsewhere, 1.5)
    record = read_json(elsewhere.with_name("onnx.json"))
    record["sha256"] = sha256_file(elsewhere)
    elsewhere.with_name("onnx.json").write_text(json.dumps(record), encoding="utf-8")
    proof = verify_model(elsewhere, VerifyRequest(data=photos))
    assert any("another class than when the model" in reason for reason in proof["reasons"])
    assert proof["top1_equal"] < proof["images"] == 36


def test_half_a_file_fails_with_one_line(elsewhere: Path) -> None:
    elsewhere.write_bytes(elsewhere.read_bytes()[:2000])
    proof = verify_model(elsewhere, VerifyRequest())
    assert proof["status"] == "failed" and proof["checker"] != "ok"
    assert all("\n" not in reason for reason in proof["reasons"])


def test_what_is_missing_is_said(elsewhere: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no model at"):
        verify_model(tmp_path / "none.onnx", VerifyRequest())
    record = read_json(elsewhere.with_name("onnx.json"))
    del record["reference"]
    elsewhere.with_name("onnx.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ExportError, match="has no reference to compare with"):
        verify_model(elsewhere, VerifyRequest())
    elsewhere.with_name("onnx.json").unlink()
    with pytest.raises(ExportError, match="no onnx.json in .*; put it beside the model"):
        verify_model(elsewhere, VerifyRequest())
