"""Repeat the proof of a model file later, on any machine.

Where the run lies beside the file, with its model and images, the file is compared with PyTorch
again. Otherwise it is compared with what PyTorch said when it was exported, from `onnx.json`: the
scores of seven images of noise, and the class of every held-out image that `--data` leads to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit import console
from audit.environment import versions
from audit.errors import ExportError, LayermendError
from audit.files import read_json, sha256_file
from audit.images import ImageFolder, ImageRecord, iterate_batches
from audit.networks import Preprocessing
from audit.runs import open_run
from repair.export_sources import ExportSource, source_of_checkpoint, source_of_run
from repair.onnx_comparison import Comparison, Given
from repair.onnx_proof import BATCHES, loaded_as, model_inputs, prove, structure_error
from repair.onnx_reference import KnownImage, known_images, noise_expected, noise_pixels
from repair.onnx_serving import INPUT, Form
from repair.onnx_sessions import OpenedSession, cuda_state, open_sessions

__all__ = ["VerifyRequest", "verify_model"]

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """Where to find what the file is compared with, if not beside it.

    Attributes:
        folder: Folder of the export, with its `onnx.json`; the file's own when None.
        data: Folder of the images.
        model: The run's model, if it has moved.
        checkpoint: The model of an export that had no run.
        arch: Architecture of that checkpoint.
        classes: File of its class names.
    """

    folder: Path | None = None
    data: Path | None = None
    model: str | None = None
    checkpoint: str | None = None
    arch: str | None = None
    classes: Path | None = None
    trust_pickle: bool = False
    code: Path | None = None


def verify_model(path: Path, request: VerifyRequest) -> dict[str, Any]:
    """Return the new proof of a model file; `against` says what it was compared with.

    Raises:
        ExportError: There is no such file, or no `onnx.json` to compare it with.
    """
    if not path.is_file():
        raise ExportError(f"no model at {path}; give the path of an exported model.onnx")
    folder = (request.folder or path.parent).absolute()
    if not (folder / "onnx.json").is_file():
        raise ExportError(
            f"no onnx.json in {folder}; put it beside the model, or name its run with --run"
        )
    earlier = read_json(folder / "onnx.json")
    form, reference = _form_of(earlier), earlier.get("reference")
    source = _source(folder, request)
    if source is not None:
        proof, _ = prove(path, source.network, source.images, source.indices, form)
    elif isinstance(reference, dict):
        proof = _compared_with_record(path, form, reference, request.data)
    else:
        raise ExportError(
            f"{folder / 'onnx.json'} has no reference to compare with (it is of an older or a "
            "failed export); export again, or verify where the run is"
        )
    sha256 = sha256_file(path)
    if sha256 != earlier.get("sha256"):
        proof["reasons"].insert(0, "the file is not the one that was exported (its hash differs)")
        proof["status"] = "failed"
    return proof | {
        "exported": {name: earlier.get(name) for name in ("status", "sha256", "versions")},
        "sha256": sha256,
        "bytes": path.stat().st_size,
        "versions": versions("onnx", "onnxruntime-gpu", "onnxruntime", "onnxscript"),
    }


def _form_of(earlier: Mapping[str, Any]) -> Form:
    stored = earlier.get("form") or {"opset": earlier.get("opset", Form.opset)}
    return Form(**stored)


def _source(folder: Path, request: VerifyRequest) -> ExportSource | None:
    """Return the network and its images, None where they cannot be had here."""
    opening: dict[str, Any] = {"trust_pickle": request.trust_pickle, "code": request.code}
    try:
        if request.checkpoint is not None:
            return source_of_checkpoint(
                request.checkpoint,
                request.data,
                arch=request.arch,
                classes=request.classes,
                **opening,
            )
        opening |= {"data": request.data, "model": request.model}
        if (folder / "repair.json").is_file():
            run = open_run(folder.parent.parent)
            return source_of_run(run, repair=folder.name, **opening)
        if (folder / "run.json").is_file():
            return source_of_run(open_run(folder), original=True, **opening)
    except LayermendError as error:
        if request.checkpoint is not None or request.model is not None:
            raise
        console.say(f"note: compared with onnx.json, not with PyTorch: {error}")
    return None


def _compared_with_record(
    path: Path, form: Form, reference: Mapping[str, Any], data: Path | None
) -> dict[str, Any]:
    structure = structure_error(path)
    comparison = Comparison(half=form.half, scores=form.outputs[0])
    known = known_images(reference)
    images = _found_images(known, data)
    failure, sessions, wrong = structure, list[OpenedSession](), set[int]()
    if failure is None:
        try:
            sessions = list(open_sessions(path))
            settings = _preprocessing(sessions[0])
            _compare_noise(sessions, settings, form, reference, comparison)
            wrong = _other_classes(sessions, settings, form, images, known)
        except LayermendError:
            raise
        except Exception as error:  # onnxruntime raises its own, unrelated types
            failure = f"onnxruntime: {(str(error).splitlines() or [type(error).__name__])[0]}"
    reasons = [failure] if failure else comparison.reasons()
    if wrong:
        reasons.append(
            f"onnxruntime gives {len(wrong)} of {len(images.records)} held-out images another "
            "class than when the model was exported"
        )
    return {
        "status": "failed" if reasons else "passed",
        "checker": structure or "ok",
        "against": "what PyTorch said at the export, from onnx.json",
        **comparison.record(),
        "images": len(images.records),
        "top1_equal": len(images.records) - len(wrong),
        "top1_mismatches": [images.records[i].path for i in sorted(wrong)],
        "noise_images": len(comparison.images),
        "batches": [*BATCHES, BATCH],
        "providers": list(dict.fromkeys(session.provider for session in sessions)),
        "cuda": cuda_state([session.provider for session in sessions]),
        "reasons": reasons,
    }


def _compare_noise(
    sessions: Sequence[OpenedSession],
    settings: Preprocessing,
    form: Form,
    reference: Mapping[str, Any],
    comparison: Comparison,
) -> None:
    pixels = noise_pixels(settings.input_size, int(reference["noise"]["seed"]))
    expected = noise_expected(reference, model_inputs(pixels, settings, form))
    for session in sessions:
        for size in BATCHES:
            scores, *maps = session.run({INPUT: expected.inputs[:size]}, form.outputs)
            comparison.add(
                range(size),
                expected.scores[:size],
                None if expected.maps is None else expected.maps[:size],
                Given(scores=scores, maps=maps[0] if maps else None),
                session.name,
            )


def _other_classes(
    sessions: Sequence[OpenedSession],
    settings: Preprocessing,
    form: Form,
    images: ImageFolder,
    known: Sequence[KnownImage],
) -> set[int]:
    """Return the positions of the images whose class is not the recorded one."""
    by_path = {image.path: image.predicted for image in known}
    wrong: set[int] = set()
    everything = range(len(images.records))
    loaded = loaded_as(settings, form)
    for batch in iterate_batches(images, everything, loaded, batch_size=BATCH):
        inputs = model_inputs(batch.pixels, settings, form)
        for session in sessions:
            (scores,) = session.run({INPUT: inputs}, form.outputs[:1])
            for position, found in zip(
                batch.indices.tolist(), scores.argmax(axis=1).tolist(), strict=True
            ):
                if by_path[images.records[position].path] != found:
                    wrong.add(position)
    return wrong


def _found_images(known: Sequence[KnownImage], data: Path | None) -> ImageFolder:
    """Return those of the recorded images that lie in the folder with the recorded content."""
    root = (data or Path()).absolute()
    there = [
        ImageRecord(
            path=image.path, label=image.label, class_name="", split="test", sha256=image.sha256
        )
        for image in known
        if data is not None and _has_content(root / image.path, image.sha256)
    ]
    if data is not None and len(there) < len(known):
        console.say(f"note: {len(there)} of {len(known)} held-out images are unchanged in {data}")
    return ImageFolder(
        root=root,
        records=tuple(there),
        skipped=(),
        split_source="folders",
        duplicates=0,
        fingerprint="",
    )


def _has_content(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and sha256_file(path) == sha256
    except OSError:
        return False


def _preprocessing(session: OpenedSession) -> Preprocessing:
    notes = session.session.get_modelmeta().custom_metadata_map
    try:
        return Preprocessing(**json.loads(notes["layermend.preprocessing"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            "the model does not say how its images are prepared (no layermend.preprocessing in its "
            "metadata); verify a file that `repair export` wrote"
        ) from error
