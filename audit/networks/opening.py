"""Open a network, whatever it was saved as: one `Network` from a file or a registry name.

    photos.safetensors, photos.pt, .pth    a state dict; architecture from --arch or the card
    photos.pt2                             an exported program, which carries its graph
    photos.pt, .pth                        a whole pickled module, only with trust_pickle
    torchvision:vgg16, timm:resnet18       the registry's published weights

Nothing in a file runs unless `trust_pickle` says so. What the network is beside its weights comes
from the caller, else from the card beside the file, else from what the registry knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audit.errors import NetworkError
from audit.files import sha256_file
from audit.networks import architectures, imagenet
from audit.networks.bombs import limited_building
from audit.networks.card import (
    ModelCard,
    Preprocessing,
    check_class_names,
    find_card,
    read_card,
)
from audit.networks.checkpoints import check_finite, load_into, read_pickled, read_safetensors
from audit.networks.exported import read_exported
from audit.networks.network import Network, sha256_state
from audit.networks.program import Program

SUFFIXES = (".pt", ".pth", ".safetensors", ".pt2")

_ASSUMED = Preprocessing(
    input_size=(224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
    crop=0.875,
)


def open_network(
    source: str,
    *,
    arch: str | None = None,
    classes: Path | None = None,
    trust_pickle: bool = False,
    code: Path | None = None,
    device: str = "cpu",
) -> Network:
    """Return the network that a file or a registry name stands for.

    Args:
        source: A model file, `torchvision:NAME` or `timm:NAME`.
        arch: Architecture of a state dict; wins over the card's.
        classes: File with the class names in output order: one per line, or JSON; wins over the
            card's.
        trust_pickle: Let a pickled module run the code that it needs to be built.
        code: Folder with the code of a pickled module.
        device: Where the network runs, such as 'cpu' or 'cuda'.

    Raises:
        UntrustedPickleError: opening the file would run code from it.
        NetworkError: the file, the architecture, the card and the classes do not make one network.
    """
    _check_device(device)
    names = read_classes(classes) if classes is not None else ()  # before what takes long
    if not Path(source).exists() and source.partition(":")[0] in architectures.REGISTRIES:
        return _from_registry(source, names, classes, device)
    path = _model_file(source)
    found = find_card(path)
    card = read_card(found) if found is not None else None
    if path.suffix == ".pt2":
        program, settings = _from_program(path, card, device)
    else:
        loaded = (
            read_safetensors(path)
            if path.suffix == ".safetensors"
            else read_pickled(path, trust_pickle=trust_pickle, code=code)
        )
        if isinstance(loaded, nn.Module):
            program, settings = _from_module(loaded, path, card, device)
        else:
            program, settings = _from_state(loaded, path, card, arch, device)
    return Network(
        program=program,
        card=_with_classes(settings, names, classes, program.classes, source),
        source=source,
        sha256=sha256_file(path),
    )


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the class names of a file, in output order.

    One name per line, a JSON list of names, or a JSON object of {"0": name} or {name: 0}.

    Raises:
        NetworkError: the file is missing or holds none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NetworkError(f"no file of class names at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NetworkError(f"cannot read class names from {path}: {error}") from error
    if text.lstrip()[:1] in ("[", "{"):
        try:
            names = _names_from_json(json.loads(text))
        except (ValueError, RecursionError) as error:  # numbers and brackets without end
            raise NetworkError(f"{path} is not valid JSON: {error}") from error
    else:
        names = [line.strip() for line in text.rstrip().splitlines()]
    if not names:
        raise NetworkError(
            f"{path} holds no class names; expected one per line, a JSON list, or a JSON object "
            'such as {"0": "cat", "1": "dog"}'
        )
    try:
        return check_class_names(names)
    except NetworkError as error:
        raise NetworkError(f"{path}: {error}") from None


def _names_from_json(document: Any) -> list[Any]:
    if isinstance(document, list):
        return document
    by_index = {str(key): value for key, value in document.items()}
    if by_index and all(isinstance(value, int) for value in by_index.values()):
        by_index = {str(value): key for key, value in document.items()}
    expected = [str(index) for index in range(len(by_index))]
    return [by_index[key] for key in expected] if set(expected) == set(by_index) else []


def _model_file(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise NetworkError(f"{source} is a folder; expected a model file{hint}")
    if not path.exists():
        hint = "" if path.suffix else f"; for a pretrained network write torchvision:{source}"
        raise NetworkError(f"no model file at {source}{hint}")
    if path.suffix not in SUFFIXES:
        raise NetworkError(
            f"{source} ends in {path.suffix or 'nothing'!r}; expected {', '.join(SUFFIXES)}, "
            "or a registry name such as torchvision:vgg16"
        )
    if path.stat().st_size == 0:
        raise NetworkError(f"{source} is an empty file; expected a model: save or copy it again")
    return path


def _from_registry(
    source: str, names: tuple[str, ...], classes: Path | None, device: str
) -> Network:
    found = architectures.pretrained(source)
    registry, name = architectures.resolve(source)
    program = Program.capture(found.module, found.preprocessing.input_size, device=device)
    card = ModelCard(
        arch=f"{registry}:{name}",
        classes=found.classes if len(found.classes) == program.classes else (),
        preprocessing=found.preprocessing,
        provenance={"weights": found.weights},
    )
    return Network(
        program=program,
        card=_with_classes(card, names, classes, program.classes, source),
        source=source,
        sha256=sha256_state(program.state),
    )


def _from_state(
    tensors: Mapping[str, Tensor],
    path: Path,
    card: ModelCard | None,
    arch: str | None,
    device: str,
) -> tuple[Program, ModelCard]:
    check_finite(tensors, str(path))
    arch = arch or (card.arch if card is not None else None)
    if arch is None:
        raise NetworkError(
            f"{path} holds weights only; name their architecture with --arch, such as "
            f"--arch torchvision:vgg16, or in a card {path.with_suffix('.toml').name} beside it"
        )
    # A card's arguments belong to the card's architecture.
    same = card is not None and (card.arch is None or _same(card.arch, arch))
    arguments = dict(card.arch_args) if card is not None and same else {}
    numbers = sum(value.numel() for value in tensors.values())
    with limited_building(numbers, f"{arch} with the arguments on the card"):
        module, arguments = _build_for(tensors, arch, arguments)
    load_into(module, tensors, path, arch)
    registry, name = architectures.resolve(arch)
    settings = ModelCard(
        arch=f"{registry}:{name}",
        arch_args=arguments,
        classes=card.classes if card is not None else (),
        preprocessing=(
            card.preprocessing if card is not None else architectures.preprocessing_of(arch)
        ),
        provenance=card.provenance if card is not None else {"preprocessing": f"usual for {arch}"},
    )
    program = Program.capture(module, settings.preprocessing.input_size, device=device)
    if not settings.classes and program.classes == 1000 and registry != "layermend":
        settings = replace(settings, classes=imagenet.names())
    return program, settings


def _same(one: str, other: str) -> bool:
    return architectures.resolve(one) == architectures.resolve(other)


def _build_for(
    tensors: Mapping[str, Tensor], arch: str, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the architecture with as many outputs as the checkpoint has, and its arguments."""
    module = architectures.build(arch, arguments)
    if "num_classes" in arguments or "classes" in arguments:
        return module, arguments
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    differing = [
        (own[name], tuple(value.shape))
        for name, value in tensors.items()
        if name in own and own[name] != tuple(value.shape)
    ]
    only_outputs = all(mine[1:] == theirs[1:] and theirs for mine, theirs in differing)
    counts = {theirs[0] for _, theirs in differing if theirs}
    if not only_outputs or len(counts) != 1:
        return module, arguments  # the same, or a mismatch for `load_into` to explain
    arguments = {**arguments, "num_classes": counts.pop()}
    return architectures.build(arch, arguments), arguments


def _from_module(
    module: nn.Module, path: Path, card: ModelCard | None, device: str
) -> tuple[Program, ModelCard]:
    check_finite(module.state_dict(), str(path))
    settings = card or _assumed_card(_ASSUMED)
    program = Program.capture(module.eval(), settings.preprocessing.input_size, device=device)
    return program, settings


def _from_program(path: Path, card: ModelCard | None, device: str) -> tuple[Program, ModelCard]:
    program = Program.from_exported(read_exported(path), device=device)
    check_finite(program.state, str(path))
    settings = card or _assumed_card(replace(_ASSUMED, input_size=program.input_size))
    expected = settings.preprocessing.input_size
    if expected != program.input_size:
        raise NetworkError(
            f"{path} was exported for images of {_size(program.input_size)}, its card says "
            f"{_size(expected)} (height x width); correct input_size on the card"
        )
    return program, settings


def _assumed_card(preprocessing: Preprocessing) -> ModelCard:
    return ModelCard(
        arch=None,
        preprocessing=preprocessing,
        provenance={"preprocessing": "assumed: ImageNet's mean and std, no card was found"},
    )


def _with_classes(
    card: ModelCard, names: tuple[str, ...], file: Path | None, outputs: int, source: str
) -> ModelCard:
    """Return the card with one name per output: from the file, the card, else the numbers."""
    names = names or card.classes
    if names and len(names) != outputs:
        origin = str(file) if file is not None else "its card"
        raise NetworkError(
            f"{source} has {outputs} outputs, {origin} names {len(names)} classes; "
            "expected one name per output"
        )
    return replace(card, classes=names or tuple(str(index) for index in range(outputs)))


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise NetworkError(f"no device {device!r}; expected cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise NetworkError(f"device {device!r} was asked for, but torch finds no GPU; use cpu")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
