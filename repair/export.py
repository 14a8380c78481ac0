"""Export a repaired network to ONNX, and prove on held-out images that it is the same network.

The file is written under another name first. It becomes `model.onnx` only when onnx.checker accepts
it and onnxruntime gives every image of the test split the same class as PyTorch, with logits within
the tolerance, in batches of one, two, seven and many. Otherwise it stays as `model.failed.onnx`,
and `onnx.json` says why.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from audit import console
from audit.environment import versions
from audit.errors import ExportError, RunError
from audit.files import replacing, sha256_file, write_json
from audit.images import ImageFolder, iterate_batches
from audit.networks import Network
from audit.runs import RepairFolder, Run, open_repair
from repair.sources import open_scanned_images, open_scanned_network, positions

OPSET = 18
INPUT, OUTPUT, BATCH_AXIS = "images", "logits", "batch"
BATCHES = (1, 2, 7)  # each tried by itself, before all images in batches of PROOF_BATCH
PROOF_BATCH = 64
# Of the largest logit of an image. Kernels sum in another order, which single precision shows at
# 1e-6 to 1e-5; a wrong operator or weight shows at 1e-2 and more.
TOLERANCE = 1e-3
FAILED_NAME = "model.failed.onnx"

_PROVIDERS_CPU = ["CPUExecutionProvider"]
# Without TF32, whose ten bits of mantissa would use up the tolerance.
_PROVIDERS_CUDA = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export.

    Attributes:
        repair: Name or path of a repair folder; the run's newest finished repair when None.
        original: Export the scanned network itself instead of a repair.
        opset: ONNX operator set; `OPSET` when None.
        out: Where to put a further copy of a model that passed.
        data: Where the run's images are, if they have moved.
        model: Where the run's model is, if it has moved.
        trust_pickle: Let a pickled module run its code.
        code: Folder with the code of a pickled module.
    """

    repair: str | None = None
    original: bool = False
    opset: int | None = None
    out: Path | None = None
    data: Path | None = None
    model: str | None = None
    trust_pickle: bool = False
    code: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported model's file and the document that says whether it is good."""

    model: Path
    proof: dict[str, Any]

    @property
    def passed(self) -> bool:
        return bool(self.proof["status"] == "passed")


def export_network(run: Run, request: ExportRequest) -> Exported:
    """Return the exported model and its proof, both written to the repair's (or run's) folder.

    A proof that fails is no exception: `passed` is False and the file is not called `model.onnx`.

    Raises:
        ExportError: PyTorch cannot export the network.
        RunError: There is no such repair, or the run's model or images are not there.
    """
    repair = None if request.original else _chosen_repair(run, request.repair)
    original = open_scanned_network(
        run, model=request.model, trust_pickle=request.trust_pickle, code=request.code
    )
    network = original if repair is None else _repaired(original, repair)
    images, _ = open_scanned_images(run, data=request.data)
    target = (run.path if repair is None else repair.path) / "model.onnx"
    for stale in (target, target.with_name(FAILED_NAME), target.with_name("onnx.json")):
        stale.unlink(missing_ok=True)

    opset = request.opset or OPSET
    with console.progress("exporting to ONNX", 1 if repair is None else 2) as bar:
        model = onnx_model(network, opset)
        bar.advance()
        changed: list[str] = []
        if repair is not None:
            changed = _changed_initializers(onnx_model(original, opset), model)
            bar.advance()
    _describe(model, network, repair)
    candidate = target.with_name(FAILED_NAME)
    with replacing(candidate) as temporary:
        temporary.write_bytes(_serialized(model))

    proof = prove(candidate, network, images, positions(images, "test"))
    proof |= {
        "opset": opset,
        "layer": None if repair is None else repair.layer,
        "versions": versions("onnx", "onnxruntime-gpu", "onnxruntime", "onnxscript"),
        "sha256": sha256_file(candidate),
        "bytes": candidate.stat().st_size,
        "changed_initializers": changed,
    }
    if proof["status"] == "passed":
        candidate.replace(target)
        candidate = target
        if request.out is not None:
            with replacing(request.out) as temporary:
                temporary.write_bytes(target.read_bytes())
    write_json(target.with_name("onnx.json"), proof)
    return Exported(model=candidate, proof=proof)


def onnx_model(network: Network, opset: int) -> onnx.ModelProto:
    """Return the network as an ONNX model: images (batch, 3, H, W) to logits (batch, K).

    Raises:
        ExportError: PyTorch cannot export it, or not to this operator set.
    """
    try:
        with _quiet():
            program = torch.onnx.export(
                network.program.to_exported(),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        if program is None:
            raise ExportError("PyTorch returned no ONNX model")
        model = program.model_proto
    except ExportError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"PyTorch cannot export this network to ONNX: {lines[0]}") from error
    got = next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0
    )
    if got != opset:
        raise ExportError(
            f"PyTorch exported to operator set {got}, not {opset}; ask for --opset {got}, "
            f"or leave --opset out for {OPSET}"
        )
    _clean(model)
    return model


def prove(
    path: Path, network: Network, images: ImageFolder, indices: Sequence[int]
) -> dict[str, Any]:
    """Return whether the model file is the network: status, numbers and reasons, JSON-ready.

    Args:
        path: The ONNX file as it lies on the disk.
        network: The network it was exported from, on the CPU.
        images: Where the held-out images are.
        indices: Their positions in the folder's records.
    """
    comparison = _Comparison()
    checker = _checker_error(path)
    ran: list[str] = []
    failure: str | None = checker and f"onnx.checker: {checker}"
    if failure is None:
        try:
            for session in _sessions(path):
                ran.append(session.get_providers()[0])
                _compare(session, network, images, indices, comparison)
        except Exception as error:  # onnxruntime raises its own, unrelated types
            failure = f"onnxruntime: {(str(error).splitlines() or [type(error).__name__])[0]}"
    reasons = [failure] if failure else comparison.reasons()
    return {
        "status": "failed" if reasons else "passed",
        "checker": checker or "ok",
        "images": len(comparison.images),
        "top1_equal": len(comparison.images) - len(comparison.mismatched),
        "top1_mismatches": [images.records[i].path for i in sorted(comparison.mismatched)],
        "max_abs_error": comparison.max_abs_error if comparison.images else None,
        "max_rel_error": comparison.max_rel_error if comparison.images else None,
        "tolerance": TOLERANCE,
        "batches": [*BATCHES, PROOF_BATCH],
        "providers": ran,
        "reasons": reasons,
    }


@dataclass
class _Comparison:
    """What was seen so far of two networks on the same images."""

    images: set[int] = field(default_factory=set)
    mismatched: set[int] = field(default_factory=set)
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    broken: str | None = None

    def add(self, indices: Sequence[int], expected: np.ndarray, given: np.ndarray) -> None:
        self.images.update(indices)
        if given.shape != expected.shape:
            self.broken = f"logits have shape {given.shape}, expected {expected.shape}"
            self.mismatched.update(indices)
            return
        differs = given.argmax(axis=1) != expected.argmax(axis=1)
        self.mismatched.update(np.asarray(indices)[differs].tolist())
        if not np.isfinite(given).all():
            self.broken = "logits that are not finite"
            return
        error = np.abs(given.astype(np.float64) - expected)
        scale = np.maximum(np.abs(expected).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        self.max_abs_error = max(self.max_abs_error, float(error.max()))
        self.max_rel_error = max(self.max_rel_error, float((error / scale).max()))

    def reasons(self) -> list[str]:
        """Return why the proof failed; empty if it passed."""
        found = [f"onnxruntime gave {self.broken}"] if self.broken else []
        if not self.images:
            found.append("no held-out image could be loaded")
        if self.mismatched:
            found.append(
                f"onnxruntime gives {len(self.mismatched)} of {len(self.images)} held-out images "
                "another class than PyTorch"
            )
        if self.max_rel_error > TOLERANCE:
            found.append(
                f"logits differ by {self.max_rel_error:.2e} of the largest logit, "
                f"tolerated are {TOLERANCE:.0e}"
            )
        return found


def _compare(
    session: Any,
    network: Network,
    images: ImageFolder,
    indices: Sequence[int],
    comparison: _Comparison,
) -> None:
    """Run every image through both networks, in batches of each size."""
    rounds = [(size, list(islice(cycle(indices), size))) for size in BATCHES]
    rounds.append((PROOF_BATCH, list(indices)))
    with console.progress("proving on held-out images", len(indices)) as bar, torch.no_grad():
        for size, wanted in rounds:
            for batch in iterate_batches(
                images, wanted, network.card.preprocessing, batch_size=size
            ):
                pixels = network.normalize(batch.pixels)
                expected = network.program.logits(pixels).cpu().numpy()
                (given,) = session.run([OUTPUT], {INPUT: pixels.cpu().numpy()})
                comparison.add(batch.indices.tolist(), expected, given)
                if size == PROOF_BATCH:
                    bar.advance(len(batch.indices))


def _sessions(path: Path) -> Iterator[Any]:
    """Yield an onnxruntime session on the CPU, and one on CUDA where there is a device."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    chains: list[list[Any]] = [_PROVIDERS_CPU]
    if torch.cuda.is_available():
        chains.append(_PROVIDERS_CUDA)
    for providers in chains:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        fallen_back = providers is _PROVIDERS_CUDA and (
            session.get_providers()[0] != "CUDAExecutionProvider"
        )
        if not fallen_back:  # proven on the CPU already
            yield session


def _checker_error(path: Path) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker, shape inference and protobuf each raise their own
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


# -------------------------------------------------------------------- the model's parts


def _clean(model: onnx.ModelProto) -> None:
    """Name the batch axis; drop the exporter's notes, which hold source paths of this machine."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = BATCH_AXIS
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del model.metadata_props[:]


def _describe(model: onnx.ModelProto, network: Network, repair: RepairFolder | None) -> None:
    """Store in the model what its user needs: classes, preprocessing, where it came from."""
    notes = {
        "layermend.classes": json.dumps(network.card.classes, ensure_ascii=False),
        "layermend.preprocessing": json.dumps(asdict(network.card.preprocessing)),
        "layermend.layer": "" if repair is None else repair.layer,
        "layermend.source_sha256": network.sha256,
        "layermend.weights_sha256": "" if repair is None else sha256_file(repair.weights),
    }
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)


def _changed_initializers(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Return the initializers of the repaired network that the original has not, or has otherwise.

    The exporter may fold batch normalization into the convolution before it; then the folded
    initializer of the repaired layer is what differs. Equal tensors may be stored once.
    """
    old, new = _initializers(before), _initializers(after)
    return [name for name, value in new.items() if old.get(name) != value]


def _initializers(model: onnx.ModelProto) -> dict[str, bytes]:
    return {
        tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer
    }


def _serialized(model: onnx.ModelProto) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except Exception as error:
        raise ExportError(f"the model is too large for one ONNX file of 2 GiB: {error}") from error


# -------------------------------------------------------------------- what to export


def _chosen_repair(run: Run, name: str | None) -> RepairFolder:
    if name is not None:
        path = run.path / "repairs" / name
        repair = open_repair(path if path.is_dir() else Path(name))
        if repair.status != "complete":
            raise RunError(
                f"{repair.path} is {repair.status}; finish it with `repair layer --resume`"
            )
        return repair
    finished = [repair for repair in run.repairs if repair.status == "complete"]
    if not finished:
        raise RunError(
            f"no finished repair in {run.path}; make one with `repair layer`, or export the "
            "scanned model with --original"
        )
    return finished[0]


def _repaired(network: Network, repair: RepairFolder) -> Network:
    """Return the network with the repaired layer in place."""
    if repair.decision == "rejected":
        console.say(f"note: {repair.name} was rejected by its held-out test")
    if not repair.weights.is_file():
        raise RunError(f"{repair.weights} is not there; repair again")
    stored = load_file(repair.weights)
    recorded: Mapping[str, Any] = repair.info.get("model", {})
    if sha256_file(repair.weights) != recorded.get("sha256_after"):
        raise RunError(f"{repair.weights} is not the file that the repair wrote; repair again")
    names = network.layer(repair.layer).parameter_names
    return network.with_state({name: stored[name] for name in names})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and warnings off both streams."""
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
