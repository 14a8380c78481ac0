"""Damage for fuzzing: bytes, JSON, TOML, archives and pickles, changed as bad luck or malice would.

Every function takes a `random.Random`, so that a case is known by its seed alone. Shared by the
tests (a few dozen cases) and by `benchmarks/fuzz.py` (thousands).
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERESTING = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
)
HOSTILE_TEXTS = (
    "",
    " ",
    "\x1b[2J\x1b]0;owned\x07",
    "line\nbreak\r\n",
    "<script>alert(1)</script>",
    "[red]markup[/red] [/nothing]",
    "![x](http://example.invalid/x.png)",
    "../../../../etc/passwd",
    "/etc/passwd",
    "C:\\Windows\\system32",
    "x" * 4000,
    "\u202egnp.exe",
    "\ud800",
    "\x00",
    "nan",
    "__import__('os').system('true')",
    "{{ 7 * 7 }}",
    "%s%n",
    "torchvision:resnet18",
)
HOSTILE_VALUES: tuple[Any, ...] = (
    *HOSTILE_TEXTS,
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    -(10**30),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"value": "high"},
    [0] * 1000,
)


class Canary:
    """Makes a folder when it is unpickled; whether code ran is whether it is there."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.place),)


# ------------------------------------------------------------------------- bytes


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes after one to four random edits; half of them near the start."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed = rng.choice(_EDITS)(changed, rng)
    return bytes(changed)


def _place(data: bytearray, rng: random.Random) -> int:
    reach = min(len(data), 256) if rng.random() < 0.5 else len(data)
    return rng.randrange(reach) if reach else 0


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 3, 20))):
        if data:
            data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return data


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytearray, rng: random.Random) -> bytearray:
    start = _place(data, rng)
    del data[start : start + rng.choice((1, 4, 64, 1000))]
    return data


def _insert(data: bytearray, rng: random.Random) -> bytearray:
    start = _place(data, rng)
    data[start:start] = rng.randbytes(rng.choice((1, 4, 64)))
    return data


def _repeat(data: bytearray, rng: random.Random) -> bytearray:
    start = _place(data, rng)
    data[start:start] = data[start : start + rng.choice((8, 64, 512))] * rng.choice((1, 2, 8))
    return data


def _blank(data: bytearray, rng: random.Random) -> bytearray:
    start = _place(data, rng)
    end = min(len(data), start + rng.choice((4, 32, 256)))
    data[start:end] = bytes([rng.choice((0, 0xFF))]) * (end - start)
    return data


def _number(data: bytearray, rng: random.Random) -> bytearray:
    form = rng.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    start = _place(data, rng)
    if start + size <= len(data):
        data[start : start + size] = struct.pack(form, rng.choice(INTERESTING) % 2 ** (8 * size))
    return data


_EDITS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    *(_flip, _truncate, _remove, _insert, _repeat, _blank, _number, _number),
)


# ------------------------------------------------------------------------- documents


def mutate_document(document: Any, rng: random.Random) -> Any:
    """Return a JSON document with one to six places replaced, removed, renamed or repeated."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 6))):
        found = _place_in(changed, rng)
        if found is None:
            return rng.choice(HOSTILE_VALUES)
        holder, key = found
        action = rng.random()
        if action < 0.6:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
        elif action < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(HOSTILE_TEXTS)] = holder.pop(key)
        else:
            holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice((1, 3, 500))
    return changed


def mutate_json(text: str, rng: random.Random) -> bytes:
    """Return a JSON file after edits of its document or its bytes, or as no such file at all."""
    action = rng.random()
    if action < 0.75:
        return json.dumps(mutate_document(json.loads(text), rng)).encode()
    if action < 0.95:
        return mutate_bytes(text.encode(), rng)
    deep = rng.choice((b"[", b'{"a":')) * rng.choice((50, 100_000))
    return rng.choice((deep, b"\xff\xfe", b"null", b"[]", b'"text"', b"1" * 5000, b"", b"NaN"))


def mutate_toml(text: str, rng: random.Random) -> bytes:
    """Return a model card after edits of its values, its lines, or its bytes."""
    lines = text.splitlines()
    action = rng.random()
    if action < 0.55:
        given = [number for number, line in enumerate(lines) if " = " in line]
        number = rng.choice(given)
        lines[number] = f"{lines[number].partition(' = ')[0]} = {_toml(rng.choice(HOSTILE_VALUES))}"
    elif action < 0.8:
        number = rng.randrange(len(lines))
        deep = "[" * rng.choice((40, 50_000))
        further = (
            "",
            lines[number],
            f"a = {deep}",
            "[preprocessing]",
            "a.b.c = 1",
            '"" = 1',
            "\x00",
        )
        lines[number] = rng.choice(further)
    else:
        return mutate_bytes(text.encode(), rng)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def _place_in(node: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """Return a place of a document as its holder and key; the nearer to the root, the likelier."""
    found = None
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        found = node, key
        node = node[key]
        if rng.random() < 0.3:
            break
    return found


# ------------------------------------------------------------------------- archives and pickles


def mutate_archive(data: bytes, rng: random.Random, canary: Path) -> bytes:
    """Return a zip archive with hostile members: absolute paths, links, bombs, payloads, damage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    names = list(parts)
    root = names[0].partition("/")[0]
    chosen = rng.choice(names)
    links: set[str] = set()
    compression = zipfile.ZIP_STORED
    match rng.randrange(9):
        case 0:
            parts[chosen] = mutate_bytes(parts[chosen], rng)
        case 1:
            parts[rng.choice(("/etc/cron.d/x", "../../x", f"{root}/../../x"))] = b"x"
        case 2:
            links.add(f"{root}/link")
            parts[f"{root}/link"] = b"/etc/passwd"
        case 3:
            parts[rng.choice((chosen, f"{root}/data/0", f"{root}/extra/x"))] = bytes(40_000_000)
            compression = zipfile.ZIP_DEFLATED
        case 4:
            del parts[chosen]
        case 5:
            parts[rng.choice(HOSTILE_TEXTS[2:10])] = parts.pop(chosen)
        case 6:
            pickles = [name for name in names if name.endswith(".pkl")] or names
            parts[rng.choice(pickles)] = hostile_pickle(rng, canary)
        case 7:
            pickles = [name for name in names if name.endswith(".pkl")] or names
            name = rng.choice(pickles)
            parts[name] = mutate_bytes(parts[name], rng)
        case _:
            texts = [name for name in names if name.endswith(".json")] or names
            name = rng.choice(texts)
            try:
                parts[name] = mutate_json(parts[name].decode(), rng)
            except ValueError:
                parts[name] = mutate_bytes(parts[name], rng)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression, compresslevel=1) as archive:
        for name, content in parts.items():
            entry = zipfile.ZipInfo(name.encode("utf-8", "replace").decode() or "empty")
            entry.compress_type = compression
            if name in links:
                entry.create_system, entry.external_attr = 3, 0o120777 << 16
            archive.writestr(entry, content)
    return written.getvalue()


def hostile_pickle(rng: random.Random, canary: Path) -> bytes:
    """Return a pickle that would run code, or that would never end, if it were let."""
    place = str(canary).encode()
    match rng.randrange(6):
        case 0:
            return pickle.dumps(Canary(canary), rng.choice((0, 2, 4)))
        case 1:
            return pickle.dumps({"state_dict": {"weight": Canary(canary)}}, 2)
        case 2:
            return b"cposix\nmkdir\n(S'" + place + b"'\ntR."
        case 3:  # through what torch lets build tensors
            return b"ctorch._utils\n_rebuild_tensor_v2\n(cposix\nmkdir\nS'" + place + b"'\ntR."
        case 4:  # a billion laughs as a key; hashing it here would not end either
            doubled = b"".join(b"q%ch%c\x86" % (level, level) for level in range(60))
            return b"\x80\x02}X\x02\x00\x00\x00ha\x85" + doubled + b"K\x01s."
        case _:
            return b"\x80\x02" + b"(" * rng.choice((10, 100_000)) + b"."
