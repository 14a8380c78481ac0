"""Opening networks: every way in gives the same network, every wrong file one clear line."""

import json
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from audit.errors import LayerNotFoundError, NetworkError
from audit.networks import Network, architectures, imagenet, open_network
from audit.networks.card import ModelCard, Preprocessing, write_card
from audit.networks.checkpoints import read_pickled
from audit.networks.opening import read_classes

SMALL = Preprocessing(
    input_size=(32, 32),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
    interpolation="bilinear",
    crop=1.0,
)
VGG_ARGS = {"widths": [4, 4, 4, 4, 4], "convolutions": [1, 1, 1, 1, 1], "classes": 3}
VGG_CARD = ModelCard(
    arch="layermend:vgg", arch_args=VGG_ARGS, classes=("ant", "bee", "cow"), preprocessing=SMALL
)


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    torch.manual_seed(0)
    return architectures.build("layermend:vgg", VGG_ARGS)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return architectures.build("torchvision:resnet18", {"num_classes": 3})


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(tensors: Mapping[str, Any], path: Path, card: ModelCard | None = VGG_CARD) -> str:
    if path.suffix == ".safetensors":
        save_file(dict(tensors), path)
    else:
        torch.save(tensors, path)
    if card is not None:
        write_card(card, path.with_suffix(".toml"))
    return str(path)


def exported(module: nn.Module, path: Path) -> str:
    program = torch.export.export(
        module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, path)
    return str(path)


def same_logits(network: Network, module: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(network.program.logits(images), module(images))


def failure(source: str | Path, **options: Any) -> str:
    with pytest.raises(NetworkError) as caught:
        open_network(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# ------------------------------------------------------------------ what opens


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors"])
def test_a_state_dict_with_a_card_opens(
    name: str, tmp_path: Path, vgg: nn.Module, images: Tensor
) -> None:
    source = saved(vgg.state_dict(), tmp_path / name)
    network = open_network(source)
    same_logits(network, vgg, images)
    assert network.card == VGG_CARD
    assert network.source == source
    assert len(network.sha256) == 64
    assert network.layer("block5_conv1").kind == "conv2d"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"module." + name: value for name, value in state.items()},
        lambda state: {"_orig_mod.module." + name: value for name, value in state.items()},
        lambda state: {"model": {"state_dict": {"module." + n: v for n, v in state.items()}}},
    ],
)
def test_wrappers_of_training_scripts_are_opened(wrap: Any, tmp_path: Path, vgg: nn.Module) -> None:
    expected = vgg.state_dict()
    tensors = read_pickled(Path(saved(wrap(expected), tmp_path / "a.pt")))
    assert isinstance(tensors, dict)
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_the_number_of_classes_comes_from_the_checkpoint(
    tmp_path: Path, resnet: nn.Module, images: Tensor
) -> None:
    card = ModelCard(arch="resnet18", preprocessing=SMALL)
    network = open_network(saved(resnet.state_dict(), tmp_path / "a.pt", card))
    same_logits(network, resnet, images)
    assert network.card.arch == "torchvision:resnet18"
    assert network.card.arch_args == {"num_classes": 3}
    assert network.card.classes == ("0", "1", "2")


def test_arch_wins_over_the_card_and_its_arguments(tmp_path: Path, resnet: nn.Module) -> None:
    source = saved(resnet.state_dict(), tmp_path / "a.pt", VGG_CARD)
    network = open_network(source, arch="torchvision:resnet18")
    assert network.card.arch == "torchvision:resnet18"
    assert network.card.preprocessing == SMALL


def test_a_thousand_outputs_of_a_registry_network_are_imagenets(tmp_path: Path) -> None:
    module = architectures.build("torchvision:squeezenet1_1")
    source = saved(module.state_dict(), tmp_path / "a.pt", None)
    network = open_network(source, arch="torchvision:squeezenet1_1")
    assert network.card.classes == imagenet.names()
    assert network.card.preprocessing.input_size == (224, 224)


def test_an_exported_program_opens_with_and_without_a_card(
    tmp_path: Path, vgg: nn.Module, images: Tensor
) -> None:
    source = exported(vgg, tmp_path / "a.pt2")
    network = open_network(source)
    same_logits(network, vgg, images)
    assert network.card.preprocessing.input_size == (32, 32)
    assert network.card.provenance["preprocessing"].startswith("assumed")
    write_card(
        ModelCard(arch=None, classes=("a", "b", "c"), preprocessing=SMALL), tmp_path / "a.toml"
    )
    assert open_network(source).card.classes == ("a", "b", "c")


class Functional(nn.Module):
    """Operators whose arguments are texts, tuples and shape arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")
        self.gelu = nn.GELU(approximate="tanh")
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.linear = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.gelu(self.same(images))) * self.scale
        features = nn.functional.interpolate(features, scale_factor=2, mode="bilinear")
        batch, channels, height, width = features.shape
        features = torch.cat(features.reshape(batch, channels * 2, -1).chunk(2, dim=2), dim=2)
        pooled = features.reshape(-1, height * width // 2).mean(1).reshape(batch, channels * 2)
        return self.linear(pooled + torch.tensor(1.0))


def test_programs_with_shape_arithmetic_pass_the_safety_check(
    tmp_path: Path, images: Tensor
) -> None:
    module = Functional().eval()
    same_logits(open_network(exported(module, tmp_path / "a.pt2")), module, images)


def test_a_trusted_pickled_module_opens_with_its_code(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "authors_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))\n"
    )
    monkeypatch.syspath_prepend(code)
    import authors_net  # type: ignore[import-not-found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = authors_net.Net()
    module(images)
    torch.save(module.eval(), tmp_path / "a.pt")
    write_card(ModelCard(arch=None, preprocessing=SMALL), tmp_path / "a.toml")
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "authors_net")
    message = failure(tmp_path / "a.pt", trust_pickle=True)
    assert "needs code that is not here (No module named 'authors_net')" in message
    assert "--code DIR" in message
    network = open_network(str(tmp_path / "a.pt"), trust_pickle=True, code=code)
    same_logits(network, module, images)
    assert str(code) not in sys.path


def test_trust_changes_nothing_for_a_plain_state_dict(
    tmp_path: Path, vgg: nn.Module, images: Tensor
) -> None:
    source = saved(vgg.state_dict(), tmp_path / "a.pt")
    same_logits(open_network(source, trust_pickle=True), vgg, images)


def test_a_registry_name_opens_with_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = architectures.build("torchvision:squeezenet1_1")
    found = architectures.Pretrained(
        module=module, classes=imagenet.names(), preprocessing=SMALL, weights="PUBLISHED"
    )
    monkeypatch.setattr(architectures, "pretrained", lambda arch: found)
    network = open_network("torchvision:squeezenet1_1")
    assert network.card.classes[0] == "tench"
    assert network.card.provenance == {"weights": "PUBLISHED"}
    assert len(network.sha256) == 64


@pytest.mark.data
def test_real_imagenet_weights_see_what_is_in_real_photographs(
    tmp_path: Path, data_root: Path
) -> None:
    from audit.networks.torchvision_import import import_torchvision
    from benchmarks.efficientnet_lite0 import write_checkpoint

    import_torchvision()
    from torchvision import transforms

    network = open_network(str(write_checkpoint(tmp_path)))
    assert len(network.program.layers) == 50
    assert network.card.arch == "timm:tf_efficientnet_lite0"
    folders = sorted((data_root / "imagenet-sample").iterdir())[::25]
    resize = transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC)
    prepare = transforms.Compose([resize, transforms.CenterCrop(224), transforms.PILToTensor()])
    pixels = torch.stack(
        [prepare(Image.open(next(folder.iterdir())).convert("RGB")) for folder in folders]
    )
    with torch.no_grad():
        predicted = network.program.logits(network.normalize(pixels)).argmax(1)
    synsets = imagenet.synset_ids()
    right = sum(
        synsets[index] == folder.name
        for index, folder in zip(predicted.tolist(), folders, strict=True)
    )
    assert right >= 0.8 * len(folders)  # 88.3 % over all 1,000 photographs


# ------------------------------------------------------------------ the network


def test_normalize_is_the_cards_preprocessing(tmp_path: Path, vgg: nn.Module) -> None:
    network = open_network(saved(vgg.state_dict(), tmp_path / "a.pt"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = pixels.double().numpy() / 255
    for channel, (mean, std) in enumerate(zip(SMALL.mean, SMALL.std, strict=True)):
        expected[:, channel] = (expected[:, channel] - mean) / std
    normalized = network.normalize(pixels)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(
        normalized.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6
    )


def test_with_state_leaves_the_network_as_it_was(
    tmp_path: Path, vgg: nn.Module, images: Tensor
) -> None:
    network = open_network(saved(vgg.state_dict(), tmp_path / "a.pt"))
    name = network.program.split("block5_conv1").parameter_names[0]
    changed = network.with_state({name: network.program.state[name] * -3})
    same_logits(network, vgg, images)
    assert not torch.equal(changed.program.logits(images), network.program.logits(images))
    assert changed.sha256 != network.sha256
    assert changed.with_state({}).sha256 == changed.sha256
    with pytest.raises(NetworkError, match="no such entry"):
        network.with_state({"nowhere": torch.zeros(1)})


def test_a_layer_that_is_not_there_names_the_closest(tmp_path: Path, vgg: nn.Module) -> None:
    network = open_network(saved(vgg.state_dict(), tmp_path / "a.pt"))
    with pytest.raises(LayerNotFoundError, match="block5_conv1"):
        network.layer("block5_conv9")


# ------------------------------------------------------------------ what does not open


def test_a_path_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    assert failure(tmp_path / "gone.pt").startswith(f"no model file at {tmp_path / 'gone.pt'}")
    assert "torchvision:vgg16" in failure("vgg16")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.pt").touch()
    assert "is a folder; expected a model file; it holds a.pt" in failure(tmp_path / "models")
    (tmp_path / "model.h5").touch()
    assert "ends in '.h5'; expected .pt, .pth, .safetensors, .pt2" in failure(tmp_path / "model.h5")


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors", "a.pt2"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "text"])
def test_a_damaged_file_is_one_clear_line(
    name: str, damage: str, tmp_path: Path, vgg: nn.Module
) -> None:
    path = tmp_path / name
    if name.endswith("pt2"):
        exported(vgg, path)
    else:
        saved(vgg.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": data[: len(data) * 2 // 3],
            "noise": bytes(range(256)) * 8,
            "text": b"<!DOCTYPE html><title>404</title>",
        }[damage]
    )
    message = failure(path)
    assert str(path) in message
    assert ("empty" in message) if damage == "empty" else ("again" in message)


@pytest.mark.parametrize("size", range(0, 2000, 97))
def test_no_truncation_escapes_as_another_error(size: int, tmp_path: Path, vgg: nn.Module) -> None:
    for name in ("a.pt", "a.safetensors"):
        path = tmp_path / name
        saved({"w": torch.zeros(8)}, path)
        path.write_bytes(path.read_bytes()[:size])
        failure(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "holds a list; expected a state dict"),
        (torch.zeros(3), "holds a Tensor; expected a state dict"),
        ({}, "holds an empty state dict"),
        ({"a": 1.5}, "holds 'a' of type float; expected a state dict"),
        ({"state_dict": {"w": torch.zeros(1), "note": "x"}}, "holds 'note' of type str"),
        ({3: torch.zeros(1)}, "holds 3 of type Tensor"),
    ],
)
def test_what_is_no_state_dict_is_said(content: Any, expected: str, tmp_path: Path) -> None:
    assert expected in failure(saved(content, tmp_path / "a.pt"))


def test_a_state_dict_without_architecture_asks_for_it(tmp_path: Path, vgg: nn.Module) -> None:
    message = failure(saved(vgg.state_dict(), tmp_path / "a.pt", None))
    assert "--arch" in message
    assert "a.toml" in message


def test_the_wrong_architecture_lists_the_first_differences(tmp_path: Path, vgg: nn.Module) -> None:
    source = saved(vgg.state_dict(), tmp_path / "a.pt", None)
    message = failure(source, arch="torchvision:resnet18")
    assert "missing (conv1.weight, bn1.weight, bn1.bias and" in message
    assert "unexpected (" in message
    card = ModelCard(
        arch="layermend:vgg",
        arch_args={**VGG_ARGS, "widths": [4, 4, 4, 4, 5]},
        preprocessing=SMALL,
    )
    message = failure(saved(vgg.state_dict(), tmp_path / "b.pt", card))
    assert "of another shape" in message
    assert "4x4x3x3 in the file, 5x4x3x3 in layermend:vgg" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a.pt", math.nan),
        ("a.safetensors", math.inf),
        ("a.safetensors", -math.inf),
        ("a.pt2", math.nan),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str, value: float, tmp_path: Path
) -> None:
    module = architectures.build("layermend:vgg", VGG_ARGS)
    weight_name = next(name for name, _ in module.named_parameters())
    with torch.no_grad():
        module.get_parameter(weight_name).view(-1)[1] = value
    path = tmp_path / name
    source = exported(module, path) if "pt2" in name else saved(module.state_dict(), path)
    message = failure(source)
    assert f"1 NaN or infinite values of 108 in {weight_name!r}" in message


def test_a_program_with_a_fixed_batch_is_refused(tmp_path: Path, vgg: nn.Module) -> None:
    program = torch.export.export(vgg, (torch.zeros(2, 3, 32, 32),))
    torch.export.save(program, tmp_path / "a.pt2")
    assert "batch" in failure(tmp_path / "a.pt2")


def test_a_card_that_contradicts_the_program_is_refused(tmp_path: Path, vgg: nn.Module) -> None:
    source = exported(vgg, tmp_path / "a.pt2")
    larger = Preprocessing(**{**vars(SMALL), "input_size": (64, 48)})
    write_card(ModelCard(arch=None, preprocessing=larger), tmp_path / "a.toml")
    assert "exported for images of 32x32, its card says 64x48" in failure(source)


def test_the_number_of_classes_must_be_that_of_the_outputs(tmp_path: Path, vgg: nn.Module) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    source = saved(vgg.state_dict(), tmp_path / "a.pt")
    message = failure(source, classes=tmp_path / "names.txt")
    assert f"has 3 outputs, {tmp_path / 'names.txt'} names 2 classes" in message
    (tmp_path / "names.txt").write_text("elk\nfox\ngnu\n")
    assert open_network(source, classes=tmp_path / "names.txt").card.classes == (
        "elk",
        "fox",
        "gnu",
    )


@pytest.mark.parametrize("device", ["tpu9", "cuda"])
def test_a_device_that_is_not_there_is_named(device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert repr(device) in failure(tmp_path / "a.pt", device=device)


# ------------------------------------------------------------------ class files


@pytest.mark.parametrize(
    "text",
    [
        "ant\nred bee\ncow\n",
        "\ufeffant\r\nred bee\r\ncow\r\n\r\n",
        json.dumps(["ant", "red bee", "cow"]),
        json.dumps({"1": "red bee", "0": "ant", "2": "cow"}),
        json.dumps({"cow": 2, "ant": 0, "red bee": 1}),
    ],
)
def test_class_names_are_read_in_output_order(text: str, tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text(text, encoding="utf-8")
    assert read_classes(path) == ("ant", "red bee", "cow")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no class names"),
        ("ant\n\ncow", "classes[1] is ''"),
        ("ant\nant\n", "classes is 'ant'; expected a different name"),
        ('["ant", 3]', "classes[1] is 3"),
        ('{"0": "ant", "2": "cow"}', "holds no class names"),
        ('["ant"', "is not valid JSON"),
    ],
)
def test_a_file_that_is_no_list_of_names_is_said(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(NetworkError) as caught:
        read_classes(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
