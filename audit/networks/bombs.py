"""Model files that would take memory or time without end, found before they are opened.

Three kinds: an archive that unpacks to many times its size, a pickle whose few tuples hold each
other so that hashing or printing them never ends (the "billion laughs"), and arguments on a card
that ask for a network far beyond the weights it is meant for. Each is refused in one line.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import UninitializedParameter

from audit.errors import NetworkError

__all__ = ["check_compression", "check_unfolding", "limited_building"]

LARGEST_RATIO = 8  # torch does not compress at all
HARMLESS_BYTES = 64 * 2**20
LARGEST_UNFOLDING = 10**6
LARGEST_PICKLE = 256 * 2**20
LEGACY_PICKLES = 5  # magic, protocol, system, the object, the keys of its storages
SPARE_PARAMETERS = 2 * 10**8
MOST_MODULES = 10_000  # the largest networks of torchvision and timm have some thousands


def check_compression(path: Path) -> None:
    """Raise NetworkError where a zip archive says that it unpacks to far more than its size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return  # its reader will say what is wrong
    held = path.stat().st_size
    if claimed > max(LARGEST_RATIO * held, HARMLESS_BYTES):
        raise NetworkError(
            f"{path} has {held:,} bytes and unpacks to {claimed:,}: a decompression bomb, or not "
            "packed by torch; save the model again with torch.save"
        )


def check_unfolding(content: Path | bytes, path: Path) -> None:
    """Raise NetworkError where a pickle's objects, written out, are without end.

    A tuple that holds another one twice, and so on, takes a few bytes and 2^n steps to hash. Each
    object's size is counted with everything in it, without building anything.

    Args:
        content: The file, or what a part of one holds: a zip archive of torch, or bare pickles.
        path: What to call it.
    """
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if zipfile.is_zipfile(file):
            for stream in _pickles_inside(file):
                _measure(stream, path, 1)
        else:
            file.seek(0)
            _measure(file, path, LEGACY_PICKLES)


def _pickles_inside(file: BinaryIO) -> Iterator[BinaryIO]:
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl") and entry.file_size <= LARGEST_PICKLE:
                    yield io.BytesIO(archive.read(entry))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError):
        return  # its reader will say what is wrong


def _measure(stream: BinaryIO, path: Path, pickles: int) -> None:
    for _ in range(pickles):
        try:
            largest = _largest_object(stream)
        except Exception:  # damaged: torch stops there too
            return
        if largest > LARGEST_UNFOLDING:
            raise NetworkError(
                f"{path} holds objects that unfold into more than {LARGEST_UNFOLDING:,} values, "
                "which no state dict does; save it with torch.save(model.state_dict(), path)"
            )


_MARK = object()


def _largest_object(stream: BinaryIO) -> int:
    """Return the size of the largest tuple of a pickle, with everything in it; stops at the limit.

    The pickle machine with sizes in place of objects: tuples add up, everything that is not built
    from a tuple counts one, for only tuples can be hashed with what they hold.
    """
    stack: list[Any] = []
    memo: dict[int, int] = {}
    largest: int = 1

    def until_mark() -> list[int]:
        taken = []
        while stack and (top := stack.pop()) is not _MARK:
            taken.append(top)
        return taken

    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(1 + sum(until_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [1 + sum(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(int(argument), 1))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif pickletools.markobject in opcode.stack_before:
            until_mark()
            below = opcode.stack_before.index(pickletools.markobject)
            del stack[len(stack) - below :]
            stack += [1] * len(opcode.stack_after)
        else:
            taken = len(opcode.stack_before)
            del stack[len(stack) - taken :]
            stack += [1] * len(opcode.stack_after)
        if stack and stack[-1] is not _MARK and stack[-1] > largest:
            largest = int(stack[-1])
            if largest > LARGEST_UNFOLDING:
                return largest
    return largest


@dataclass
class _Building:
    parameters: int = 0
    modules: int = 0


@contextmanager
def limited_building(expected: int, what: str) -> Iterator[None]:
    """Stop the construction of networks, in this block, that outgrow the weights they are for.

    Args:
        expected: Numbers in the file of weights.
        what: The architecture with its arguments, for the message.

    Raises:
        NetworkError: More parameters than four times that many, or very many modules.
    """
    so_far = _Building()
    most = 4 * expected + SPARE_PARAMETERS

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or isinstance(parameter, UninitializedParameter):
            return
        so_far.parameters += parameter.numel()
        if so_far.parameters > most:
            raise NetworkError(
                f"{what} would have more than {most:,} parameters, the file holds {expected:,}; "
                "correct the arguments on the model card"
            )

    def count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        so_far.modules += 1
        if so_far.modules > MOST_MODULES:
            raise NetworkError(
                f"{what} would have more than {MOST_MODULES:,} modules; "
                "correct the arguments on the model card"
            )

    handles = (
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
