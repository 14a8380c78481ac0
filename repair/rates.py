"""The learning rate for the layer at hand: several are tried for a few epochs each.

What suits one layer wrecks another: weights before a batch norm have no scale of their own and
take hundreds of times the steps that the few weights of a first layer bear. So each rate of `RATES`
trains the layer anew for `TRIED_EPOCHS` epochs, by the loss and on the images of the repair, and
that one is taken which brings the validation cross entropy lowest. AdamW's are a tenth: its steps
have the size of the rate whatever the gradients are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from repair.config import Optimizer, RepairConfig

if TYPE_CHECKING:
    from repair.training import Trained

__all__ = ["RATES", "TRIED_EPOCHS", "best_rate", "try_rates"]

RATES: dict[Optimizer, tuple[float, ...]] = {
    "sgd": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "adamw": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
}
TRIED_EPOCHS = 2


def try_rates(
    train: Callable[[RepairConfig], Trained],
    config: RepairConfig,
    *,
    on_tried: Callable[[], None] = lambda: None,
) -> dict[float, float]:
    """Return the lowest validation cross entropy that each rate comes to, in nats.

    That of a rate that makes nothing better is the one before any step.

    Args:
        train: Trains the layer from its present weights.
        config: Settings; learning rate, schedule and patience are not read.
        on_tried: Called after each rate.
    """
    found = {}
    epochs = min(TRIED_EPOCHS, config.epochs)
    for rate in RATES[config.optimizer]:
        tried = replace(config, learning_rate=rate, schedule="constant", epochs=epochs, patience=0)
        reached = (float(row.get("val_ce", math.nan)) for row in train(tried).history)
        found[rate] = min(value for value in reached if not math.isnan(value))
        on_tried()
    return found


def best_rate(tried: dict[float, float]) -> float:
    """Return the rate with the lowest cross entropy, the lowest of equal ones."""
    return min(tried, key=lambda rate: (tried[rate], rate))
