"""Which unfinished scan does `--resume` go on with, and by which settings?

The newest one of the same model, images and settings that no other process is at work on. It goes
on by the settings it was started with; those that the user states again have to agree.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from audit import console
from audit.errors import RunError, UsageError
from audit.images import ImageFolder
from audit.networks import Network
from audit.runs import Run, list_runs
from audit.scan_config import ScanConfig, ScanRequest

__all__ = ["check_same_images", "unfinished_scan"]


def unfinished_scan(
    network: Network, config: ScanConfig, request: ScanRequest
) -> tuple[Run, ScanConfig, ScanRequest]:
    """Return the scan to go on with, claimed for this process, and what it was asked to do.

    Raises:
        RunError: There is none, or others are at work on all of them.
        UsageError: A stated setting differs from those of each.
    """
    alike = [run for run in list_runs(request.out) if _is_alike(run, network, request)]
    if not alike:
        raise RunError(
            f"no unfinished scan of {request.model} and {request.data} under {request.out}; "
            "start one without --resume"
        )
    agreeing = [run for run in alike if _disagreement(run, config, request) is None]
    if not agreeing:
        raise UsageError(
            f"{alike[0].name} was started with {_disagreement(alike[0], config, request)}; "
            "leave it out to resume, or start a new scan without --resume"
        )
    for run in agreeing:
        if run.claim():
            console.say(f"resuming {run.name}")
            masks = run.info["config"].get("masks")
            asked = replace(request, masks=request.masks or (Path(masks) if masks else None))
            return run, ScanConfig.from_dict(run.info["config"]), asked
    raise RunError(
        f"another process is at work on {agreeing[0].name}; wait for it, or start a new scan "
        "without --resume"
    )


def check_same_images(run: Run, folder: ImageFolder) -> None:
    """Raise RunError where the images are not those that the scan was started on."""
    if run.info["data"]["fingerprint"] != folder.fingerprint:
        raise RunError(
            f"the images in {folder.root} have changed since {run.name} was started; "
            "start a new scan without --resume"
        )


def _is_alike(run: Run, network: Network, request: ScanRequest) -> bool:
    model, data = run.info.get("model") or {}, run.info.get("data") or {}
    return (
        run.status != "complete"
        and model.get("sha256") == network.sha256
        and model.get("classes") == list(network.card.classes)
        and "fingerprint" in data
        and Path(data["root"]).resolve() == request.data.resolve()
    )


def _disagreement(run: Run, config: ScanConfig, request: ScanRequest) -> str | None:
    """Return which stated setting is another one there, such as `seed 0, not 1`; None if none."""
    recorded: dict[str, Any] = {**vars(ScanConfig.from_dict(run.info["config"]))}
    recorded["masks"] = run.info["config"].get("masks")
    asked = {**vars(config), "masks": str(request.masks) if request.masks else None}
    for name in sorted(request.stated):
        if recorded[name] != asked[name]:
            return f"{name.replace('_', ' ')} {recorded[name]}, not {asked[name]}"
    return None
