"""What an export, or the repeated proof of one, came to, as the command line prints it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

__all__ = ["export_summary"]

Record = Mapping[str, Any]


def export_summary(proof: Record, model: Path) -> RenderableType:
    """Return the outcome: passed or failed, against what, and by how much."""
    equal, images = proof["top1_equal"], proof["images"]
    against = "" if proof["against"] == "PyTorch" else f" as {proof['against']}"
    lines = [
        Text(f"ONNX export: {proof['status']}", style="bold"),
        Text(f"Same class on {equal} of {images} held-out images in onnxruntime{against}."),
        Text(
            f"Largest error of a score: {_number(proof['max_abs_error'])} absolute, "
            f"{_number(proof['max_rel_error'])} of the largest score "
            f"(tolerated: {proof['tolerance']:.0e})."
        ),
    ]
    if proof.get("top1_undecided"):
        lines.append(Text(f"Too close to call in half precision: {proof['top1_undecided']}."))
    if proof.get("map_max_rel_error") is not None:
        lines.append(
            Text(
                f"Largest error of a map: {_number(proof['map_max_rel_error'])} of its peak "
                f"(tolerated: {proof['map_tolerance']:.0e})."
            )
        )
    if proof.get("initializers", {}).get("total") and proof.get("layer"):
        changed, total = len(proof["changed_initializers"]), proof["initializers"]["total"]
        lines.append(Text(f"Initializers that differ from the original's: {changed} of {total}."))
    lines.append(Text(f"Run by {', '.join(proof['providers']) or 'nothing'}; {proof['cuda']}."))
    lines += [Text(f"- {reason}") for reason in proof["reasons"]]
    lines.append(Text(f"Model: {model} ({(proof['bytes'] or 0) / 2**20:.1f} MiB)"))
    return Group(*lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else format(value, ".2e")
