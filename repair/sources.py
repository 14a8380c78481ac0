"""What a run was made from, opened again and checked: its network and its images.

A repair must see what the scan saw. The model file must have the recorded hash; images that are
gone or changed are left out and listed; images added for training may not occur in the splits that
judge the repair.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from audit.errors import RunError
from audit.files import sha256_file
from audit.images import ImageFolder, ImageRecord, SkippedFile, Split, open_image_folder
from audit.images.records import SPLITS
from audit.networks import open_network
from audit.networks.card import check_class_names
from audit.record_shapes import reading
from audit.runs import Run

if TYPE_CHECKING:
    from audit.networks import Network


@dataclass(frozen=True, kw_only=True)
class Additions:
    """Training images that came from another folder.

    Attributes:
        root: The folder.
        added: How many of its images joined the training split.
        held_out: How many were left out because the run judges repairs on the same content.
        known: How many were left out because the training split has them already.
        skipped: Files that are no usable images.
    """

    root: str
    added: int
    held_out: int
    known: int
    skipped: tuple[SkippedFile, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "skipped": [vars(skip) for skip in self.skipped]}


def open_scanned_network(
    run: Run,
    *,
    model: str | None = None,
    device: str = "cpu",
    trust_pickle: bool = False,
    code: Path | None = None,
) -> Network:
    """Return the network that the run scanned, with the classes that it was scanned with.

    Args:
        model: Where the model is now, if it has moved.

    Raises:
        RunError: The model is not there, or not the one that was scanned.
        NetworkError: It cannot be opened.
    """
    recorded = _recorded(run, "model", "source", "classes")
    source = model or str(recorded["source"])
    if ":" not in source and not Path(source).exists():
        raise RunError(
            f"the model {source} is not there; say where it is now with --model FILE"
            if model is None
            else f"no model at {source}; expected the one that {run.path} was made from"
        )
    network = open_network(
        source, arch=recorded.get("arch"), trust_pickle=trust_pickle, code=code, device=device
    )
    if network.sha256 != recorded.get("sha256"):
        raise RunError(
            f"{source} is not the model that {run.path} was made from (its hash differs); "
            "give the scanned one with --model, or scan this one"
        )
    classes = check_class_names(recorded["classes"])
    if len(classes) != network.program.classes:
        raise RunError(
            f"{run.path} names {len(classes)} classes, the model has {network.program.classes} "
            "outputs; run.json was changed: scan again"
        )
    return replace(network, card=replace(network.card, classes=classes))


def open_scanned_images(
    run: Run, *, data: Path | None = None
) -> tuple[ImageFolder, tuple[SkippedFile, ...]]:
    """Return the images that the run scanned, with its splits, and those that are not the same now.

    Args:
        data: Where the images are now, if they have moved.

    Raises:
        RunError: None of them is there.
    """
    recorded = _recorded(run, "data", "root")
    classes = len(_recorded(run, "model", "classes")["classes"])
    root = Path(data or str(recorded["root"])).absolute()
    records, changed = [], []
    for row in _known(run, classes):
        record = ImageRecord(
            path=str(row.path),
            label=int(row.label),
            class_name=str(row.label_name),
            split=row.split,
            sha256=str(row.sha256),
        )
        reason = _difference(root / record.path, record.sha256)
        if reason is None:
            records.append(record)
        else:
            changed.append(SkippedFile(path=record.path, reason=reason))
    if not records:
        raise RunError(
            f"none of the run's {len(changed)} images is at {root}; say where they are now with "
            "--data DIR"
        )
    folder = ImageFolder(
        root=root,
        records=tuple(records),
        skipped=(),
        split_source=recorded.get("split_source", "seeded"),
        duplicates=int(recorded.get("duplicates", 0)),
        fingerprint=str(recorded.get("fingerprint", "")),
    )
    return folder, tuple(changed)


def with_training_images(
    folder: ImageFolder, added: Path, classes: Sequence[str], *, seed: int
) -> tuple[ImageFolder, Additions]:
    """Return the folder with another folder's images in its training split.

    Content that occurs in the validation or test split is left out: the repair is judged on it.
    """
    other = open_image_folder(added, classes, seed=seed)
    split_of: dict[str, Split] = {record.sha256: record.split for record in folder.records}
    fresh = [record for record in other.records if record.sha256 not in split_of]
    known = sum(split_of.get(record.sha256) == "train" for record in other.records)
    joined = [
        replace(record, path=_relative(other.root / record.path, folder.root), split="train")
        for record in fresh
    ]
    report = Additions(
        root=str(added),
        added=len(fresh),
        held_out=len(other.records) - len(fresh) - known,
        known=known,
        skipped=other.skipped,
    )
    return replace(folder, records=(*folder.records, *joined)), report


def positions(folder: ImageFolder, split: Split) -> tuple[int, ...]:
    """Return where the images of one split stand in the folder's records.

    Raises:
        RunError: There is none.
    """
    found = folder.positions(split)
    if not found:
        raise RunError(
            f"the run has no image in its {split} split; scan again with more images, "
            "or with train, val and test folders"
        )
    return found


def _known(run: Run, classes: int) -> Iterator[Any]:
    """Yield the rows of the run's images.

    Raises:
        RunError: One has a class or a split that there is not.
    """
    for row in run.images.itertuples():
        with reading(run.path):
            fits = row.split in SPLITS and 0 <= int(row.label) < classes
        if not fits:
            raise RunError(
                f"images.parquet of {run.path} has an image of the class {row.label!r} in the "
                f"split {row.split!r}, which there is not; scan again"
            )
        yield row


def _recorded(run: Run, part: str, *needed: str) -> dict[str, Any]:
    record = run.info.get(part)
    if not isinstance(record, dict) or any(record.get(name) is None for name in needed):
        raise RunError(
            f"{run.path} does not say which {part} it was made from (it is {run.status}); "
            "scan again"
        )
    return record


def _difference(path: Path, sha256: str) -> str | None:
    """Return what is wrong with an image that the scan saw, None if it is the same."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            return "it is no regular file now"
        return None if sha256_file(path) == sha256 else "its content has changed since the scan"
    except OSError as error:
        return f"it cannot be read now: {error.strerror or error}"
    except ValueError:  # a path with a zero byte
        return "its path cannot be one"


def _relative(path: Path, root: Path) -> str:
    try:
        return PurePath(os.path.relpath(path, root)).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()
