"""What a model file says about itself: metadata inside it, a model card (Markdown) beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import onnx

from audit.environment import versions
from audit.files import json_text
from audit.networks import Network, Preprocessing
from audit.networks.network import sha256_state
from repair.export_sources import ExportSource
from repair.onnx_serving import Form

__all__ = ["EXPORT_PACKAGES", "describe", "model_card"]

EXPORT_PACKAGES = ("onnx", "onnxruntime-gpu", "onnxruntime", "onnxscript")
_SHOWN_CLASSES = 20


def describe(model: onnx.ModelProto, source: ExportSource, form: Form) -> None:
    """Store in the model what its user needs: classes, preprocessing, where it came from."""
    network = source.network
    notes = {
        "classes": json.dumps(network.card.classes, ensure_ascii=False),
        "class_names": "\n".join(_one_line(name) for name in network.card.classes),
        "preprocessing": json.dumps(asdict(network.card.preprocessing)),
        "form": json.dumps(asdict(form)),
        "layer": source.layer or "",
        "layer_sha256": "" if source.layer is None else layer_sha256(network, source.layer),
        "network_sha256": network.sha256,
        "source_sha256": (source.original or network).sha256,
        "weights_sha256": str(source.facts.get("weights_sha256", "")),
        "run": str(source.facts.get("run", "")),
        "repair": str(source.facts.get("repair", "")),
        "metrics": json.dumps(json.loads(json_text(source.facts.get("metrics") or {}))),
        "versions": json.dumps(versions(*EXPORT_PACKAGES)),
    }
    for key, value in notes.items():
        model.metadata_props.add(key=f"layermend.{key}", value=value)


def layer_sha256(network: Network, layer: str) -> str:
    """Return the fingerprint of one layer's tensors."""
    names = network.layer(layer).parameter_names
    return sha256_state({name: network.program.state[name] for name in names})


def model_card(source: ExportSource, form: Form, proof: Mapping[str, Any]) -> str:
    """Return the card of a model that passed its proof, as Markdown."""
    network, facts = source.network, source.facts
    settings = network.card.preprocessing
    height, width = settings.input_size
    title = network.card.arch or "image classifier"
    sections = [
        f"# {title}: {proof['status']}",
        _origin(source),
        "## Use",
        "\n".join(_use(form, height, width, network.program.classes)),
        _preparation(settings, form),
        f"Classes ({network.program.classes}): {_classes(network)}.",
    ]
    if facts.get("metrics"):
        sections += ["## Held-out accuracy", "\n".join(_metrics(facts["metrics"]))]
    sections += [
        "## Proof",
        "\n".join(_proof(proof)),
        "## Hashes and versions",
        "\n".join(
            f"- {name}: `{value}`"
            for name, value in {
                "model.onnx": proof["sha256"],
                "network": network.sha256,
                "scanned model": (source.original or network).sha256,
                "repaired layer": ""
                if source.layer is None
                else layer_sha256(network, source.layer),
                **proof["versions"],
            }.items()
            if value
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _origin(source: ExportSource) -> str:
    facts = source.facts
    if source.layer is None:
        where = f"scanned in run `{facts['run']}`" if "run" in facts else "exported without a run"
        return f"As it was {where}; no layer was retrained."
    return (
        f"One layer, `{source.layer}`, was retrained; every other tensor is the scanned model's. "
        f"Run `{facts['run']}`, repair `{facts['repair']}`, {facts['decision']} by its held-out "
        "test."
    )


def _preparation(settings: Preprocessing, form: Form) -> str:
    height, width = settings.input_size
    steps = (
        f"scale until they just cover {round(height / settings.crop)} x "
        f"{round(width / settings.crop)} pixels ({settings.interpolation}), cut {height} x {width} "
        "from the center"
    )
    if form.preprocess == "photo":
        return f"Images are prepared in the graph: {steps}, to the bit as Pillow does."
    prepared = f"Prepare images: {steps}, RGB."
    if form.preprocess is not None:
        return f"{prepared} Scaling of the values is in the graph."
    return (
        f"{prepared} Then (pixels / 255 - mean) / std, mean {list(settings.mean)}, "
        f"std {list(settings.std)}."
    )


def _use(form: Form, height: int, width: int, classes: int) -> list[str]:
    inputs = {
        None: f"float32 (batch, 3, {height}, {width}), normalized",
        "nchw": f"uint8 (batch, 3, {height}, {width}), RGB",
        "nhwc": f"uint8 (batch, {height}, {width}, 3), RGB",
        "photo": "uint8 (batch, height, width, 3), upright RGB photographs of any size",
    }[form.preprocess]
    lines = [
        f"- Input `images`: {inputs}; the batch is free.",
        f"- Output `{form.outputs[0]}`: float32 (batch, {classes}).",
    ]
    if form.map_layer is not None:
        lines.append(
            f"- Output `map`: float32 (batch, h, w), Grad-CAM of the class with the highest score "
            f"at `{form.map_layer}`, at least 0; divide by its maximum to show it."
        )
    if form.half:
        lines.append("- Weights and arithmetic are in half precision.")
    return lines


def _classes(network: Network) -> str:
    names = [_one_line(name) for name in network.card.classes]
    if not names:
        return "not named"
    more = len(names) - _SHOWN_CLASSES
    return ", ".join(names[:_SHOWN_CLASSES]) + (f" and {more} more" if more > 0 else "")


def _one_line(name: str) -> str:
    return " ".join(name.splitlines())


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    lines = []
    for when, found in metrics.items():
        accuracy = (found or {}).get("accuracy")
        if isinstance(accuracy, Mapping):
            value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
            lines.append(f"- {when}: {value:.1f} % (95 % interval {low:.1f} to {high:.1f})")
    return lines


def _proof(proof: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- onnx.checker with shape inference: {proof['checker']}.",
        f"- Same class as PyTorch on {proof['top1_equal']} of {proof['images']} held-out images, "
        f"run by {', '.join(proof['providers'])}, optimizations off and on, "
        f"batches of {', '.join(map(str, proof['batches']))}.",
        f"- Largest error {proof['max_abs_error']:.1e}, {proof['max_rel_error']:.1e} of an image's "
        f"largest score (tolerated {proof['tolerance']:.0e}).",
        f"- CUDA: {proof['cuda']}.",
    ]
    if proof["map_max_rel_error"] is not None:
        lines.append(
            f"- Maps: largest error {proof['map_max_rel_error']:.1e} of a map's peak "
            f"(tolerated {proof['map_tolerance']:.0e})."
        )
    if proof["changed_initializers"]:
        lines.append(
            f"- Of {proof['initializers']['total']} initializers "
            f"{len(proof['changed_initializers'])} differ from the original's export:"
        )
        lines += [f"    - {what}" for what in proof["initializers"]["explained"].values()]
    return lines
