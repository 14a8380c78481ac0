"""Architectures by name: built without weights, or with the registry's own pretrained weights.

    torchvision:vgg16     torchvision's classification models
    timm:resnet18         timm's models (pip install 'layermend[timm]')
    layermend:vgg         the small VGG of `audit demo`
    vgg16                 the first of torchvision and timm that has it

Each registry also knows the usual preprocessing of its models, which stands in where no card does.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from torch import nn

from audit.errors import NetworkError
from audit.networks import imagenet
from audit.networks.card import Interpolation, Preprocessing

REGISTRIES = ("torchvision", "timm", "layermend")

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_PLAIN = Preprocessing(
    input_size=(224, 224),
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    interpolation="bilinear",
    crop=0.875,
)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A registry's model with its published weights, classes and preprocessing."""

    module: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    weights: str


def build(arch: str, arch_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the architecture with random weights, in eval mode; nothing is downloaded.

    Args:
        arch: `registry:name`, or a bare name.
        arch_args: Keyword arguments of the registry's constructor, such as `num_classes`.

    Raises:
        NetworkError: the name is unknown (the message has the closest ones), the registry is not
            installed, or it does not take these arguments.
    """
    registry, name = resolve(arch)
    arguments = dict(arch_args or {})
    try:
        with warnings.catch_warnings():
            # googlenet and inception_v3 warn that random initialization is slow.
            warnings.simplefilter("ignore", FutureWarning)
            return _BUILDERS[registry](name, arguments).eval()
    except NetworkError:
        raise
    except Exception as error:  # constructors of many hands raise whatever they like
        raise NetworkError(
            f"{registry}:{name} cannot be built with the arguments {arguments}: {_first(error)}"
        ) from error


def pretrained(arch: str) -> Pretrained:
    """Return a registry's model with its published weights, downloaded by that registry.

    Raises:
        NetworkError: as `build`; also where there are no weights or the download failed.
    """
    registry, name = resolve(arch)
    if registry == "torchvision":
        return _torchvision_pretrained(name)
    if registry == "timm":
        return _timm_pretrained(name)
    raise NetworkError(f"{registry}:{name} has no published weights; give a file of weights")


def preprocessing_of(arch: str) -> Preprocessing:
    """Return the preprocessing that the registry's weights of this architecture expect."""
    registry, name = resolve(arch)
    if registry == "torchvision":
        weights = _torchvision_weights(name)
        return _torchvision_preprocessing(weights) if weights is not None else _PLAIN
    if registry == "timm":
        return _timm_preprocessing(_timm().get_pretrained_cfg(name))
    return _PLAIN


def resolve(arch: str) -> tuple[str, str]:
    """Return registry and name; a bare name is looked up in torchvision, then in timm.

    Raises:
        NetworkError: no such registry or name; the message has the closest ones.
    """
    registry, colon, name = arch.partition(":")
    if not colon:
        registry, name = "", arch
    elif registry not in REGISTRIES:
        raise NetworkError(
            f"no registry {registry!r} in {arch!r}; expected {', '.join(REGISTRIES)}"
        )
    if registry:
        known = _known(registry)
        if name in known:
            return registry, name
        raise NetworkError(f"no architecture {name!r} in {registry}{_closest(name, known)}")
    tried = [entry for entry in ("torchvision", "timm") if entry != "timm" or _has_timm()]
    for candidate in tried:
        if name in _known(candidate):
            return candidate, name
    everything = {entry for candidate in tried for entry in _known(candidate)}
    raise NetworkError(
        f"no architecture {name!r} in {' or '.join(tried)}{_closest(name, everything)}"
    )


def _known(registry: str) -> set[str]:
    if registry == "torchvision":
        models = _torchvision_models()
        return set(models.list_models(module=models))
    if registry == "timm":
        return set(_timm().list_models())
    return {"vgg"}


def _closest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.lower(), sorted(known), n=3, cutoff=0.5)
    return f"; closest: {', '.join(close)}" if close else ""


def _build_torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        # Without weights these two grow auxiliary heads that pretrained checkpoints lack.
        arguments = {"aux_logits": False, "init_weights": False, **arguments}
    return cast(nn.Module, _torchvision_models().get_model(name, weights=None, **arguments))


def _build_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    return cast(nn.Module, _timm().create_model(name, **arguments, pretrained=False))


def _build_own(name: str, arguments: dict[str, Any]) -> nn.Module:
    from audit.networks.small_vgg import SmallVGG

    arguments = dict(arguments)
    if "num_classes" in arguments:  # the name that the registries give it
        arguments.setdefault("classes", arguments.pop("num_classes"))
    return SmallVGG(**arguments)


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _build_torchvision,
    "timm": _build_timm,
    "layermend": _build_own,
}


def _torchvision_models() -> Any:
    from audit.networks.torchvision_import import import_torchvision

    import_torchvision()
    import torchvision.models

    return torchvision.models


def _torchvision_weights(name: str) -> Any:
    return getattr(_torchvision_models().get_model_weights(name), "DEFAULT", None)


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    transform = weights.transforms()
    crop = transform.crop_size[0]
    return Preprocessing(
        input_size=(crop, crop),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=_interpolation(transform.interpolation.value),
        crop=min(1.0, crop / transform.resize_size[0]),
    )


def _torchvision_pretrained(name: str) -> Pretrained:
    weights = _torchvision_weights(name)
    if weights is None:
        raise NetworkError(f"torchvision has no weights for {name!r}; give a file of weights")
    try:
        module = _torchvision_models().get_model(name, weights=weights)
    except Exception as error:
        raise _download_failed(f"torchvision:{name}", error) from error
    categories = tuple(weights.meta["categories"])
    return Pretrained(
        module=module.eval(),
        classes=imagenet.names() if len(categories) == 1000 else categories,
        preprocessing=_torchvision_preprocessing(weights),
        weights=str(weights),
    )


def _has_timm() -> bool:
    try:
        _timm()
    except NetworkError:
        return False
    return True


def _timm() -> ModuleType:
    from audit.networks.torchvision_import import import_torchvision

    import_torchvision()  # timm imports it
    try:
        import timm
    except ImportError as error:
        raise NetworkError(
            "timm models need the package timm, which is not installed; "
            "run: pip install 'layermend[timm]'"
        ) from error
    return timm


def _timm_preprocessing(config: Any) -> Preprocessing:
    if config is None:
        return _PLAIN
    _, height, width = config.input_size
    return Preprocessing(
        input_size=(height, width),
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=_interpolation(config.interpolation),
        crop=config.crop_pct,
    )


def _timm_pretrained(name: str) -> Pretrained:
    timm = _timm()
    if not timm.is_model_pretrained(name):
        raise NetworkError(f"timm has no weights for {name!r}; give a file of weights")
    try:
        module = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise _download_failed(f"timm:{name}", error) from error
    config = timm.get_pretrained_cfg(name)
    return Pretrained(
        module=module.eval(),
        classes=_timm_classes(config),
        preprocessing=_timm_preprocessing(config),
        weights=config.hf_hub_id or config.url or name,
    )


def _timm_classes(config: Any) -> tuple[str, ...]:
    if config.label_names:
        return tuple(config.label_names)
    return imagenet.names() if config.num_classes == 1000 else ()


def _interpolation(name: str) -> Interpolation:
    known: dict[str, Interpolation] = {
        "nearest": "nearest",
        "nearest-exact": "nearest",
        "bilinear": "bilinear",
        "bicubic": "bicubic",
        "lanczos": "lanczos",
    }
    return known.get(name, "bilinear")


def _download_failed(arch: str, error: Exception) -> NetworkError:
    return NetworkError(
        f"the weights of {arch} could not be downloaded ({_first(error)}); connect this machine, "
        f"or fetch the weights elsewhere and give the file with --arch {arch}"
    )


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
