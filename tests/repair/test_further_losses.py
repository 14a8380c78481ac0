"""Losses that know where a map may lie: against loops, scikit-learn and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor, nn

from audit.networks.program import Program, Split
from audit.saliency import (
    layer_maps,
    normalize_maps,
    trainable_gradients,
    trainable_guided_maps,
    trainable_maps,
)
from repair.losses import (
    DARKEST,
    LOSSES,
    SCALES,
    Penalty,
    Scale,
    pixelwise_cross_entropy,
    share_outside,
)

BATCH, CLASSES, SIDE = 6, 5, 4


def test_whose_map_is_whose_does_not_matter_where_charges_add_up_under_one_mask() -> None:
    """Summed over a batch: what `adds_up` says, and why a control with shuffled maps is idle."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    maps = torch.rand(6, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    masks = (torch.rand(4, 5, generator=generator) > 0.5).double().expand(6, -1, -1)
    for name in WITH_MASKS:
        one, other = (
            float(LOSSES[name].terms(logits, given, labels, Penalty(), masks).loss.sum())
            for given in (maps, maps.roll(1, dims=0))
        )
        assert (abs(one - other) < 1e-9) is LOSSES[name].adds_up


WITH_MASKS = [name for name, loss in LOSSES.items() if loss.needs_masks]


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64)
    maps = 4 * torch.rand(BATCH, SIDE, SIDE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    masks = torch.rand(BATCH, SIDE, SIDE, generator=generator, dtype=torch.float64)
    masks[2] = torch.nan
    return logits, maps, labels, masks


def slow(
    name: str,
    logits: list[float],
    rows: list[list[float]],
    label: int,
    mask: list[list[float]],
    penalty: Penalty,
) -> float:
    """One image in plain Python, written from the papers."""
    p_true = math.exp(logits[label]) / sum(math.exp(value) for value in logits)
    nats = -math.log(p_true)
    pixels = [pixel for row in rows for pixel in row]
    wanted = [pixel for row in mask for pixel in row]
    missing = math.isnan(wanted[0])
    if name == "trust-masks":
        lit = [pixel / max(pixels) for pixel in pixels]
        if missing:
            s = sum(lit) / len(lit)
        elif penalty.scale == "bounded":
            pairs = zip(lit, wanted, strict=True)
            s = sum(m * (1 - x) + (1 - m) * x for x, m in pairs) / len(lit)
        else:
            kept = [min(max(x, DARKEST), 1 - DARKEST) for x in lit]
            pairs = zip(kept, wanted, strict=True)
            s = -sum(m * math.log(x) + (1 - m) * math.log(1 - x) for x, m in pairs) / len(kept)
        bounded = penalty.scale == "bounded"
        fit = nats if bounded else nats / len(logits)
        error = 1 - p_true if bounded else nats / len(logits)
        s = s if bounded else s / len(logits)
        return penalty.balance * fit + (1 - penalty.balance) * s + error * (1 - s) + s * (1 - error)
    if missing:
        return nats
    outside = sum(x * (1 - m) for x, m in zip(pixels, wanted, strict=True))
    if name == "energy" or penalty.scale == "bounded":
        outside /= sum(pixels)
    return nats + penalty.weight * outside


@pytest.mark.parametrize("name", WITH_MASKS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weight", [0.0, 0.5, 10.0])
def test_losses_with_masks_equal_a_slow_loop(name: str, scale: Scale, weight: float) -> None:
    logits, maps, labels, masks = random_case()
    penalty = Penalty(balance=0.7, scale=scale, weight=weight)
    found = LOSSES[name].terms(logits, maps, labels, penalty, masks).loss
    for i in range(BATCH):
        expected = slow(
            name, logits[i].tolist(), maps[i].tolist(), int(labels[i]), masks[i].tolist(), penalty
        )
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def test_pixelwise_cross_entropy_is_scikit_learns_log_loss_over_pixels() -> None:
    _, maps, _, _ = random_case()
    lit = normalize_maps(maps).clamp(0.01, 0.99)
    masks = (torch.rand(maps.shape, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    found = pixelwise_cross_entropy(lit, masks)
    for i in range(BATCH):
        expected = log_loss(masks[i].flatten(), lit[i].flatten(), labels=[0, 1])
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def test_an_image_without_a_mask_is_charged_as_if_there_were_none() -> None:
    logits, maps, labels, masks = random_case()
    nothing = torch.full_like(masks, torch.nan)
    for scale in SCALES:
        penalty = Penalty(scale=scale)
        unknown = LOSSES["trust-masks"].terms(logits, maps, labels, penalty, nothing).loss
        whole = normalize_maps(maps) if scale == "classes" else maps
        expected = LOSSES["trust"].terms(logits, whole, labels, penalty).loss
        torch.testing.assert_close(unknown, expected, rtol=1e-12, atol=0)
        for name in ("energy", "rrr"):
            unknown = LOSSES[name].terms(logits, maps, labels, penalty, nothing).loss
            expected = LOSSES["ce"].terms(logits, None, labels, penalty).loss
            torch.testing.assert_close(unknown, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WITH_MASKS)
def test_dark_maps_and_missing_masks_give_finite_gradients(name: str) -> None:
    logits, maps, labels, masks = random_case()
    maps = (maps * torch.tensor([0.0, 1, 1, 0, 1, 1]).view(-1, 1, 1)).requires_grad_()
    for scale in SCALES:
        loss = LOSSES[name].terms(logits, maps, labels, Penalty(scale=scale), masks).loss
        (gradient,) = torch.autograd.grad(loss.sum(), maps)
        assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", WITH_MASKS)
def test_what_a_loss_needs_is_asked_for(name: str) -> None:
    logits, maps, labels, masks = random_case()
    with pytest.raises(ValueError, match=f"the {name} loss needs"):
        LOSSES[name].terms(logits, None, labels, Penalty(), masks)
    with pytest.raises(ValueError, match=f"the {name} loss needs masks"):
        LOSSES[name].terms(logits, maps, labels, Penalty())


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_below_zero_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Penalty(weight=weight)


def test_the_share_outside_is_what_a_box_leaves() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 3.0, 1.0
    masks = torch.zeros(2, 4, 4)
    masks[:, :2, :2] = 1
    assert share_outside(maps, masks).tolist() == [0.25, 0.0]


# -------------------------------------------------------------------- what they look at


class Rectified(nn.Module):
    def __init__(self, rectifier: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)
        self.rectifier = rectifier()

    def forward(self, images: Tensor) -> Tensor:
        features = self.rectifier(self.first(images))
        features = nn.functional.max_pool2d(self.rectifier(self.second(features)), 2)
        return self.head(self.rectifier(self.third(features)).mean((2, 3)))


@pytest.fixture(params=[nn.ReLU, nn.ReLU6])
def program(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    return Program.capture(Rectified(request.param).double().eval(), (8, 8))


def pictures(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        2 * torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64),
        torch.arange(count) % 3,
    )


@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_guided_maps_in_training_are_those_that_people_look_at(
    program: Program, layer: str
) -> None:
    images, targets = pictures()
    split = program.split(layer)
    state = {name: value.clone() for name, value in program.state.items()}
    looked_at = layer_maps(program, images, targets, method="guided-gradcam")[layer]
    maps, logits = trainable_guided_maps(split, images, split.prefix(images), None, targets)
    assert looked_at.amax() > 0
    torch.testing.assert_close(maps, looked_at, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(logits, program.logits(images), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(state[name], value) for name, value in program.state.items())


def of_weight(split: Split, measure: Callable[[dict[str, Tensor]], Tensor]) -> tuple[object, ...]:
    name = split.parameter_names[0]
    start = split.parameters[name].clone().requires_grad_()
    return lambda weight: measure({**split.parameters, name: weight}), (start,)


@pytest.mark.parametrize("layer", ["second", "third"])
def test_guided_maps_differentiate_to_finite_differences(program: Program, layer: str) -> None:
    images, targets = pictures()
    split = program.split(layer)
    crossing = split.prefix(images)

    def lit(parameters: dict[str, Tensor]) -> Tensor:
        maps, _ = trainable_guided_maps(split, images, crossing, parameters, targets)
        return maps.mean(dim=(1, 2))

    function, start = of_weight(split, lit)
    assert torch.autograd.gradcheck(function, start, eps=1e-7, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("layer", ["first", "third"])
def test_squared_gradients_are_those_of_a_plain_module(layer: str) -> None:
    torch.manual_seed(0)
    module = Rectified().double().eval()
    images, _ = pictures()
    kept: list[Tensor] = []
    module.get_submodule(layer).register_forward_hook(lambda m, i, out: kept.append(out))
    log_p = module(images).log_softmax(dim=1)
    (gradient,) = torch.autograd.grad(log_p.sum(), kept[0])
    split = Program.capture(module, (8, 8)).split(layer)
    found, _ = trainable_gradients(split, split.prefix(images), None)
    torch.testing.assert_close(found, gradient.pow(2).sum(dim=1), rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("layer", ["second", "head"])
def test_squared_gradients_by_the_image_are_those_of_a_plain_module(layer: str) -> None:
    torch.manual_seed(0)
    module = Rectified().double().eval()
    images, _ = pictures()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf).log_softmax(dim=1).sum(), leaf)
    split = Program.capture(module, (8, 8)).split(layer)
    found, logits = trainable_gradients(split, split.prefix(images), None, images)
    torch.testing.assert_close(found, gradient.pow(2).sum(dim=1), rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(logits, module(images), rtol=1e-12, atol=1e-12)

    def squares(parameters: dict[str, Tensor]) -> Tensor:
        return trainable_gradients(split, (), parameters, images)[0].mean(dim=(1, 2))

    function, start = of_weight(split, squares)
    assert torch.autograd.gradcheck(function, start, eps=1e-6, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_MASKS)
@pytest.mark.parametrize("scale", SCALES)
def test_gradients_through_maps_and_masks_match_finite_differences(name: str, scale: Scale) -> None:
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            features = self.second(self.first(images).tanh())
            return self.head(nn.functional.softplus(features).pow(2).mean((2, 3)))

    torch.manual_seed(0)
    split = Program.capture(Smooth().double().eval(), (6, 6)).split("second")
    generator = torch.Generator().manual_seed(4)
    crossing = split.prefix(torch.rand(2, 3, 6, 6, generator=generator, dtype=torch.float64))
    masks = torch.rand(2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2])

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        if LOSSES[name].looks_at == "gradients":
            seen, logits = trainable_gradients(split, crossing, parameters)
        else:
            seen, logits = trainable_maps(split, crossing, parameters, labels)
        return LOSSES[name].terms(logits, seen, labels, Penalty(scale=scale), masks).loss.mean()

    function, start = of_weight(split, loss)
    assert torch.autograd.gradcheck(function, start, eps=1e-7, atol=1e-6, rtol=1e-4)
