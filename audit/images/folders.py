"""Open a folder of labeled images: match classes, hash contents, drop duplicates, decide the
splits.

The folder holds one sub-folder per class, or train/val/test sub-folders that do. Every file is
hashed and its header checked; pixels are decoded only when they are loaded
(`audit.images.loading`). One bad file is a recorded skip, never the end. The result depends on
names, contents and seed alone, not on the order in which the disk lists files.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from audit.errors import ImageError, UsageError
from audit.images.classes import match_classes
from audit.images.decoding import UnreadableImageError, content_hash, quiet_pillow
from audit.images.listing import files_below, list_required, safe_path
from audit.images.records import SPLITS, ImageFolder, ImageRecord, SkippedFile, Split, one_line
from audit.images.splits import choose_subset, complete_split, seeded_split

__all__ = ["class_names", "open_image_folder"]

_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True, kw_only=True)
class _ClassFolder:
    path: str  # relative to the root
    name: str
    split: Split | None  # None: the user made no split


@dataclass(frozen=True, kw_only=True)
class _Found:
    path: str
    label: int
    split: Split | None
    sha256: str


def open_image_folder(
    root: Path,
    classes: Sequence[str],
    *,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> ImageFolder:
    """Return the images below `root`, labeled with the model outputs whose names their folders
    bear.

    Args:
        root: Folder with one sub-folder per class, or with train, val (valid, validation), test
            folders of such.
        classes: Name of each model output, in output order.
        seed: Decides splits that the folders leave open, and the choice of `limit`.
        limit: Keep a subset of at most this many images, stratified by split and class.
        progress: Called with the number of files done since the last call.

    Raises:
        ImageError: If there is no such folder or no usable image in it.
        ClassMismatchError: If a class folder matches no model output, or several.
        UsageError: If the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit on images must be at least 1, not {limit}")
    root = Path(root).absolute()
    skipped: list[SkippedFile] = []
    class_folders = _class_folders(root, skipped)
    outputs = match_classes(sorted({folder.name for folder in class_folders}), classes)

    found = []
    for folder in class_folders:
        found += _read_class(root, folder, outputs[folder.name], skipped, progress)
    unique, duplicates = _without_duplicates(found)
    skipped = sorted(skipped + duplicates, key=lambda skip: (skip.path, skip.reason))
    if not unique:
        raise ImageError(_nothing_usable(root, skipped))

    splits, notes = _decide_splits(unique, seed)
    if limit is not None and limit < len(unique):
        labels = {image.sha256: image.label for image in unique}
        kept = choose_subset(splits, labels, limit=limit, seed=seed)
        unique = [image for image in unique if image.sha256 in kept]

    records = tuple(
        ImageRecord(
            path=image.path,
            label=image.label,
            class_name=classes[image.label],
            split=splits[image.sha256],
            sha256=image.sha256,
        )
        for image in sorted(unique, key=lambda image: image.path)
    )
    return ImageFolder(
        root=root,
        records=records,
        skipped=tuple(skipped),
        split_source="seeded" if class_folders[0].split is None else "folders",
        duplicates=len(duplicates),
        fingerprint=_fingerprint(records),
        split_notes=notes,
    )


def class_names(root: Path) -> tuple[str, ...]:
    """Return the names of the class folders, sorted: the classes of a network yet to be made.

    Raises:
        ImageError: If there is no such folder or none in it.
    """
    return tuple(sorted({folder.name for folder in _class_folders(Path(root).absolute(), [])}))


def _class_folders(root: Path, skipped: list[SkippedFile]) -> list[_ClassFolder]:
    """Return the class folders, by split if all of them lie in train, val or test folders."""
    folders, files = list_required(root)
    if not folders:
        held = f"holds {len(files)} files but no sub-folders" if files else "is empty"
        raise ImageError(
            f"folder {one_line(str(root))} {held}; "
            "images must lie in one sub-folder per class, named like the class"
        )
    skipped += _outside(files)
    splits = {name: _SPLIT_NAMES[name.lower()] for name in folders if name.lower() in _SPLIT_NAMES}
    inside = {name: list_required(root / name) for name in splits}
    if not any(classes for classes, _ in inside.values()):  # a class may be called "train" as well
        return [_ClassFolder(path=name, name=name, split=None) for name in folders]

    if others := [name for name in folders if name not in splits]:
        raise ImageError(
            f"folder {one_line(str(root))} holds split folders ({', '.join(splits)}) and others "
            f"({one_line(', '.join(others), 80)}) side by side; "
            "move the others elsewhere, or every class into the split folders"
        )
    class_folders = []
    for name, (classes, files) in inside.items():
        skipped += _outside(f"{name}/{file}" for file in files)
        class_folders += [
            _ClassFolder(path=f"{name}/{folder}", name=folder, split=splits[name])
            for folder in classes
        ]
    return class_folders


def _outside(paths: Iterable[str]) -> list[SkippedFile]:
    reason = "file outside the class folders"
    return [SkippedFile(path=safe_path(path), reason=reason) for path in paths]


def _read_class(
    root: Path,
    folder: _ClassFolder,
    label: int,
    skipped: list[SkippedFile],
    progress: Callable[[int], object] | None,
) -> list[_Found]:
    found = []
    for path in files_below(root, folder.path, skipped):
        try:
            with quiet_pillow():
                sha256 = content_hash(root / path)
        except UnreadableImageError as error:
            skipped.append(SkippedFile(path=path, reason=str(error)))
        else:
            found.append(_Found(path=path, label=label, split=folder.split, sha256=sha256))
        if progress is not None:
            progress(1)
    return found


def _without_duplicates(found: Sequence[_Found]) -> tuple[list[_Found], list[SkippedFile]]:
    """Return one image per content, and the copies left out.

    Test copies are kept before validation before training copies, so that nothing judged was
    trained on. The same content under two labels has no true label and is left out altogether.
    """
    copies: dict[str, list[_Found]] = defaultdict(list)
    for image in found:
        copies[image.sha256].append(image)
    unique, left_out = [], []
    for same in copies.values():
        same.sort(key=lambda image: (-_precedence(image.split), image.path))
        first = same[0]
        if other := next((image for image in same if image.label != first.label), None):
            for image in same:
                against = other if image.label == first.label else first
                reason = f"same content under another class: {one_line(against.path)}"
                left_out.append(SkippedFile(path=image.path, reason=reason))
            continue
        unique.append(first)
        reason = f"duplicate of {one_line(first.path)}"
        left_out += [SkippedFile(path=image.path, reason=reason) for image in same[1:]]
    return unique, left_out


def _precedence(split: Split | None) -> int:
    return 0 if split is None else SPLITS.index(split)


def _decide_splits(images: Sequence[_Found], seed: int) -> tuple[dict[str, Split], tuple[str, ...]]:
    labels = {image.sha256: image.label for image in images}
    given = {image.sha256: image.split for image in images if image.split is not None}
    if given:
        return complete_split(given, labels, seed=seed)
    return seeded_split(labels, seed=seed), ()


def _fingerprint(records: Sequence[ImageRecord]) -> str:
    lines = sorted(f"{record.path}\0{record.sha256}\0{record.label}\n" for record in records)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _nothing_usable(root: Path, skipped: Sequence[SkippedFile]) -> str:
    text = f"no usable image in the class folders of {one_line(str(root))}"
    if not skipped:
        return f"{text}: they are empty; put images into them"
    first = skipped[0]
    return f"{text}: {len(skipped)} skipped, such as {one_line(first.path)}: {first.reason}"
