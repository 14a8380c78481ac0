"""What a grid search is asked to do, checked once; the command line reads its choices from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from audit.errors import UsageError

RATES = (0.01, 0.1, 0.3)
BALANCES = (0.9, 0.7, 0.5)

Sampler = Literal["grid", "tpe", "random"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
Objective = Literal["accuracy", "ce"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, kw_only=True)
class GridRequest:
    """What to search, and with what at hand.

    Attributes:
        layer: Module path or alias; the layer that the scan flagged when None.
        rates: Learning rates; the ends of the range for the samplers `tpe` and `random`.
        balances: Lambdas; likewise.
        sampler: `grid` tries every pair; the others draw `trials` points.
        trials: How many points to draw.
        objective: What the best point has most of: validation `accuracy`, equal ones told apart by
            cross entropy, or least of: `ce`.
        storage: URL of an Optuna storage; a file in the run's folder when None.
        study: Its name; made from layer and settings when None.
        workers: Processes on this machine.
        data: Where the run's images are, if they have moved.
        model: Where the run's model is, if it has moved.
        train: Folder of further training images.
        masks: Folder of masks or COCO file.
        group: Error group whose region maps must leave.
        device: `auto`, `cpu` or `cuda`.
        cache_gib: Memory for what enters the layer; a quarter of what is available when None.
        command: The command line, for the record.
        trust_pickle: Let a pickled module run its code.
        code: Folder with the code of a pickled module.
    """

    layer: str | None = None
    rates: tuple[float, ...] = RATES
    balances: tuple[float, ...] = BALANCES
    sampler: Sampler = "grid"
    trials: int = 20
    objective: Objective = "accuracy"
    storage: str | None = None
    study: str | None = None
    workers: int = 1
    data: Path | None = None
    model: str | None = None
    train: Path | None = None
    masks: Path | None = None
    group: str | None = None
    device: str = "auto"
    cache_gib: float | None = None
    command: tuple[str, ...] = ()
    trust_pickle: bool = False
    code: Path | None = None

    def __post_init__(self) -> None:
        for option, values, low, high in (
            ("--lr", self.rates, 0.0, float("inf")),
            ("--lambda", self.balances, 0.0, 1.0),
        ):
            fits = all(low <= value <= high and value < float("inf") for value in values)
            if not values or not fits or (option == "--lr" and 0.0 in values):
                wanted = "numbers above 0" if option == "--lr" else "numbers from 0 to 1"
                raise UsageError(f"{option} is {_listed(values)}; expected {wanted}, as in .9,.7")
            if len(set(values)) < len(values):
                raise UsageError(f"{option} names a value twice: {_listed(values)}")
        for option, given, choices in (
            ("--sampler", self.sampler, SAMPLERS),
            ("--objective", self.objective, OBJECTIVES),
        ):
            if given not in choices:
                raise UsageError(f"{option} is {given!r}; expected one of {', '.join(choices)}")
        for option, number in (("--workers", self.workers), ("--trials", self.trials)):
            if number < 1:
                raise UsageError(f"{option} is {number}; expected at least 1")

    @property
    def points(self) -> list[dict[str, float]]:
        return [{"lr": lr, "lambda": balance} for lr in self.rates for balance in self.balances]


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values) or "empty"
