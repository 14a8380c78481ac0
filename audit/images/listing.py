"""Which files lie below a class folder? Hidden files and the litter of systems are passed over.

Symbolic links are followed, a folder at most once per class folder, so links that form a loop end.
Order depends on names alone. A name that is not valid UTF-8 cannot be written to a run folder and
is left out, with a reason.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from audit.errors import ImageError
from audit.images.records import SkippedFile, one_line

__all__ = ["files_below", "list_folder", "list_required", "safe_path"]

_LITTER = frozenset({"__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini"})


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the sub-folders and of everything else in a folder, each sorted.

    Raises:
        OSError: If the folder cannot be listed.
    """
    folders: list[str] = []
    others: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _LITTER:
                continue
            (folders if _is_folder(entry) else others).append(entry.name)
    return sorted(folders), sorted(others)


def files_below(root: Path, folder: str, skipped: list[SkippedFile]) -> Iterator[str]:
    """Yield the path, relative to `root`, of everything below `root/folder` that is not a folder.

    What cannot be entered, loops or has no valid name is appended to `skipped`.
    """
    seen = {_identity(path) for path in (root / folder).parents}
    if _identity(root / folder) in seen:
        skipped.append(_skip(folder, "link to a folder that holds it"))
        return
    seen.add(_identity(root / folder))
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            folders, files = list_folder(root / current)
        except OSError as error:
            skipped.append(
                _skip(current, f"folder cannot be listed: {os.strerror(error.errno or 0)}")
            )
            continue
        for name in files:
            if _is_text(name):
                yield f"{current}/{name}"
            else:
                skipped.append(_skip(f"{current}/{name}", "file name is not valid UTF-8"))
        for name in reversed(folders):
            path = f"{current}/{name}"
            if not _is_text(name):
                skipped.append(_skip(path, "folder name is not valid UTF-8"))
                continue
            try:
                identity = _identity(root / path)
            except OSError as error:
                skipped.append(
                    _skip(path, f"folder cannot be entered: {os.strerror(error.errno or 0)}")
                )
                continue
            if identity in seen:
                skipped.append(_skip(path, "link to a folder that was already read"))
            else:
                seen.add(identity)
                waiting.append(path)


def safe_path(path: str) -> str:
    """Return the path fit for JSON and Parquet: undecodable bytes as backslash escapes."""
    return path if _is_text(path) else path.encode("utf-8", "backslashreplace").decode()


def list_required(root: Path) -> tuple[list[str], list[str]]:
    """Return `list_folder` of the folder that the user named, or raise an ImageError."""
    shown = one_line(str(root))
    try:
        return list_folder(root)
    except FileNotFoundError:
        raise ImageError(
            f"no folder {shown}; give the folder that holds one sub-folder of images per class"
        ) from None
    except NotADirectoryError:
        raise ImageError(
            f"{shown} is a file; give the folder that holds one sub-folder of images per class"
        ) from None
    except OSError as error:
        raise ImageError(
            f"folder {shown} cannot be listed: {error.strerror}; check its permissions"
        ) from error


def _is_text(name: str) -> bool:
    """Return whether the name is Unicode throughout; undecodable bytes arrive as surrogates."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; opening it will give the reason
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _skip(path: str, reason: str) -> SkippedFile:
    return SkippedFile(path=safe_path(path), reason=reason)
