"""Architectures by name: what is built, what never happens, what a miss says."""

import builtins
import socket
from typing import Any

import pytest
import torch

from audit.errors import NetworkError
from audit.networks import architectures
from audit.networks.torchvision_import import import_torchvision


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an architecture was looked up in the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("torchvision:resnet18", {"num_classes": 3}),
        ("timm:resnet18", {"num_classes": 3}),
        ("layermend:vgg", {"classes": 3, "widths": [4] * 5, "convolutions": [1] * 5}),
        ("layermend:vgg", {"num_classes": 3, "widths": [4] * 5, "convolutions": [1] * 5}),
    ],
)
def test_an_architecture_is_built_in_eval_mode_with_its_arguments(
    arch: str, arguments: dict[str, Any]
) -> None:
    module = architectures.build(arch, arguments)
    assert not module.training
    with torch.no_grad():
        assert module(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_bare_name_is_torchvisions_before_timms() -> None:
    assert architectures.resolve("resnet18") == ("torchvision", "resnet18")
    assert architectures.resolve("tf_efficientnet_lite0") == ("timm", "tf_efficientnet_lite0")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("torchvision:vgg61", "no architecture 'vgg61' in torchvision; closest: vgg19, vgg16"),
        ("timm:resnet81", "no architecture 'resnet81' in timm; closest: resnet18"),
        ("reznet18", "no architecture 'reznet18' in torchvision or timm; closest: resnet18"),
        ("keras:vgg16", "no registry 'keras' in 'keras:vgg16'"),
        ("layermend:vvg", "no architecture 'vvg' in layermend; closest: vgg"),
    ],
)
def test_a_miss_names_the_closest(arch: str, expected: str) -> None:
    with pytest.raises(NetworkError) as caught:
        architectures.build(arch)
    assert expected in str(caught.value)


def test_wrong_arguments_are_shown() -> None:
    with pytest.raises(NetworkError, match=r"resnet18 cannot be built .*'wdith': 2"):
        architectures.build("torchvision:resnet18", {"wdith": 2})


def test_preprocessing_is_what_the_weights_were_trained_with() -> None:
    from_torchvision = architectures.preprocessing_of("torchvision:resnet18")
    assert from_torchvision.input_size == (224, 224)
    assert from_torchvision.crop == 224 / 256
    assert from_torchvision.mean == (0.485, 0.456, 0.406)
    assert from_torchvision.interpolation == "bilinear"
    from_timm = architectures.preprocessing_of("timm:tf_efficientnet_lite0")
    assert from_timm.mean == from_timm.std == (0.5, 0.5, 0.5)
    assert from_timm.interpolation == "bicubic"
    assert from_timm.crop == 0.875


def test_no_classification_network_lacks_preprocessing() -> None:
    import_torchvision()
    from torchvision import models

    for name in models.list_models(module=models):
        assert architectures.preprocessing_of(f"torchvision:{name}").input_size[0] >= 224


def test_missing_timm_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def without_timm(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "timm":
            raise ImportError("No module named 'timm'")
        return plain_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(NetworkError, match=r"pip install 'layermend\[timm\]'"):
        architectures.build("timm:resnet18")
    with pytest.raises(NetworkError, match="in torchvision; closest"):
        architectures.build("reznet18")


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:resnet18"])
def test_a_failed_download_says_what_to_do(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = (
        architectures._timm() if arch.startswith("timm") else architectures._torchvision_models()
    )

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known\nand a second line")

    monkeypatch.setattr(registry, "create_model" if "timm" in arch else "get_model", offline)
    with pytest.raises(NetworkError) as caught:
        architectures.pretrained(arch)
    message = str(caught.value)
    assert "could not be downloaded (Name or service not known)" in message
    assert f"--arch {arch}" in message
    assert "\n" not in message


def test_published_weights_come_with_classes_and_preprocessing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = architectures._torchvision_models()
    build = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, weights: build(name, weights=None))
    found = architectures.pretrained("torchvision:resnet18")
    assert len(found.classes) == len(set(found.classes)) == 1000
    assert found.weights == "ResNet18_Weights.IMAGENET1K_V1"
    assert found.preprocessing.crop == 224 / 256
