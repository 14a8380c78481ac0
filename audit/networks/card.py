"""Model cards: what a network needs beside its weights, kept in a TOML file next to them.

A card names the architecture and its arguments, the classes in output order, the preprocessing,
and where the weights came from. For `photos.pt` it is `photos.toml` in the same folder, else that
folder's `MODEL.toml`:

    arch = "torchvision:vgg16"
    classes = ["cat", "dog"]

    [arch_args]
    num_classes = 2

    [preprocessing]
    input_size = [224, 224]
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
    interpolation = "bilinear"
    crop = 0.875

    [provenance]
    trained_by = "train.py"
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from audit.errors import NetworkError
from audit.files import write_text

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
SHARED_CARD = "MODEL.toml"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LARGEST_SIDE = 16_384
_INT64 = 2**63


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a photograph becomes the network's input.

    The short side is resized to round(side / crop), the center `input_size` (height, width) is cut
    out, and (pixels / 255 - mean) / std is applied per channel, RGB.

    Raises:
        NetworkError: a field has a value that cannot be meant; the message names it.
    """

    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    crop: float

    def __post_init__(self) -> None:
        # What a file holds may have any type, whatever the annotations say.
        given: dict[str, Any] = dict(vars(self))
        size = _numbers("input_size", given, 2, "two whole numbers, height and width")
        if not all(isinstance(side, int) and 1 <= side <= _LARGEST_SIDE for side in size):
            _refuse("input_size", size, f"height and width, whole numbers up to {_LARGEST_SIDE}")
        mean = _numbers("mean", given, 3, "three numbers, one per RGB channel, on a 0-1 scale")
        std = _numbers("std", given, 3, "three numbers above 0, one per RGB channel")
        if min(std) <= 0:
            _refuse("std", std, "three numbers above 0, one per RGB channel")
        if given["interpolation"] not in INTERPOLATIONS:
            _refuse("interpolation", given["interpolation"], "one of " + ", ".join(INTERPOLATIONS))
        if not _is_number(given["crop"]) or not 0 < given["crop"] <= 1:
            _refuse("crop", given["crop"], "a number above 0 and at most 1")
        object.__setattr__(self, "input_size", size)
        object.__setattr__(self, "mean", tuple(float(value) for value in mean))
        object.__setattr__(self, "std", tuple(float(value) for value in std))
        object.__setattr__(self, "crop", float(self.crop))


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a network is, beside its weights. `arch` is None for programs that carry their graph.

    `classes` holds one unique name per output, in output order; empty where nobody said.

    Raises:
        NetworkError: a field has a value that cannot be meant; the message names it.
    """

    arch: str | None
    arch_args: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What a file holds may have any type, whatever the annotations say.
        given: dict[str, Any] = dict(vars(self))
        arch = given["arch"]
        if arch is not None and not (isinstance(arch, str) and arch.strip()):
            _refuse("arch", arch, "a name such as 'torchvision:vgg16' or 'timm:resnet18'")
        for name in ("arch_args", "provenance"):
            if not isinstance(given[name], Mapping):
                _refuse(name, given[name], "a table of names and values")
        for key, value in given["provenance"].items():
            if not isinstance(key, str) or not isinstance(value, str):
                _refuse(f"provenance.{key}", value, "a text in quotes")
        if not isinstance(given["preprocessing"], Preprocessing):
            _refuse("preprocessing", given["preprocessing"], "preprocessing settings")
        object.__setattr__(self, "arch_args", _plain("arch_args", given["arch_args"]))
        object.__setattr__(self, "classes", check_class_names(given["classes"]))
        object.__setattr__(self, "provenance", dict(self.provenance))


def check_class_names(names: Any) -> tuple[str, ...]:
    """Return the names as a tuple; raises NetworkError unless they are unique, non-empty texts."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        _refuse("classes", names, "a list of names, one per output")
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            _refuse(f"classes[{position}]", name, "a non-empty name")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        _refuse("classes", twice, "a different name for each output, but this one occurs twice")
    return tuple(names)


def find_card(model_path: Path) -> Path | None:
    """Return the card that belongs to a model file: `<stem>.toml` beside it, else MODEL.toml."""
    for candidate in (model_path.with_suffix(".toml"), model_path.parent / SHARED_CARD):
        if candidate.is_file() and candidate != model_path:
            return candidate
    return None


def read_card(path: Path) -> ModelCard:
    """Return the card in a TOML file.

    Raises:
        NetworkError: the file is missing, is no TOML, or holds a field that cannot be meant; the
            message names the file, the field, what was given and what was expected.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NetworkError(f"no model card at {path}") from None
    except OSError as error:
        raise NetworkError(f"cannot read the model card {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise NetworkError(f"the model card {path} is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # numbers without end, brackets without end
        raise NetworkError(f"the model card {path} is not valid TOML: {error}") from error
    try:
        return _card_from(document)
    except NetworkError as error:
        raise NetworkError(f"{path}: {error}") from None


def write_card(card: ModelCard, path: Path) -> None:
    """Write the card as TOML, whole or not at all; `read_card` gives back an equal card."""
    document: dict[str, Any] = {} if card.arch is None else {"arch": card.arch}
    document["classes"] = list(card.classes)
    document["arch_args"] = card.arch_args
    document["preprocessing"] = {
        entry.name: getattr(card.preprocessing, entry.name) for entry in fields(Preprocessing)
    }
    document["provenance"] = card.provenance
    write_text(path, _toml(document))


def _card_from(document: Mapping[str, Any]) -> ModelCard:
    known = {entry.name for entry in fields(ModelCard)}
    _check_keys("", document, known)
    preprocessing = document.get("preprocessing")
    if not isinstance(preprocessing, Mapping):
        _refuse("preprocessing", preprocessing, "a table [preprocessing]")
    expected = [entry.name for entry in fields(Preprocessing)]
    _check_keys("preprocessing.", preprocessing, set(expected))
    absent = [name for name in expected if name not in preprocessing]
    if absent:
        raise NetworkError(f"[preprocessing] lacks {', '.join(absent)}; expected all of {expected}")
    return ModelCard(
        arch=document.get("arch"),
        arch_args=document.get("arch_args", {}),
        classes=document.get("classes", ()),
        preprocessing=Preprocessing(**preprocessing),
        provenance=document.get("provenance", {}),
    )


def _check_keys(table: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"expected {', '.join(sorted(known))}"
            )
            raise NetworkError(f"unknown field {table + key!r}; {hint}")


def _numbers(name: str, given: Mapping[str, Any], count: int, expected: str) -> tuple[Any, ...]:
    value = given[name]
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, tuple) or len(value) != count or not all(map(_is_number, value)):
        _refuse(name, value, expected)
    return value


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # Compared, not converted: TOML's whole numbers may be too large for a float.
    return -sys.float_info.max <= value <= sys.float_info.max


def _plain(name: str, value: Any) -> Any:
    """Return the value as TOML would give it back (tuples as lists), or refuse it."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                _refuse(name, key, "texts as names")
        return {key: _plain(f"{name}.{key}", entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    if isinstance(value, bool | str) or _is_number(value):
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            _refuse(name, value, "a whole number of at most 64 bits")
        return value
    _refuse(name, value, "a text, a finite number, true, false, a list or a table")


def _refuse(name: str, given: object, expected: str) -> NoReturn:
    shown = repr(given)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    raise NetworkError(f"{name} is {shown}; expected {expected}")


def _toml(table: Mapping[str, Any], parents: tuple[str, ...] = ()) -> str:
    """Return a table as TOML text: its plain values first, then its sub-tables."""
    lines = [
        f"{_toml_key(key)} = {_toml_value(value)}"
        for key, value in table.items()
        if not isinstance(value, Mapping)
    ]
    text = "".join(line + "\n" for line in lines)
    for key, value in table.items():
        if isinstance(value, Mapping):
            path = (*parents, _toml_key(key))
            text += f"\n[{'.'.join(path)}]\n{_toml(value, path)}"
    return text


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_string(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(entry) for entry in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(key)} = {_toml_value(entry)}" for key, entry in value.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)


def _toml_string(text: str) -> str:
    """Return a basic TOML string: quotes, backslashes and control characters escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    # U+0000-U+001F and U+007F may not stand raw in a basic string.
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
