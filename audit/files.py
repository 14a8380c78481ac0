"""Files that are written whole or not at all.

Every writer fills a temporary file in the target's own folder, flushes it to the disk, renames it
over the target and flushes the folder: a reader, or a machine that lost power, sees the old file or
the new one and never a half. Run folders are built from these few verbs.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from audit.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

__all__ = [
    "json_text",
    "read_json",
    "replacing",
    "sha256_file",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_table",
    "write_text",
]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure it is gone.

    The temporary name keeps the suffix, for writers that look at it. Missing parent folders are
    made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened for flushing
        _flush(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as `json_text` renders it."""
    write_text(path, json_text(document) + "\n")


def json_text(document: Mapping[str, Any]) -> str:
    """Return strict JSON, indented by two: NaN and infinities become null.

    NumPy scalars and arrays, paths (written with forward slashes), tuples, sets of strings and
    date-times are accepted.

    Raises:
        TypeError: A value of any other type; the message has its place in the document.
    """
    return json.dumps(_plain(document, "document"), indent=2, ensure_ascii=False, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RunError: The file is missing, unreadable or not a JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            f"no {path.name} in {path.parent}; is it a run folder, and did its scan finish?"
        ) from error
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # both bad JSON and bad UTF-8
        raise RunError(
            f"{path} is damaged ({error}); restore it from a copy or run the command that wrote it "
            "again"
        ) from error
    if not isinstance(document, dict):
        raise RunError(
            f"{path} holds a JSON {type(document).__name__}, expected an object; "
            "run the command that wrote it again"
        )
    return document


def write_table(path: Path, table: "pyarrow.Table | Sequence[Mapping[str, Any]]") -> None:
    """Write a Parquet file from an Arrow table or from one mapping per row.

    A row that lacks another row's column holds null there.
    """
    import pyarrow
    import pyarrow.parquet

    if not isinstance(table, pyarrow.Table):
        names = list(dict.fromkeys(name for row in table for name in row))
        columns = {name: [row.get(name) for row in table] for name in names}
        table = pyarrow.table(columns)
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def write_arrays(path: Path, **arrays: "np.ndarray") -> None:
    """Write named arrays to one compressed `.npz` file."""
    import numpy as np

    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # a stream keeps the name


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any, where: str) -> Any:
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
        case set() | frozenset():
            return [_plain(item, where) for item in sorted(value)]
        case PurePath():
            return value.as_posix()
        case datetime():
            return value.isoformat()
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, without importing NumPy
        return _plain(value.tolist(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
