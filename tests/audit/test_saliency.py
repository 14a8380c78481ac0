"""Maps equal Captum's and a slow loop in float64, whatever the network is built of."""

from __future__ import annotations

import warnings

import pytest
import torch
from captum.attr import GuidedGradCam, LayerAttribution, LayerGradCam, Saliency
from torch import Tensor, nn

from audit import saliency
from audit.networks.program import Program
from tests.audit.example_networks import SIZE, InPlace, images, labels, network

CAPTUM_KINDS = ("plain", "residual", "depthwise", "in-place", "reused")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def for_captum(name: str, dtype: torch.dtype) -> nn.Module:
    """The network without in-place operations, which Captum's hooks cannot cope with."""
    module = network(name, dtype)
    if name != "in-place":
        return module
    plain = InPlace(inplace=False).eval().to(dtype)
    plain.load_state_dict(module.state_dict())
    return plain


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", CAPTUM_KINDS)
def test_grad_cam_of_every_layer_equals_captum(name: str, dtype: torch.dtype) -> None:
    program = Program.capture(network(name, dtype), SIZE)
    reference = for_captum(name, dtype)
    given, targets = images(4, dtype), labels(4)
    maps = saliency.layer_maps(program, given, targets)
    with_maps = [layer.name for layer in program.layers if layer.has_maps]
    assert list(maps) == with_maps
    for layer in with_maps:
        peer = LayerGradCam(reference, reference.get_submodule(layer))
        expected = peer.attribute(given, target=targets, relu_attributions=True)
        assert expected.abs().max() > 0
        assert relative_error(maps[layer], expected.squeeze(1)) <= TOLERANCES[dtype], layer


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", ["plain", "in-place", "reused"])
def test_guided_grad_cam_equals_captum(name: str, dtype: torch.dtype) -> None:
    program = Program.capture(network(name, dtype), SIZE)
    reference = for_captum(name, dtype)
    if name == "reused":  # Captum cannot guide a module that is called twice
        reference = _with_own_rectifiers(reference)
    given, targets = images(4, dtype), labels(4)
    layer = [layer.name for layer in program.layers if layer.has_maps][-1]
    cam = saliency.layer_maps(program, given, targets, layers=[layer])[layer]
    found = saliency.guided_grad_cam(cam, saliency.guided_gradients(program, given, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Captum warns of the hooks that it sets
        peer = GuidedGradCam(reference, reference.get_submodule(layer))
        expected = peer.attribute(given.clone(), target=targets, interpolate_mode="bilinear")
    assert relative_error(found, expected) <= TOLERANCES[dtype]
    maps = saliency.layer_maps(program, given, targets, layers=[layer], method="guided-gradcam")
    assert relative_error(maps[layer], expected.abs().sum(dim=1)) <= TOLERANCES[dtype]


class _ReusedUnrolled(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.stem, self.shared, self.fc = shared.stem, shared.shared, shared.fc
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.relu1(self.stem(given))
        hidden = self.relu2(self.shared(hidden))
        hidden = self.relu3(self.shared(hidden))
        return self.fc(hidden.mean(dim=(2, 3)))


def _with_own_rectifiers(module: nn.Module) -> nn.Module:
    return _ReusedUnrolled(module).eval()


@pytest.mark.parametrize("name", ["plain", "residual", "functional"])
def test_gradients_equal_captum(name: str) -> None:
    module = network(name, torch.float64)
    program = Program.capture(module, SIZE)
    given, targets = images(4, torch.float64), labels(4)
    found = saliency.layer_maps(program, given, targets, method="gradients")
    expected = Saliency(module).attribute(given.clone().requires_grad_(), target=targets)
    assert list(found) == [saliency.INPUT]
    assert relative_error(found[saliency.INPUT], expected.amax(dim=1)) <= 1e-9


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam"])
def test_formulas_equal_a_slow_loop(method: saliency.Method) -> None:
    module = network("plain", torch.float64)
    program = Program.capture(module, SIZE)
    given, targets = images(3, torch.float64), labels(3)
    found = saliency.layer_maps(program, given, targets, layers=["conv2"], method=method)["conv2"]
    for image in range(3):
        hidden = module.pool(module.relu1(module.conv1(given[image : image + 1])))
        activations = module.conv2(hidden).detach().requires_grad_()
        score = module.fc(module.flatten(module.relu2(activations)))[0, targets[image]]
        (gradients,) = torch.autograd.grad(score, activations)
        _, channels, height, width = activations.shape
        for y in range(height):
            for x in range(width):
                value = 0.0
                for channel in range(channels):
                    a, g = activations[0, channel], gradients[0, channel]
                    weight = {
                        "gradcam": g.mean(),
                        "hirescam": g[y, x],
                        "layercam": g[y, x].clamp(min=0),
                    }[method]
                    value += (weight * a[y, x]).item()
                assert abs(float(found[image, y, x]) - max(value, 0.0)) < 1e-12


def test_maps_of_a_batch_are_the_maps_of_its_images() -> None:
    program = Program.capture(network("residual", torch.float64), SIZE)
    given, targets = images(4, torch.float64), labels(4)
    together = saliency.layer_maps(program, given, targets)
    for at in range(4):
        alone = saliency.layer_maps(program, given[at : at + 1], targets[at : at + 1])
        for layer, maps in alone.items():
            torch.testing.assert_close(maps[0], together[layer][at], rtol=1e-10, atol=1e-14)


def test_trainable_maps_are_the_maps_that_people_look_at() -> None:
    program = Program.capture(network("residual", torch.float64), SIZE)
    given, targets = images(4, torch.float64), labels(4)
    looked_at = saliency.layer_maps(program, given, targets)
    for layer in ("stem", "conv1", "conv2", "down"):
        split = program.split(layer)
        maps, logits = saliency.trainable_maps(split, split.prefix(given), None, targets)
        torch.testing.assert_close(maps, looked_at[layer], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(logits, program.logits(given), rtol=1e-12, atol=1e-12)


def test_trainable_maps_differentiate_to_finite_differences() -> None:
    program = Program.capture(network("plain", torch.float64), SIZE)
    given, targets = images(2, torch.float64), labels(2)
    split = program.split("conv2")
    crossing = split.prefix(given)
    bias = split.parameters["conv2.bias"]

    def lit(values: Tensor) -> Tensor:
        weights = {**split.parameters, "conv2.bias": values}
        maps, _ = saliency.trainable_maps(split, crossing, weights, targets)
        return saliency.normalize_maps(maps).mean(dim=(1, 2))

    assert torch.autograd.gradcheck(lit, (bias.clone().requires_grad_(),), eps=1e-7, atol=1e-5)


def test_normalized_maps_lie_in_the_unit_interval_and_zero_maps_stay_zero() -> None:
    maps = torch.rand(3, 4, 5, dtype=torch.float64) * 9
    maps[1] = 0
    found = saliency.normalize_maps(maps)
    assert torch.equal(found[1], torch.zeros(4, 5, dtype=torch.float64))
    assert found[0].max() == 1 and found[2].max() == 1
    torch.testing.assert_close(found[0] * maps[0].max(), maps[0])


def test_a_layer_without_spatial_output_has_no_map() -> None:
    program = Program.capture(network("plain"), SIZE)
    with pytest.raises(ValueError, match=r"'fc' is \(4, 5\)"):
        saliency.layer_maps(program, images(), labels(), layers=["fc"])


def test_resized_maps_follow_captums_interpolation() -> None:
    maps = torch.rand(2, 4, 4)
    expected = LayerAttribution.interpolate(maps.unsqueeze(1), (16, 16), "bilinear")
    assert torch.equal(saliency.resize_maps(maps, (16, 16)), expected.squeeze(1))
