"""What is still to decide about a run, in sentences, the most pressing first.

Read from the run folder alone: the report says it at its top, and so does the dashboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audit.errors import RunError
from audit.runs import RepairFolder, Run

__all__ = ["open_points"]


def open_points(run: Run, repair: RepairFolder | None) -> list[str]:
    """Return what a person has yet to do or to decide, empty where nothing is open.

    Args:
        run: The scan.
        repair: The repair that is looked at.
    """
    if run.status == "running":
        return ["The scan is still running: wait for its verdict."]
    if run.status == "failed":
        return ["The scan failed: mend what it names and scan again."]
    points = _about_repair(repair) if repair is not None else _about_verdict(run)
    return [*points, *_about_cases(run.info.get("cases") or {})]


def _about_verdict(run: Run) -> list[str]:
    try:
        verdict, flagged = run.verdict, run.flagged_layer
    except RunError:  # said where the verdict should stand
        return []
    match verdict.get("verdict"):
        case "localized" if flagged:
            return [f"Whether to repair {flagged}: no repair has been started."]
        case "spread" if flagged:
            return [
                f"Which of the {len(verdict['layers'])} layers to repair: none stands out, so "
                f"begin with {flagged}, beside its controls."
            ]
        case "none":
            return []
    return []


def _about_repair(repair: RepairFolder) -> list[str]:
    info = repair.info
    if repair.status == "running":
        return ["The repair is still running, or was stopped: `repair layer --resume` goes on."]
    if repair.status == "failed":
        return ["The repair failed: mend what it names, then `repair layer --resume` goes on."]
    points = []
    penalty: Mapping[str, Any] = info.get("penalty") or {}
    if repair.decision == "rejected":
        points.append(
            "What to try instead: the repair was rejected, so the network as it was stays in use."
        )
    elif penalty.get("earned") is False:
        points.append(
            "Whether plain cross entropy would do: the penalty did no better than its control."
        )
    if repair.decision == "accepted":
        points += _about_export(repair)
    return points


def _about_export(repair: RepairFolder) -> list[str]:
    try:
        proof = repair.onnx
    except RunError as error:
        return [f"The export's proof cannot be read: {error}"]
    if proof is None:
        return ["Whether to ship it: the accepted repair has not been exported to ONNX."]
    if proof.get("status") != "passed":
        return ["Why the export failed its check: do not ship the file."]
    return []


def _about_cases(cases: Mapping[str, Any]) -> list[str]:
    if cases.get("source") == "proxy" and cases.get("images"):
        return ["Where the objects are: cases come from a proxy; masks or votes would settle them."]
    return []
