"""The small VGG has the layers, the names and the arithmetic of the large one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from audit.networks.small_vgg import SmallVGG

VGG16_LAYERS = [
    *("block1_conv1", "block1_conv2", "block2_conv1", "block2_conv2"),
    *("block3_conv1", "block3_conv2", "block3_conv3"),
    *("block4_conv1", "block4_conv2", "block4_conv3"),
    *("block5_conv1", "block5_conv2", "block5_conv3"),
]


def test_layers_carry_vgg16_names_in_order_of_depth() -> None:
    network = SmallVGG(classes=10)
    convolutions = [n for n, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert convolutions == VGG16_LAYERS


def test_last_block_has_4x4_maps_for_64_pixel_images() -> None:
    network = SmallVGG(classes=10)
    shapes: list[torch.Size] = []
    handle = network.get_submodule("block5_conv3").register_forward_hook(
        lambda _module, _inputs, output: shapes.append(output.shape)
    )
    network(torch.zeros(2, 3, 64, 64))
    handle.remove()
    assert shapes == [torch.Size([2, 64, 4, 4])]


def test_logits_equal_the_network_written_out_by_hand() -> None:
    torch.manual_seed(0)
    network = SmallVGG(classes=4, widths=(2, 3), convolutions=(1, 2)).double()
    state = network.state_dict()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)

    def convolve(activations: torch.Tensor, layer: str) -> torch.Tensor:
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        return functional.conv2d(activations, weight, bias, padding=1).clamp(min=0)

    expected = functional.max_pool2d(convolve(images, "block1_conv1"), 2)
    expected = convolve(convolve(expected, "block2_conv1"), "block2_conv2").mean(dim=(2, 3))
    expected = expected @ state["predictions.weight"].T + state["predictions.bias"]
    torch.testing.assert_close(network(images), expected, rtol=1e-12, atol=1e-12)


def test_widths_and_convolutions_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="as many widths as convolutions"):
        SmallVGG(classes=10, widths=(8, 16))
