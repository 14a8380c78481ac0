"""The penalty against loops written from the paper, finite differences and its own algebra."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repair.losses import LOSSES, SCALES, LossTerms, Penalty, Scale, trust_terms

BATCH, CLASSES, SIDE = 6, 5, 4


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64)
    maps = 4 * torch.randn(BATCH, SIDE, SIDE, generator=generator, dtype=torch.float64).relu()
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return logits, maps, labels


def slow_trust(
    logits: list[float], rows: list[list[float]], label: int, penalty: Penalty
) -> dict[str, float]:
    """One image, plain Python, written from Eq. 4-7."""
    total = sum(math.exp(value) for value in logits)
    p_true = math.exp(logits[label]) / total
    pixels = [pixel for row in rows for pixel in row]
    if penalty.scale == "bounded":
        peak = max(pixels)
        s = sum(pixel / peak for pixel in pixels) / len(pixels)
        fit, error = -math.log(p_true), 1 - p_true
    else:
        s = sum(pixels) / len(pixels) / len(logits)
        fit = error = -math.log(p_true) / len(logits)
    r1 = error * (1 - s) if penalty.r1 else 0.0
    r2 = s * (1 - error) if penalty.r2 else 0.0
    loss = penalty.balance * fit + (1 - penalty.balance) * s + r1 + r2
    return {"loss": loss, "cross_entropy": -math.log(p_true), "saliency": s, "r1": r1, "r2": r2}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("r1", [True, False])
@pytest.mark.parametrize("r2", [True, False])
@pytest.mark.parametrize("balance", [0.0, 0.5, 0.9, 1.0])
def test_trust_equals_a_slow_loop_over_images(
    scale: Scale, r1: bool, r2: bool, balance: float
) -> None:
    logits, maps, labels = random_case()
    penalty = Penalty(balance=balance, scale=scale, r1=r1, r2=r2)
    terms = trust_terms(logits, maps, labels, penalty)
    for i in range(BATCH):
        expected = slow_trust(logits[i].tolist(), maps[i].tolist(), int(labels[i]), penalty)
        for name, value in expected.items():
            assert getattr(terms, name)[i].item() == pytest.approx(value, rel=1e-12, abs=1e-13)


def test_ce_is_torchs_cross_entropy_and_looks_at_no_map() -> None:
    logits, _, labels = random_case()
    terms = LOSSES["ce"].terms(logits, None, labels, Penalty())
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=0)
    assert terms.saliency is None and terms.r1 is None and terms.r2 is None


def test_trust_without_maps_is_refused() -> None:
    logits, _, labels = random_case()
    with pytest.raises(ValueError, match="needs the maps"):
        trust_terms(logits, None, labels, Penalty())


@pytest.mark.parametrize("balance", [-0.1, 1.1, math.nan])
def test_lambda_outside_zero_to_one_is_refused(balance: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Penalty(balance=balance)


def scaled_parts(terms: LossTerms) -> tuple[Tensor, Tensor]:
    assert terms.saliency is not None
    return terms.cross_entropy / CLASSES, terms.saliency


def test_trust_follows_the_expanded_algebra() -> None:
    logits, maps, labels = random_case()
    balance = 0.7
    terms = trust_terms(logits, maps, labels, Penalty(balance=balance, scale="classes"))
    ce, s = scaled_parts(terms)
    expected = (1 + balance) * ce + (2 - balance) * s - 2 * s * ce
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=0)


def slope_in_saliency(cross_entropy: float, balance: float, scale: Scale) -> float:
    """Return the sign-carrying dL/d(map) for one image whose cross entropy is given."""
    p_true = math.exp(-cross_entropy)
    logits = torch.tensor([[p_true, 1 - p_true]], dtype=torch.float64).log()
    maps = torch.full((1, 2, 2), 0.1, dtype=torch.float64)
    maps[0, 0, 0] = 1.0  # the maximum: bounded maps are divided by it
    maps.requires_grad_()
    loss = trust_terms(logits, maps, torch.tensor([0]), Penalty(balance=balance, scale=scale)).loss
    (slope,) = torch.autograd.grad(loss.sum(), maps)
    return float(slope[0, 1, 1])


@pytest.mark.parametrize("balance", [0.5, 0.9])
def test_more_saliency_is_rewarded_beyond_the_known_cross_entropy(balance: float) -> None:
    flip = 2 * (2 - balance) / 2  # two classes: the scaled CE is half of the nats
    assert slope_in_saliency(flip - 0.01, balance, "classes") > 0
    assert slope_in_saliency(flip + 0.01, balance, "classes") < 0


@pytest.mark.parametrize("balance", [0.5, 0.9])
def test_bounded_saliency_is_rewarded_only_below_half_lambda(balance: float) -> None:
    flip = -math.log(balance / 2)
    assert slope_in_saliency(flip - 0.01, balance, "bounded") > 0
    assert slope_in_saliency(flip + 0.01, balance, "bounded") < 0


@pytest.mark.parametrize("balance", [0.5, 0.9])
def test_errors_are_rewarded_beyond_the_known_saliency(balance: float) -> None:
    flip = 2 * (1 + balance) / 2
    for saliency, rewarded in ((flip - 0.01, False), (flip + 0.01, True)):
        logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        maps = torch.full((1, 2, 2), saliency, dtype=torch.float64)
        penalty = Penalty(balance=balance, scale="classes")
        loss = trust_terms(logits, maps, torch.tensor([0]), penalty).loss
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        # More of the true class's logit means less cross entropy.
        assert (float(slope[0, 0]) > 0) is rewarded


def test_bounded_loss_never_rewards_errors_while_maps_are_half_dark() -> None:
    for p_true in (1e-6, 0.1, 0.5, 0.99):
        logits = torch.tensor([[p_true, 1 - p_true]], dtype=torch.float64).log().requires_grad_()
        maps = torch.full((1, 2, 2), 0.9, dtype=torch.float64)
        maps[0, 0, 0] = 1.0
        loss = trust_terms(logits, maps, torch.tensor([0]), Penalty(balance=0.9)).loss
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        assert slope[0, 0] < 0


def test_a_dark_map_gives_finite_loss_and_gradient() -> None:
    logits, maps, labels = random_case()
    maps = torch.zeros_like(maps).requires_grad_()
    loss = trust_terms(logits, maps, labels, Penalty(scale="bounded")).loss
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.fixture
def loss_of_weights() -> Callable[[Scale], Callable[[Tensor, Tensor], Tensor]]:
    """The mean trust loss as a function of a convolution that a smooth head follows."""
    from audit.networks.program import Program
    from audit.saliency import trainable_maps

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            features = self.second(self.first(images).tanh())
            return self.head(nn.functional.softplus(features).pow(2).mean((2, 3)))

    torch.manual_seed(0)
    program = Program.capture(Net().double().eval(), (6, 6))
    split = program.split("second")
    crossing = split.prefix(torch.rand(2, 3, 6, 6, dtype=torch.float64))
    labels = torch.tensor([0, 2])

    def of_scale(scale: Scale) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(weight: Tensor, bias: Tensor) -> Tensor:
            parameters = dict(zip(split.parameter_names, (weight, bias), strict=True))
            maps, logits = trainable_maps(split, crossing, parameters, labels)
            return trust_terms(logits, maps, labels, Penalty(scale=scale)).loss.mean()

        return loss

    of_scale.start = tuple(  # type: ignore[attr-defined]
        split.parameters[name].clone().requires_grad_() for name in split.parameter_names
    )
    return of_scale


@pytest.mark.parametrize("scale", SCALES)
def test_trust_gradients_through_the_maps_match_finite_differences(
    scale: Scale, loss_of_weights: Callable[[Scale], Callable[[Tensor, Tensor], Tensor]]
) -> None:
    start = loss_of_weights.start  # type: ignore[attr-defined]
    assert torch.autograd.gradcheck(loss_of_weights(scale), start, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss_of_weights(scale), start, fast_mode=True)
