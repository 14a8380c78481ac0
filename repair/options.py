"""Options that several `repair` commands have. No torch here, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from audit.errors import UsageError
from repair.config import AUTO, OPTIMIZERS, SALIENCIES, SCHEDULES
from repair.losses import LOSSES, SCALES

__all__ = [
    "AnyLayerOption",
    "AnyRateOption",
    "BalanceOption",
    "BatchSizeOption",
    "DataOption",
    "DeviceOption",
    "EpochsOption",
    "GroupOption",
    "LayerOption",
    "LossOption",
    "MasksOption",
    "ModelOption",
    "NoR1Option",
    "NoR2Option",
    "OptimizerOption",
    "RateOption",
    "RunOption",
    "SaliencyOption",
    "ScaleOption",
    "ScheduleOption",
    "TrainOption",
    "WeightOption",
    "is_stated",
    "parse_rate",
    "stated_settings",
]

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        "--run-folder",  # torchrun takes --run for an option of its own, wherever it stands
        help="Run folder; the newest under ./runs by default.",
        metavar="RUN",
    ),
]
DataOption = Annotated[
    Path | None, typer.Option(help="Where the run's images are now, if they have moved.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Where the run's model is now, if it has moved.", metavar="MODEL"),
]
LayerOption = Annotated[
    str | None,
    typer.Option(help="Module path or alias; the flagged layer by default.", metavar="LAYER"),
]
AnyLayerOption = Annotated[
    str | None,
    typer.Option(
        help="Module path or alias; auto: of those that the scan blames the one whose short repair "
        "does most. By default the flagged layer.",
        metavar="LAYER|auto",
    ),
]
TrainOption = Annotated[
    Path | None,
    typer.Option(help="Image folder that adds to the training images.", metavar="DIR"),
]
MasksOption = Annotated[
    Path | None,
    typer.Option(
        help="Where the objects are, a folder of masks or COCO JSON; the scan's by default.",
        metavar="PATH",
    ),
]
GroupOption = Annotated[
    str | None,
    typer.Option(help="Error group of the scan whose region maps must leave.", metavar="ID"),
]
DeviceOption = Annotated[str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda")]

LossOption = Annotated[str, typer.Option(help="What to minimize.", metavar="|".join(LOSSES))]
SaliencyOption = Annotated[
    str, typer.Option(help="Whose maps to penalize.", metavar="|".join(SALIENCIES))
]
ScaleOption = Annotated[
    str, typer.Option(help="How the penalty is kept in bounds.", metavar="|".join(SCALES))
]
NoR1Option = Annotated[bool, typer.Option("--no-r1", help="Leave out R1 = CE (1 - S).")]
NoR2Option = Annotated[bool, typer.Option("--no-r2", help="Leave out R2 = S (1 - CE).")]
BalanceOption = Annotated[float, typer.Option("--lambda", help="The lambda of Eq. 7, 0 to 1.")]
WeightOption = Annotated[float, typer.Option(help="Of what energy and rrr add to cross entropy.")]
RateOption = Annotated[float, typer.Option("--lr", help="Learning rate.")]
AnyRateOption = Annotated[
    str,
    typer.Option(
        "--lr",
        help="Learning rate; auto: of several the one that does best in two epochs.",
        metavar="RATE|auto",
    ),
]
ScheduleOption = Annotated[
    str, typer.Option(help="How the learning rate goes on.", metavar="|".join(SCHEDULES))
]
EpochsOption = Annotated[int, typer.Option(help="Passes over the images.")]
BatchSizeOption = Annotated[int, typer.Option(help="Images per step.")]
OptimizerOption = Annotated[
    str, typer.Option(help="SGD with momentum 0.9, or AdamW.", metavar="|".join(OPTIMIZERS))
]

_OPTIONS = {"r1": ("no_r1",), "r2": ("no_r2",), "controls": ("controls", "no_controls")}


def parse_rate(text: str, option: str = "--lr") -> float | Literal["auto"]:
    """Return the number that an option was given, or `auto`.

    Raises:
        UsageError: It is neither.
    """
    if text == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{option} is {text!r}; expected a number above 0, or auto") from error


def stated_settings(context: typer.Context, settings: Iterable[str]) -> list[str]:
    """Return the settings that stand on the command line itself."""
    return [
        name
        for name in settings
        if any(is_stated(context, option) for option in _OPTIONS.get(name, (name,)))
    ]


def is_stated(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"
