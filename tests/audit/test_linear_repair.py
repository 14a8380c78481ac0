"""Linear repairs equal what a general optimizer finds, and what a layer can really do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from audit.image_gradients import margin_gradients
from audit.linear_repair import LinearConfig, _sketch, linear_repairs, repaired_margins
from audit.networks.program import Program


def drawn(images: int = 40, values: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, P), margins (N,) that the features explain in part, folds (N,)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, values, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, generator=generator, dtype=torch.float64)
    return features, 2 * features[:, 0] + noise, torch.arange(images) % 4


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 10.0])
def test_the_regression_is_the_one_that_a_general_optimizer_finds(ridge: float) -> None:
    features, margins, fold = drawn()
    found = repaired_margins(features @ features.T, margins, fold, ridge)
    weight = ridge * float((features**2).sum(dim=1).mean())
    for held_out in range(4):
        x, m = features[fold != held_out].numpy(), margins[fold != held_out].numpy()

        def loss(change: np.ndarray, x: np.ndarray = x, m: np.ndarray = m) -> float:
            penalty = weight / 2 * float(change @ change)
            return float(np.logaddexp(0, -(m + x @ change)).sum()) + penalty

        change = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-9}).x
        judged = fold == held_out
        expected = margins[judged] + features[judged] @ torch.from_numpy(change)
        torch.testing.assert_close(found[judged], expected, atol=2e-4, rtol=1e-4)


def test_no_image_teaches_its_own_repair() -> None:
    features, margins, fold = drawn()
    products = features @ features.T
    before = repaired_margins(products, margins, fold, 1e-2)
    changed = margins.clone()
    changed[fold == 1] -= 3
    after = repaired_margins(products, changed, fold, 1e-2)
    torch.testing.assert_close(after[fold == 1], before[fold == 1] - 3)
    assert not torch.allclose(after[fold == 0], before[fold == 0])


def test_huge_margins_and_a_layer_without_gradient_do_no_harm() -> None:
    features, margins, fold = drawn()
    for scale in (0.0, 1e-12, 1e6):
        products = scale * (features @ features.T)
        found = repaired_margins(products, margins * 100, fold, 1e-3)
        assert found.isfinite().all()
    unmoved = repaired_margins(torch.zeros(40, 40, dtype=torch.float64), margins, fold, 1e-3)
    torch.testing.assert_close(unmoved, margins)


class TwoHeads(nn.Module):
    """A sound convolution, and a head whose weights had their sign turned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(images)).mean(dim=(2, 3)))


def test_a_head_that_is_linear_is_repaired_as_far_as_the_regression_says() -> None:
    """With two classes the margin is linear in the head: the promise must be kept to the digit."""
    torch.manual_seed(0)
    module = TwoHeads().double()
    images = torch.randn(48, 3, 8, 8, dtype=torch.float64)
    labels = (images[:, 0].mean(dim=(1, 2)) > 0).long()
    program = Program.capture(module, (8, 8))
    fc = program.layer("fc")
    batches = list(zip(images.split(20), labels.split(20), strict=True))
    (repair,) = linear_repairs(program, batches, [fc], LinearConfig(ridge=1e-4), seed=0)
    hidden = F.relu(module.conv(images)).mean(dim=(2, 3)).detach()
    sides = (2 * labels - 1).double()
    logits = module(images).detach()
    margins = sides * (logits[:, 1] - logits[:, 0])
    np.testing.assert_allclose(repair.margins_before, margins.numpy(), atol=1e-12)
    # By hand: d margin / d weight of class k is +-hidden, by bias +-1.
    by_class = torch.cat([hidden, torch.ones(48, 1, dtype=torch.float64)], dim=1)
    products = 2 * (sides[:, None] * by_class) @ (sides[:, None] * by_class).T
    fold = torch.from_numpy(np.random.default_rng(0).permutation(48) % 4)
    expected = repaired_margins(products, margins, fold, 1e-4)
    np.testing.assert_allclose(repair.margins_after, expected.numpy(), atol=1e-8)
    error = F.softplus(-expected).sum() / F.softplus(-margins).sum()
    assert repair.gain.value == pytest.approx(1 - float(error))
    assert repair.gain.value > 0.3  # the head can undo it
    assert repair.gain.low < repair.gain.value < repair.gain.high


def test_batches_do_not_matter() -> None:
    torch.manual_seed(0)
    program = Program.capture(TwoHeads().double(), (8, 8))
    images, labels = torch.randn(24, 3, 8, 8, dtype=torch.float64), torch.arange(24) % 2
    layers = list(program.layers)
    config = LinearConfig(width=16)
    whole, parts = (
        linear_repairs(
            program,
            zip(images.split(size), labels.split(size), strict=True),
            layers,
            config,
            seed=3,
        )
        for size in (24, 5)
    )
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.margins_after, other.margins_after, atol=1e-9)


def test_a_sketch_keeps_products_and_short_gradients_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 5001, generator=generator, dtype=torch.float64)
    rows[1] = rows[0] + 0.1 * rows[1]
    signs = (2 * torch.randint(2, (5001,), generator=generator) - 1).double()
    sketch = _sketch(rows, signs, 1024)
    assert sketch.shape == (12, 1024)
    norms = rows.norm(dim=1)
    error = (sketch @ sketch.T - rows @ rows.T) / torch.outer(norms, norms)
    assert float(error.abs().max()) < 5 / 1024**0.5
    assert float(error.square().mean().sqrt()) > 0.2 / 1024**0.5  # it is one, not a copy
    assert torch.equal(_sketch(rows[:, :1000], signs[:1000], 1024), rows[:, :1000])


def test_margins_come_with_the_gradients() -> None:
    torch.manual_seed(0)
    program = Program.capture(TwoHeads(), (8, 8))
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1])
    margins, _ = margin_gradients(program, images, labels, ["fc"])
    expected = F.cross_entropy(program.logits(images), labels, reduction="none")
    torch.testing.assert_close(F.softplus(-margins), expected)
