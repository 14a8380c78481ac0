"""Export a network to ONNX, and prove on held-out images that it is the same network.

The file is written under another name first. It becomes `model.onnx` only when onnx.checker accepts
it, onnxruntime gives every held-out image the same class as PyTorch, with scores and maps within
the tolerance, and only the repaired layer differs from the original's export. Otherwise it stays as
`model.failed.onnx`, and `onnx.json` says why. An earlier export stays until the new one is judged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from audit import console
from audit.environment import versions
from audit.errors import UsageError
from audit.files import replacing, sha256_file, write_json, write_text
from audit.runs import Run
from repair.export_sources import ExportSource, source_of_checkpoint, source_of_run
from repair.onnx_card import EXPORT_PACKAGES, describe, model_card
from repair.onnx_graph import onnx_model, serialized
from repair.onnx_half import to_half
from repair.onnx_initializers import InitializerChanges, changed_initializers
from repair.onnx_proof import prove
from repair.onnx_reference import reference_record
from repair.onnx_serving import OPSET, Form, Layout, choose_map_layer

__all__ = ["ExportRequest", "Exported", "export_checkpoint", "export_network"]

FAILED_NAME = "model.failed.onnx"
PROOF_NAME = "onnx.json"
CARD_NAME = "model.md"


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export.

    Attributes:
        repair: Name or path of a repair folder; the run's newest finished repair when None.
        original: Export the scanned network itself instead of a repair.
        checkpoint: Export this model, which no run knows.
        arch: Architecture of the checkpoint.
        classes: File of the checkpoint's class names.
        opset: ONNX operator set; `OPSET` when None.
        preprocess: Take uint8 pixels in this layout, `photo` for photographs of any size, and give
            probabilities.
        saliency: Give the Grad-CAM of the predicted class too.
        map_layer: Of which layer; the repaired one when None, else the last convolution.
        half: In half precision.
        out: Where to put a further copy of a model that passed.
        data: Where the images are: the run's, if they have moved, or the checkpoint's.
        model: Where the run's model is, if it has moved.
        trust_pickle: Let a pickled module run its code.
        code: Folder with the code of a pickled module.

    Raises:
        UsageError: Settings that contradict each other.
    """

    repair: str | None = None
    original: bool = False
    checkpoint: str | None = None
    arch: str | None = None
    classes: Path | None = None
    opset: int | None = None
    preprocess: Layout | None = None
    saliency: bool = False
    map_layer: str | None = None
    half: bool = False
    out: Path | None = None
    data: Path | None = None
    model: str | None = None
    trust_pickle: bool = False
    code: Path | None = None

    def __post_init__(self) -> None:
        if self.map_layer is not None and not self.saliency:
            raise UsageError("--map-layer says whose map --saliency gives; add --saliency")
        self.form(None)  # refuses what cannot be meant

    def form(self, map_layer: str | None) -> Form:
        return Form(
            opset=OPSET if self.opset is None else self.opset,
            preprocess=self.preprocess,
            map_layer=map_layer,
            half=self.half,
        )


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
        ExportError: PyTorch cannot export the network, or not in this form.
        RunError: There is no such repair, or the run's model or images are not there.
    """
    source = source_of_run(
        run,
        repair=request.repair,
        original=request.original,
        data=request.data,
        model=request.model,
        trust_pickle=request.trust_pickle,
        code=request.code,
    )
    return _export(source, request)


def export_checkpoint(request: ExportRequest) -> Exported:
    """Return the exported checkpoint and its proof, both in a folder below ./exports.

    Raises:
        UsageError: No checkpoint or no images are named.
        ExportError: PyTorch cannot export the network, or not in this form.
        NetworkError: The checkpoint cannot be opened.
        ImageError: The images cannot be used.
    """
    if request.checkpoint is None:
        raise UsageError("name the model to export with --checkpoint MODEL")
    source = source_of_checkpoint(
        request.checkpoint,
        request.data,
        arch=request.arch,
        classes=request.classes,
        trust_pickle=request.trust_pickle,
        code=request.code,
    )
    return _export(source, request)


def _export(source: ExportSource, request: ExportRequest) -> Exported:
    map_layer = None
    if request.saliency:
        map_layer = choose_map_layer(source.network, request.map_layer, source.layer)
    form = request.form(map_layer)
    model, changes = _exported_graph(source, form)
    describe(model, source, form)
    candidate = source.folder / FAILED_NAME
    with replacing(candidate) as temporary:
        temporary.write_bytes(serialized(model))
    proof, predicted = prove(candidate, source.network, source.images, source.indices, form)
    proof |= {
        "form": asdict(form),
        "opset": form.opset,
        "layer": source.layer,
        "versions": versions(*EXPORT_PACKAGES),
        "sha256": sha256_file(candidate),
        "bytes": candidate.stat().st_size,
        "changed_initializers": changes.names,
        "initializers": {"total": changes.total, "explained": changes.explained},
    }
    if changes.unexplained:
        proof["status"] = "failed"
        proof["reasons"].append(
            f"{len(changes.unexplained)} initializers differ from the original's export without "
            f"being the repaired layer's: {', '.join(changes.unexplained[:4])}"
        )
    if proof["status"] == "passed":
        proof["reference"] = reference_record(source.network, form, source.images, predicted)
    return _settle(source, form, request.out, candidate, proof)


def _exported_graph(source: ExportSource, form: Form) -> tuple[onnx.ModelProto, InitializerChanges]:
    """Return the model, and how it differs from the export of the original."""
    changes = InitializerChanges(total=0, explained={}, unexplained=())
    with console.progress("exporting to ONNX", 1 if source.original is None else 2) as bar:
        model = onnx_model(source.network, form)
        bar.advance()
        if source.original is not None and source.layer is not None:
            before = onnx_model(source.original, form)
            changes = changed_initializers(before, model, source.network, source.layer)
            bar.advance()
    return (to_half(model) if form.half else model), changes


def _settle(
    source: ExportSource, form: Form, out: Path | None, candidate: Path, proof: dict[str, Any]
) -> Exported:
    """Give the file the name that it has earned, and write the proof beside it."""
    target, card = candidate.with_name("model.onnx"), candidate.with_name(CARD_NAME)
    record = candidate.with_name(PROOF_NAME)
    if proof["status"] != "passed":
        for stale in (target, card):
            stale.unlink(missing_ok=True)
        write_json(record, proof)
        return Exported(model=candidate, proof=proof)
    record.unlink(missing_ok=True)  # the earlier model's; it does not vouch for this one
    candidate.replace(target)
    write_json(record, proof)
    write_text(card, model_card(source, form, proof))
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_bytes(target.read_bytes())
    return Exported(model=target, proof=proof)
