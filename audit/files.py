"""Files that are written whole or not at all.

Every writer fills a temporary file in the target's own folder, flushes it to the disk, renames it
over the target and flushes the folder: a reader, or a machine that lost power, sees the old file or
the new one and never a half. Run folders are built from these few verbs.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
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


# What JSON may hold and a terminal would obey: control characters, half characters, marks that
# turn the direction of writing.
_UNPRINTABLE = re.compile(
    "[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure it is gone.

    The temporary name keeps the suffix, for writers that look at it. Missing parent folders are
    made.

    Raises:
        OSError: The disk is full, or the folder cannot be written to; names `path`. Also where
            the writer said so in an error of its own kind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        refusal = _refusal(temporary, error)
        temporary.unlink(missing_ok=True)
        if refusal is None:
            raise
        raise OSError(refusal.errno, refusal.strerror, str(path)) from error
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

    Letters stay as they are; what a terminal would obey is escaped, so that a name from a file can
    be printed.

    NumPy scalars and arrays, paths (written with forward slashes), tuples, sets of strings and
    date-times are accepted.

    Raises:
        TypeError: A value of any other type; the message has its place in the document.
    """
    text = json.dumps(_plain(document, "document"), indent=2, ensure_ascii=False, allow_nan=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RunError: The file is missing, unreadable, no regular file, or holds no strict JSON object.
    """
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
            raise RunError(f"{path} is no regular file; run the command that wrote it again")
        text = path.read_text(encoding="utf-8")
        document = json.loads(text, parse_constant=_refuse_constant)
        if _HALF_CHARACTER.search(text):
            json.dumps(document, ensure_ascii=False).encode()  # ValueError for half a character
    except FileNotFoundError as error:
        raise RunError(
            f"no {path.name} in {path.parent}; is it a run folder, and did its scan finish?"
        ) from error
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets without end
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


def _refusal(temporary: Path, error: BaseException) -> OSError | None:
    """Return the disk's reason behind an error, None where it has none.

    Libraries that write files in their own way (torch, safetensors, Arrow) raise errors of their
    own when the disk is full; so the disk is asked, where they do not quote it.
    """
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error
    if not isinstance(error, Exception):
        return None
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number))
    try:
        with temporary.open("ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return reason
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


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
