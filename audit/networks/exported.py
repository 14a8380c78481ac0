"""Exported programs (`.pt2`) read without running anything that the file brings along.

`torch.export.load` trusts its file: tensors may be pickled objects, shape expressions go through
`eval`, operators are looked up by any dotted name below `torch`, guards are Python source, and an
archive may hold compiled libraries. So the archive is checked first, part by part, against what an
image classifier needs; tensors are then unpickled by torch's restricted unpickler alone.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from audit.errors import NetworkError, UntrustedPickleError
from audit.networks.bombs import check_compression, check_unfolding

_MODEL = "models/model.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_RECORDS = re.compile(
    r"models/model\.json|data/(weights|constants)/[\w.]+|data/sample_inputs/model\.pt|extra/.*"
    r"|archive_(format|version)|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment",
    re.ASCII,
)
_DOTTED_NAME = re.compile(r"|[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_NAME = re.compile(r"|[A-Za-z_]\w*", re.ASCII)
_PLAIN_TEXT = re.compile(r"[\w .,:;>()+-]{0,200}", re.ASCII)
_OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_PYTHON_OPERATORS = frozenset(
    "_operator." + name
    for name in (
        *("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
    )
)
_SYMBOLIC_OPERATORS = frozenset(
    f"torch.{name}" for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not")
)
_EXPRESSION = re.compile(r"[\w\s+*/(),<>=-]*", re.ASCII)
_QUOTED_SYMBOL = re.compile(r"'([su]\d+)'", re.ASCII)  # Symbol('s77', positive=True)
_SYMBOL = re.compile(r"[su]\d+|\d+", re.ASCII)
_EXPRESSION_WORDS = frozenset(
    (
        *("Symbol", "integer", "positive", "nonnegative", "Integer", "Rational", "Float"),
        *("Add", "Mul", "Pow", "Mod", "Max", "Min", "FloorDiv", "CeilDiv", "IntTrueDiv"),
        *("PythonMod", "ModularIndexing", "PowByNatural", "CeilToInt", "FloorToInt", "ToFloat"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "True", "False"),
        *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan"),
        *("GreaterThan", "true", "false"),
    )
)
_TREE_TYPES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict"})
_DOTTED_FIELDS = frozenset(
    {"fqn", "parameter_name", "buffer_name", "tensor_constant_name", "parameter", "buffer"}
)
_ENVIRONMENT = threading.Lock()


def read_exported(path: Path) -> ExportedProgram:
    """Return the program of a `.pt2` file.

    Raises:
        UntrustedPickleError: the archive holds pickled objects, compiled code, or text that would
            be run as code.
        NetworkError: it is damaged, from another version of torch, or uses unknown operators.
    """
    from torch.export.pt2_archive._package import load_pt2

    check_compression(path)
    data = path.read_bytes()
    _check_archive(data, path)
    try:
        with _tensors_only():
            exported = load_pt2(io.BytesIO(data)).exported_programs["model"]
    except Exception as error:
        if "weights only load failed" in str(error).lower():
            raise _refusal(path, "a pickled object among its tensors") from None
        raise _unreadable(path, error) from error
    # Python source that `ExportedProgram.module()` would compile; shapes are checked elsewhere.
    exported._guards_code = []
    return exported


def _check_archive(data: bytes, path: Path) -> None:
    """Raise where the archive holds anything but a graph of known operators and plain tensors.

    The reader is the one that torch loads with, on the same bytes: both see the same records.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    try:
        with PT2ArchiveReader(io.BytesIO(data)) as archive:
            names = archive.get_file_names()
            if _MODEL not in names:
                raise NetworkError(f"{path} holds no exported model; expected {_MODEL} inside")
            for name in names:
                if not _RECORDS.fullmatch(name):
                    raise _refusal(path, f"the part {name!r}")
            program = json.loads(archive.read_bytes(_MODEL))
            configs = [
                json.loads(archive.read_bytes(name))
                for name in names
                if name.endswith("config.json")
            ]
            for name in names:
                if name.endswith(".pt"):
                    check_unfolding(archive.read_bytes(name), path)
        for config in configs:
            _check_weights(config, path)
        program.pop("guards_code", None)
        _check_text(program, "", path)
    except NetworkError:
        raise
    except Exception as error:  # other than what the format has at some place
        raise _unreadable(path, error) from error


def _check_weights(config: Any, path: Path) -> None:
    for entry in config.get("config", {}).values():
        file = str(entry.get("path_name"))
        if not re.fullmatch(r"(weight|tensor)_\d+", file, re.ASCII):
            raise _refusal(path, f"the object {file[:80]!r}")
        if entry.get("use_pickle"):
            raise _refusal(path, "a pickled object among its tensors")


def _check_text(value: Any, field: str, path: Path) -> None:
    """Raise where a text in the graph's JSON could do more than name something."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if field == "metadata":
                continue  # stack traces and module names, for people only
            if field in ("range_constraints",):
                _check_expression(key, path)
            elif not _DOTTED_NAME.fullmatch(key):
                raise _refusal(path, f"the name {key!r}")
            _check_text(entry, key, path)
    elif isinstance(value, list):
        for entry in value:
            _check_text(entry, field, path)
    elif isinstance(value, str):
        _CHECKS.get(field, _check_name)(value, path, field)


def _check_name(text: str, path: Path, field: str) -> None:
    pattern = _DOTTED_NAME if field in _DOTTED_FIELDS else _NAME
    if not pattern.fullmatch(text):
        raise _refusal(path, f"the name {text!r}")


def _check_operator(text: str, path: Path, field: str = "") -> None:
    if text in _PYTHON_OPERATORS or text in _SYMBOLIC_OPERATORS:
        return
    match = _OPERATOR.fullmatch(text)
    operator = getattr(getattr(torch.ops.aten, match[1], None), match[2], None) if match else None
    if not isinstance(operator, torch._ops.OpOverload):
        raise NetworkError(
            f"{path} uses the operator {text[:80]!r}; expected torch's own (aten) operators only"
        )
    schema = operator._schema
    if any(argument.name == "filename" for argument in schema.arguments):
        raise _refusal(path, f"the operator {text!r}, which opens files")
    if not schema.returns and not schema.name.startswith("aten::_assert"):
        raise _refusal(path, f"the operator {text!r}, which computes nothing")


def _check_expression(text: str, path: Path, field: str = "") -> None:
    bare = _QUOTED_SYMBOL.sub(r"\1", text)
    words = re.findall(r"\w+", bare)
    known = all(_SYMBOL.fullmatch(word) or word in _EXPRESSION_WORDS for word in words)
    if not known or not _EXPRESSION.fullmatch(bare):
        raise _refusal(path, f"the shape expression {text[:80]!r}")


def _check_tree(text: str, path: Path, field: str = "") -> None:
    def check(node: Any) -> None:
        if isinstance(node, list):
            for entry in node:
                check(entry)
        elif isinstance(node, dict):
            context = json.loads(node["context"]) if node.get("context") else None
            names = context if isinstance(context, list) else []
            if (
                node.get("type") not in _TREE_TYPES
                or not (context is None or isinstance(context, list))
                or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
            ):
                raise _refusal(path, f"inputs or outputs of the type {node.get('type')!r}")
            check(node.get("children_spec", []))
        elif not isinstance(node, int):
            raise _refusal(path, "a description of its inputs that is none")

    try:
        check(json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise _unreadable(path, error) from error


def _check_plain_text(text: str, path: Path, field: str) -> None:
    if not _PLAIN_TEXT.fullmatch(text):
        raise _refusal(path, f"the text {text[:80]!r}")


def _refuse_object(text: str, path: Path, field: str) -> None:
    raise _refusal(path, f"an object of the class {text!r}")


_CHECKS: dict[str, Callable[[str, Path, str], None]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "as_string": _check_plain_text,
    "as_strings": _check_plain_text,
    "torch_version": _check_plain_text,
    "verifiers": _check_plain_text,
    "class_fqn": _refuse_object,
    "metadata": lambda text, path, field: None,
}


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make every `torch.load` inside use the restricted unpickler, even where it is told not to.

    torch reads these variables at each load, and the first wins over `weights_only=False`. While
    they are set, loads in other threads are restricted as well.
    """
    force, unforce = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    log = logging.getLogger("torch.export")
    with _ENVIRONMENT:
        before = {name: os.environ.pop(name, None) for name in (force, unforce)}
        level = log.level
        os.environ[force] = "1"
        log.setLevel(logging.CRITICAL)  # its warnings repeat, at length, the error that follows
        try:
            yield
        finally:
            log.setLevel(level)
            os.environ.pop(force)
            os.environ.update({name: value for name, value in before.items() if value is not None})


def _refusal(path: Path, what: str) -> UntrustedPickleError:
    return UntrustedPickleError(
        f"{path} holds {what}, which could run code when loaded; layermend opens only graphs of "
        "torch's own operators with plain tensors: save a state dict instead, or export again with "
        "torch.export.save"
    )


def _unreadable(path: Path, error: Exception) -> NetworkError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:160] if lines else type(error).__name__
    return NetworkError(
        f"{path} is no exported program that torch {torch.__version__} can read ({reason}); "
        "it may be truncated or from another version: export it again with torch.export.save"
    )
