"""Checkpoint files read as tensors, and nothing else: no code in them runs.

`.pt` and `.pth` go through torch's restricted unpickler; `.safetensors` holds no code at all. A
file that needs more than tensors (a whole pickled module) is refused unless the caller vouches for
it.
"""

from __future__ import annotations

import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audit.errors import NetworkError, UntrustedPickleError
from audit.networks.bombs import check_compression, check_unfolding

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
PREFIXES = ("module.", "_orig_mod.")

_FIRST_FEW = 3
_DEEPEST = 10  # wrappers around wrappers
# How torch's restricted unpickler says that it met something other than tensors.
_OBJECT_FOUND = re.compile(
    "unsupported global|module .* is blocked|can only (build|create)|trying to (load|call)"
    "|must be imported to load|legacy .tar",
    re.IGNORECASE,
)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file.

    Raises:
        NetworkError: it is damaged, or holds no tensors that a network could use.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, MemoryError) as error:
        raise NetworkError(
            f"{path} is no readable safetensors file ({_first(error)}); "
            "it may be truncated: copy or save it again"
        ) from error
    return state_dict(tensors, path)


def read_pickled(
    path: Path, *, trust_pickle: bool = False, code: Path | None = None
) -> dict[str, Tensor] | nn.Module:
    """Return the state dict, or with `trust_pickle` the module, of a `.pt` or `.pth` file.

    Args:
        path: What `torch.save` wrote.
        trust_pickle: Let a pickled object that is more than tensors run the code that builds it.
        code: Folder with the classes of the pickled module; searched for imports during the load.

    Raises:
        UntrustedPickleError: the file holds more than tensors, and `trust_pickle` is False.
        NetworkError: it is damaged, or holds neither a state dict nor a module.
    """
    _refuse_other_formats(path)
    check_compression(path)
    if not trust_pickle:
        check_unfolding(path, path)
    loaded: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # what torch deprecates in a file is no news to its user
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of damaged files raise of every kind
        if not _holds_objects(path, error):
            raise _damaged(path, error) from error
        if not trust_pickle:
            raise _untrusted(path) from None
        loaded = _load_trusted(path, code)
    if isinstance(loaded, nn.Module):
        return loaded
    if trust_pickle and isinstance(loaded, Mapping):
        for value in (loaded.get(key) for key in WRAPPERS):
            if isinstance(value, nn.Module):
                return value
    return state_dict(loaded, path)


def state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors by name, without the wrappers that training scripts put around them.

    `{"state_dict": ...}` and its like are opened, a prefix that every name carries (`module.` of
    DataParallel, `_orig_mod.` of torch.compile) is dropped.

    Raises:
        NetworkError: there is no such mapping, or a value in it is no plain tensor.
    """
    found = loaded
    for _ in range(_DEEPEST):
        if not isinstance(found, Mapping):
            break
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping):
        raise NetworkError(
            f"{path} holds a {type(found).__name__}; expected a state dict, names with tensors: "
            "save it with torch.save(model.state_dict(), path)"
        )
    if not found:
        raise NetworkError(f"{path} holds an empty state dict; expected names with tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise NetworkError(
                f"{path} holds {_name(name)} of type {type(value).__name__}; expected a state "
                "dict, names with tensors: save it with torch.save(model.state_dict(), path)"
            )
        if problem := _not_plain(value):
            raise NetworkError(
                f"{path} holds {_name(name)}, {problem}; expected plain tensors: save them with "
                "torch.save(model.state_dict(), path)"
            )
    return _without_prefixes({name: value.detach() for name, value in found.items()})


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise NetworkError where a weight is NaN or infinite; the message names the tensor."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            wrong = int((~torch.isfinite(value)).sum())
            raise NetworkError(
                f"{source} has {wrong} NaN or infinite values of {value.numel()} in {name!r}; "
                "expected finite weights: the training diverged or the file is damaged"
            )


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Fill the module with the tensors.

    Raises:
        NetworkError: names or shapes differ; the first few of each kind are listed.
    """
    own = module.state_dict()
    # Old checkpoints lack the batch counters, which do not take part in inference.
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {_shape(value)} in the file, {_shape(own[name])} in {arch}"
        for name, value in tensors.items()
        if name in own and own[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {kind} ({_few(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise NetworkError(
            f"{path} does not fit {arch}: {'; '.join(problems)}; "
            "check --arch and the arguments on the model card"
        )
    try:
        module.load_state_dict(dict(tensors), strict=False)
    except (RuntimeError, TypeError) as error:  # such as quantized numbers for exact ones
        raise NetworkError(f"{path} does not fit {arch}: {_first(error)}") from error


def _not_plain(value: Tensor) -> str | None:
    """Return what keeps a tensor from being weights, None for dense numbers in memory."""
    if value.layout != torch.strided:
        return "a sparse tensor"
    if value.is_quantized:
        return "a quantized tensor"
    if value.is_complex():
        return "a tensor of complex numbers"
    if value.device.type != "cpu":
        return f"a tensor on the device {value.device.type!r}, without values"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return (
            f"a tensor of {value.numel():,} numbers in {value.untyped_storage().nbytes():,} bytes"
        )
    return None


def _name(name: object) -> str:
    """Return a name fit for a message; objects of other kinds may print without end."""
    if isinstance(name, str):
        return repr(name[:80])
    known = isinstance(name, int) and abs(name) < 2**64
    return repr(name) if known else f"a name of type {type(name).__name__}"


def _refuse_other_formats(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise _damaged(path, error) from error
    if "constants.pkl" in names:
        raise NetworkError(
            f"{path} is a TorchScript archive, which layermend does not run; save a state dict "
            "with torch.save(model.state_dict(), path), or export the model to .pt2"
        )
    if "archive_format" in names:
        raise NetworkError(f"{path} is an exported program; rename it to {path.stem}.pt2")


def _holds_objects(path: Path, error: Exception) -> bool:
    """Whether the restricted unpickler stopped at an object, and not at damage."""
    with path.open("rb") as file:
        start = file.read(2)
    bare_pickle = start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return bare_pickle or _OBJECT_FOUND.search(str(error)) is not None


def _load_trusted(path: Path, code: Path | None) -> Any:
    folder = str(code.resolve()) if code is not None else None
    if folder is not None:
        if not Path(folder).is_dir():
            raise NetworkError(f"--code {code} is no folder; expected the one with the model code")
        sys.path.append(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # source-change warnings of an author's own classes
            return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise NetworkError(
            f"{path} needs code that is not here ({_first(error)}); "
            "give the folder that holds it with --code DIR"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error
    finally:
        if folder is not None:
            sys.path.remove(folder)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return _without_prefixes({name[len(prefix) :]: v for name, v in tensors.items()})
    return tensors


def _untrusted(path: Path) -> UntrustedPickleError:
    return UntrustedPickleError(
        f"{path} is a pickled Python object that can run any code when it is loaded; save a state "
        "dict instead with torch.save(model.state_dict(), path), or, only if you trust its author, "
        "pass --trust-pickle (and --code DIR for the folder with its classes)"
    )


def _damaged(path: Path, error: Exception) -> NetworkError:
    return NetworkError(
        f"{path} is no readable torch file ({_first(error)}); "
        "it may be truncated or something else: copy or save it again"
    )


def _shape(value: Tensor) -> str:
    return "x".join(str(size) for size in value.shape) or "scalar"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _FIRST_FEW} more" if len(names) > _FIRST_FEW else ""
    return ", ".join(name[:120] for name in names[:_FIRST_FEW]) + more


def _first(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines or lines[0].startswith("Weights only load failed"):  # torch's advice, not ours
        return type(error).__name__
    return lines[0].strip()[:160]
