"""The graph computes what the module computes, whole, watched and cut, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from audit.errors import LayerNotFoundError, NetworkError
from audit.networks.program import Program, Split
from audit.networks.torchvision_import import import_torchvision
from tests.audit.example_networks import CLASSES, NETWORKS, SIZE, Plain, images, labels, network

KINDS = list(NETWORKS)


def captured(name: str) -> tuple[Program, nn.Module]:
    module = network(name, torch.float64)
    return Program.capture(module, SIZE), module


@pytest.mark.parametrize("name", KINDS)
def test_the_program_gives_the_modules_logits_at_any_batch_size(name: str) -> None:
    program, module = captured(name)
    for count in (1, 2, 7):
        given = images(count, torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(program.logits(given), module(given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_prefix_then_suffix_is_the_whole_network_at_every_layer(name: str) -> None:
    program, module = captured(name)
    given = images(3, torch.float64)
    for layer in program.layers:
        split = program.split(layer.name)
        crossing = split.prefix(given)
        assert all(len(tensor) == 3 and not tensor.requires_grad for tensor in crossing)
        torch.testing.assert_close(split.suffix(crossing), module(given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("suffix", [Split.suffix, Split.folded_suffix])
@pytest.mark.parametrize("name", KINDS)
def test_changed_layer_through_the_suffix_equals_the_changed_module(
    name: str, suffix: Callable[..., Tensor]
) -> None:
    program, module = captured(name)
    given, targets = images(3, torch.float64), labels(3)
    for layer in program.layers:
        split = program.split(layer.name)
        changed = {
            key: (
                value
                + 0.1 * torch.sin(torch.arange(value.numel(), dtype=value.dtype)).view_as(value)
            )
            for key, value in split.parameters.items()
        }
        leaves = {key: value.requires_grad_() for key, value in changed.items()}
        loss = F.cross_entropy(suffix(split, split.prefix(given), leaves), targets)
        found = torch.autograd.grad(loss, list(leaves.values()))

        edited = copy.deepcopy(module)
        with torch.no_grad():
            for key, value in changed.items():
                edited.get_parameter(key).copy_(value)
        expected_loss = F.cross_entropy(edited(given), targets)
        expected = torch.autograd.grad(expected_loss, [edited.get_parameter(key) for key in leaves])
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found, tuple(expected), rtol=1e-8, atol=1e-12)


class Operations(TorchDispatchMode):
    """Writes down the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "left"), [("residual", 0), ("depthwise", 0), ("shared norm", 1)])
def test_a_folded_suffix_runs_no_batch_norm_that_follows_a_convolution(
    name: str, left: int
) -> None:
    module = SharedNorm().eval() if name == "shared norm" else network(name)
    split = (program := Program.capture(module, SIZE)).split(program.layers[0].name)
    crossing = split.prefix(images(3))
    with Operations() as plain:
        expected = split.suffix(crossing)
    with Operations() as folded:
        found = split.folded_suffix(crossing)
    assert sum("batch_norm" in operation for operation in plain.names) > left
    assert sum("batch_norm" in operation for operation in folded.names) == left
    torch.testing.assert_close(found, expected)


class SharedNorm(nn.Module):
    """The output of the second convolution is read before its batch norm, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.conv2(self.bn1(self.conv1(pixels)))
        return self.fc((hidden + self.bn2(hidden)).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", KINDS)
def test_prefixes_of_all_layers_in_one_pass_equal_each_layers_own(name: str) -> None:
    program, _ = captured(name)
    given = images(2, torch.float64)
    names = [layer.name for layer in program.layers]
    seen = []
    for layer, crossing in program.prefixes(given, names):
        assert torch.is_grad_enabled()
        seen.append(layer)
        for found, expected in zip(crossing, program.split(layer).prefix(given), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert sorted(seen) == sorted(names)


def test_several_tensors_cross_the_cut_inside_a_residual_block() -> None:
    program, _ = captured("residual")
    assert (
        len(program.split("conv1").crossing_nodes) == 2
    )  # its input, and the projection beside it
    assert len(program.split("down").crossing_nodes) == 2
    assert len(program.split("fc").crossing_nodes) == 1


def test_resnet_and_densenet_are_cut_everywhere() -> None:
    models = import_torchvision().models
    given = images(2)
    for build in (models.resnet18, models.densenet121):
        torch.manual_seed(0)
        module = build(weights=None, num_classes=4).eval()
        program = Program.capture(module, SIZE if build is models.resnet18 else (32, 32))
        batch = given if build is models.resnet18 else torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = module(batch)
            names = [layer.name for layer in program.layers][::7]
            for name, crossing in program.prefixes(batch, names):
                torch.testing.assert_close(
                    program.split(name).suffix(crossing), expected, rtol=1e-4, atol=1e-5
                )


def test_vgg16_answers_to_keras_names() -> None:
    module = import_torchvision().models.vgg16(weights=None, num_classes=3)
    program = Program.capture(module, (32, 32))
    # keras.applications.VGG16: layer names; torchvision's module paths of the same convolutions
    expected = {
        "block1_conv1": "features.0",
        "block1_conv2": "features.2",
        "block2_conv1": "features.5",
        "block3_conv3": "features.14",
        "block4_conv1": "features.17",
        "block5_conv1": "features.24",
        "block5_conv3": "features.28",
        "last_conv": "features.28",
        "fc1": "classifier.0",
        "predictions": "classifier.6",
    }
    assert {alias: program.layer(alias).name for alias in expected} == expected


def test_an_unknown_layer_names_the_closest_ones() -> None:
    program, _ = captured("plain")
    with pytest.raises(LayerNotFoundError, match=r"no layer 'block5_conv9'.*block1_conv1"):
        program.layer("block5_conv9")


def test_a_reused_layer_is_one_layer_and_lies_wholly_behind_its_cut() -> None:
    program, _ = captured("reused")
    assert [layer.name for layer in program.layers] == ["stem", "shared", "fc"]
    split = program.split("shared")
    before_first_call = split.prefix(images(2, torch.float64))
    assert len(before_first_call) == 1


def test_capturing_leaves_the_module_as_it_was() -> None:
    module = network("in-place")
    module.train()
    module.conv1.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    program = Program.capture(module, SIZE)
    program.logits(images())
    assert [part.training for part in module.modules()] == modes
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    with torch.no_grad():
        module.fc.weight.zero_()
    assert program.state["fc.weight"].abs().sum() > 0  # a copy, not a view


def test_with_state_changes_a_new_program_only() -> None:
    program, module = captured("plain")
    given = images(2, torch.float64)
    before = program.logits(given)
    weight = torch.zeros_like(program.state["conv2.weight"])
    changed = program.with_state({"conv2.weight": weight})
    assert torch.equal(program.logits(given), before)
    with torch.no_grad():
        module.conv2.weight.zero_()
    torch.testing.assert_close(changed.logits(given), module(given), rtol=1e-12, atol=1e-12)
    crossing = changed.split("fc").prefix(given)
    torch.testing.assert_close(changed.split("fc").suffix(crossing), module(given))
    with pytest.raises(NetworkError, match="cannot replace 'conv2.weight'"):
        program.with_state({"conv2.weight": torch.zeros(1)})


def test_to_exported_carries_the_programs_own_state() -> None:
    program, _ = captured("residual")
    given = images(3, torch.float64)
    changed = program.with_state({"conv1.weight": program.state["conv1.weight"] * 2})
    torch.testing.assert_close(changed.to_exported().module()(given), changed.logits(given))
    assert not torch.allclose(changed.logits(given), program.logits(given))


def test_an_exported_program_survives_its_file(tmp_path: Path) -> None:
    program, _ = captured("residual")
    torch.export.save(program.to_exported(), tmp_path / "network.pt2")
    again = Program.from_exported(torch.export.load(tmp_path / "network.pt2"))
    given = images(3, torch.float64)
    torch.testing.assert_close(again.logits(given), program.logits(given), rtol=0, atol=0)
    assert again.layers == program.layers


def test_a_fixed_batch_size_is_refused_with_the_remedy() -> None:
    fixed = torch.export.export(network("plain"), (images(2),))
    with pytest.raises(NetworkError, match=r"batches of 2 alone.*dynamic_shapes"):
        Program.from_exported(fixed)


class _ReturnsTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.inner(given)
        return logits, logits * 2


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given) if given.mean() > 0 else -self.inner(given)


@pytest.mark.parametrize(
    ("module", "message"),
    [(_ReturnsTwo(), "returns 2 outputs"), (_Branches(), "cannot be traced")],
)
def test_networks_that_do_not_fit_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        Program.capture(module, SIZE)


def test_layers_are_described_in_the_order_of_computation() -> None:
    program, module = captured("depthwise")
    assert [layer.name for layer in program.layers] == ["expand", "dw", "project", "fc"]
    depthwise = program.layer("dw")
    assert depthwise.shape == (8, 1, 3, 3)
    assert depthwise.parameters == sum(p.numel() for p in module.dw.parameters())
    assert depthwise.output_shape == (8, *SIZE)
    assert program.layer("last_conv").name == "project"
    assert not program.layer("fc").has_maps
    assert program.classes == CLASSES
