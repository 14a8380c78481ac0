"""The command `repair grid`: parse, call `repair.grid`, print."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from audit import console
from audit.errors import UsageError
from audit.options import CodeOption, JsonOption, TrustOption
from repair.config import RepairConfig
from repair.grid_request import BALANCES, OBJECTIVES, RATES, SAMPLERS, GridRequest
from repair.options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    GroupOption,
    LayerOption,
    LossOption,
    MasksOption,
    ModelOption,
    OptimizerOption,
    RunOption,
    SaliencyOption,
    ScaleOption,
    ScheduleOption,
    TrainOption,
    WeightOption,
)

DEFAULTS = RepairConfig(controls=())


def grid_command(
    name: LayerOption = None,
    run: RunOption = None,
    rates: Annotated[
        str, typer.Option("--lr", help="Learning rates, comma separated.", metavar="LIST")
    ] = ",".join(map(str, RATES)),
    balances: Annotated[
        str, typer.Option("--lambda", help="Lambdas of Eq. 7, comma separated.", metavar="LIST")
    ] = ",".join(map(str, BALANCES)),
    loss: LossOption = DEFAULTS.loss,
    saliency: SaliencyOption = DEFAULTS.saliency,
    scale: ScaleOption = DEFAULTS.scale,
    weight: WeightOption = DEFAULTS.weight,
    epochs: EpochsOption = DEFAULTS.epochs,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    optimizer: OptimizerOption = DEFAULTS.optimizer,
    schedule: ScheduleOption = DEFAULTS.schedule,
    seed: Annotated[int, typer.Option(help="Of the order of images.")] = DEFAULTS.seed,
    sampler: Annotated[
        str,
        typer.Option(help="Every pair, or points drawn between.", metavar="|".join(SAMPLERS)),
    ] = "grid",
    trials: Annotated[int, typer.Option(help="Points that tpe and random draw.")] = 20,
    objective: Annotated[
        str,
        typer.Option(help="What is best on the validation split.", metavar="|".join(OBJECTIVES)),
    ] = "accuracy",
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage to share with other machines; a file in the run by default.",
            metavar="URL",
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Name of the study; from layer and settings by default.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    train: TrainOption = None,
    masks: MasksOption = None,
    group: GroupOption = None,
    data: DataOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    cache_gib: Annotated[
        float | None,
        typer.Option(help="Memory for what enters the layer.", min=0, metavar="GIB"),
    ] = None,
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    json: JsonOption = False,
) -> None:
    """Search learning rate and lambda for one layer, on the validation split."""
    config = RepairConfig(
        loss=loss,
        saliency=saliency,  # type: ignore[arg-type]  # checked there
        scale=scale,  # type: ignore[arg-type]
        weight=weight,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,  # type: ignore[arg-type]
        schedule=schedule,  # type: ignore[arg-type]
        seed=seed,
        controls=(),
    )
    request = GridRequest(
        layer=name,
        rates=_numbers("--lr", rates),
        balances=_numbers("--lambda", balances),
        sampler=sampler,  # type: ignore[arg-type]
        trials=trials,
        objective=objective,  # type: ignore[arg-type]
        storage=storage,
        study=study,
        workers=workers,
        data=data,
        model=model,
        train=train,
        masks=masks,
        group=group,
        device=device,
        cache_gib=cache_gib,
        command=("repair", *sys.argv[1:]),
        trust_pickle=trust_pickle,
        code=code,
    )
    from audit.runs import open_run_or_newest
    from repair.grid import search
    from repair.grid_report import grid_summary, write_plots

    grid = search(open_run_or_newest(run), config, request)
    write_plots(grid)
    if json:
        console.print_json(grid.record)
    else:
        console.stdout.print(grid_summary(grid))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(
            f"{option} is {text!r}; expected numbers between commas, as in .9,.7"
        ) from error
