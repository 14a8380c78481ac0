"""Linear repairs: how much of the error each layer could remove, all layers from one pass.

To first order a change of a layer's weights moves the margin of each image (`error_margins`) by the
product of the change with the gradient of that margin. The change that removes most cross entropy
is then a logistic regression on those gradients, and what it does to images that took no part is
known without a step having been taken. Every layer's regression comes from one forward and one
backward pass over the images, where a trial repair (`audit.trials`) takes several for each layer.

Small changes are judged well, as a shortcut learned by one layer takes them; a layer that was
damaged beyond first order is not, and is found by its drift or by its trial.

Source: the neural tangent kernel of one layer, Jacot et al. 2018; its logistic regression by
Newton steps, Rasmussen and Williams 2006, algorithm 3.1. Gradients are shortened by a count
sketch, Charikar et al. 2002, which keeps their products but for a noise of 1 / sqrt(width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.image_gradients import margin_gradients
from audit.networks.layers import Layer
from audit.networks.program import Program
from audit.statistics import Interval
from audit.trials import error_share_removed

__all__ = ["LinearConfig", "LinearRepair", "linear_repairs", "repaired_margins"]

NEWTON_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How linear repairs are made.

    Attributes:
        ridge: Weight of the squared change, in units of an image's mean squared gradient: the
            larger, the smaller the change.
        folds: Each image is judged by the regression of the folds that it is not in.
        width: Values that stand for a gradient.
        batch_size: Images a pass.
    """

    ridge: float = 1e-3
    folds: int = 4
    width: int = 1024
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class LinearRepair:
    """What the linear repair of one layer does to images that took no part in it.

    Attributes:
        gain: Share of their cross entropy that it removes, with its bootstrap interval.
        margins_before: Per image, (N,).
        margins_after: The same after the repair, (N,).
    """

    layer: Layer
    gain: Interval
    margins_before: np.ndarray
    margins_after: np.ndarray


def linear_repairs(
    program: Program,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[Layer],
    config: LinearConfig,
    *,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[LinearRepair]:
    """Return one linear repair per layer, in the order of the layers.

    Args:
        batches: Normalized images (B, 3, H, W) with labels (B,), on the program's device.
        seed: Of the folds, the sketch and the bootstrap.
        on_batch: Called after each batch with its number of images.
    """
    names = [layer.name for layer in layers]
    sketches: dict[str, list[Tensor]] = {name: [] for name in names}
    signs: dict[str, Tensor] = {}
    margins: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for images, labels in batches:
        found, gradients = margin_gradients(program, images, labels, names)
        margins.append(found.double().cpu())
        for name, rows in gradients:
            if name not in signs:
                drawn = torch.randint(2, (rows.shape[1],), generator=generator)
                signs[name] = (2 * drawn - 1).to(rows)
            sketches[name].append(_sketch(rows, signs[name], config.width).double().cpu())
        if on_batch is not None:
            on_batch(len(images))
    before = torch.cat(margins)
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(before)) % config.folds)
    repairs = []
    for layer in layers:
        features = torch.cat(sketches[layer.name])
        after = repaired_margins(features @ features.mT, before, fold, config.ridge)
        gain = error_share_removed(
            F.softplus(-before).numpy(), F.softplus(-after).numpy(), seed=seed
        )
        repairs.append(
            LinearRepair(
                layer=layer, gain=gain, margins_before=before.numpy(), margins_after=after.numpy()
            )
        )
    return repairs


def repaired_margins(products: Tensor, margins: Tensor, fold: Tensor, ridge: float) -> Tensor:
    """Return each image's margin after the repair that the other folds' images teach, (N,).

    Args:
        products: Products of the images' gradients, (N, N), float64.
        margins: Before, (N,), float64.
        fold: Of each image, (N,), integers.
        ridge: As in `LinearConfig`.
    """
    scale = ridge * products.diagonal().mean().clamp(min=1e-300)
    covariance = products / scale
    after = margins.clone()
    for held_out in range(int(fold.max()) + 1):
        taught, judged = fold != held_out, fold == held_out
        pull = _pull(covariance[taught][:, taught], margins[taught])
        after[judged] += covariance[judged][:, taught] @ pull
    return after


def _pull(covariance: Tensor, margins: Tensor) -> Tensor:
    """Return how hard each image pulls, (M,): the change of margins is covariance @ pull.

    The mode of a logistic model whose latent values have these margins as their mean.
    """
    change = torch.zeros_like(margins)
    pull = torch.zeros_like(margins)
    identity = torch.eye(len(margins), dtype=margins.dtype)
    loss = float(F.softplus(-margins).sum())
    for _ in range(NEWTON_STEPS):
        error = torch.sigmoid(-(margins + change))
        root = (error * (1 - error)).clamp(min=1e-12).sqrt()
        target = root**2 * change + error
        system = identity + root[:, None] * covariance * root
        solved = torch.linalg.solve(system, root * (covariance @ target))
        wanted = target - root * solved
        size = 1.0
        for _ in range(20):  # a full step can overshoot where margins are large
            tried = pull + size * (wanted - pull)
            moved = covariance @ tried
            tried_loss = float(F.softplus(-(margins + moved)).sum() + tried @ moved / 2)
            if tried_loss <= loss:
                break
            size /= 2
        else:
            break
        gained, loss = loss - tried_loss, tried_loss
        pull, change = tried, moved
        if gained < 1e-6 * max(loss, 1e-12):
            break
    return pull


def _sketch(rows: Tensor, signs: Tensor, width: int) -> Tensor:
    """Return (B, width) sums of values under random signs; (B, P) as it is where P is smaller."""
    if rows.shape[1] <= width:
        return rows
    padded = F.pad(rows * signs, (0, -rows.shape[1] % width))
    return padded.reshape(len(rows), -1, width).sum(dim=1)
