"""What is exported: a repair of a run, its scanned network, or a checkpoint without a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from audit import console
from audit.errors import RunError, UsageError
from audit.files import sha256_file
from audit.images import ImageFolder, open_image_folder
from audit.networks import Network, open_network
from audit.runs import RepairFolder, Run, open_repair
from repair.sources import open_scanned_images, open_scanned_network, positions

__all__ = ["ExportSource", "chosen_repair", "source_of_checkpoint", "source_of_run"]

EXPORTS = Path("exports")


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A network to export, the images that prove it, and what its user should know.

    Attributes:
        network: What is exported.
        original: The network before the repair; None where there is no repair.
        layer: The repaired layer, if any.
        folder: Where the files go.
        images: Where the held-out images are.
        indices: Their positions in the folder's records.
        facts: For the metadata and the model card: run, repair, metrics, hashes. No paths.
    """

    network: Network
    original: Network | None = None
    layer: str | None = None
    folder: Path
    images: ImageFolder
    indices: tuple[int, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def source_of_run(
    run: Run,
    *,
    repair: str | None = None,
    original: bool = False,
    data: Path | None = None,
    model: str | None = None,
    trust_pickle: bool = False,
    code: Path | None = None,
) -> ExportSource:
    """Return a repair of the run, the newest finished one by default, or its scanned network.

    Raises:
        RunError: There is no such repair, or the run's model or images are not there.
    """
    chosen = None if original else chosen_repair(run, repair)
    scanned = open_scanned_network(run, model=model, trust_pickle=trust_pickle, code=code)
    images, _ = open_scanned_images(run, data=data)
    indices = positions(images, "test")
    facts: dict[str, Any] = {"run": run.name}
    if chosen is None:
        facts["metrics"] = _brief(run.info.get("metrics") or {})
        return ExportSource(
            network=scanned, folder=run.path, images=images, indices=indices, facts=facts
        )
    facts |= {
        "repair": chosen.name,
        "decision": chosen.decision,
        "metrics": _brief({when: chosen.info.get(when) for when in ("before", "after")}),
        "weights_sha256": sha256_file(chosen.weights) if chosen.weights.is_file() else "",
    }
    return ExportSource(
        network=_repaired(scanned, chosen),
        original=scanned,
        layer=chosen.layer,
        folder=chosen.path,
        images=images,
        indices=indices,
        facts=facts,
    )


def source_of_checkpoint(
    checkpoint: str,
    data: Path | None,
    *,
    arch: str | None = None,
    classes: Path | None = None,
    trust_pickle: bool = False,
    code: Path | None = None,
) -> ExportSource:
    """Return a model that no run knows, proven on the test images of a folder.

    Raises:
        UsageError: There is no folder of images.
        NetworkError: The model cannot be opened.
        ImageError: The images cannot be matched to its classes.
    """
    if data is None:
        raise UsageError(
            "--checkpoint needs --data DIR: an export is proven on real images of the model's "
            "classes"
        )
    network = open_network(
        checkpoint, arch=arch, classes=classes, trust_pickle=trust_pickle, code=code
    )
    images = open_image_folder(data, network.card.classes)
    name = Path(checkpoint.replace(":", "-")).stem
    return ExportSource(
        network=network,
        folder=EXPORTS / name,
        images=images,
        indices=positions(images, "test"),
        facts={"checkpoint": name},
    )


def chosen_repair(run: Run, name: str | None) -> RepairFolder:
    """Return the repair of that name or path, the newest finished one when None.

    Raises:
        RunError: There is none, or it is not finished.
    """
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


def _brief(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics without those of single classes, of which there may be thousands."""
    return {
        when: {name: value for name, value in (found or {}).items() if name != "per_class"}
        for when, found in metrics.items()
    }


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
    changed = (repair.info.get("frozen") or {}).get("changed") or ()
    return network.with_state({name: stored[name] for name in {*names, *changed}})
