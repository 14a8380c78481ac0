"""The command `repair grid`: parse, call `repair.grid`, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from audit import console
from audit.errors import UsageError
from audit.options import CodeOption, JsonOption, TrustOption
from repair.config import OPTIMIZERS, SALIENCIES, SCHEDULES, RepairConfig
from repair.grid_request import BALANCES, OBJECTIVES, RATES, SAMPLERS, GridRequest
from repair.losses import LOSSES, SCALES

DEFAULTS = RepairConfig(controls=())


def grid_command(
    name: Annotated[
        str | None,
        typer.Option(help="Module path or alias; the flagged layer by default.", metavar="LAYER"),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run folder; the newest under ./runs by default.", metavar="RUN"),
    ] = None,
    rates: Annotated[
        str, typer.Option("--lr", help="Learning rates, comma separated.", metavar="LIST")
    ] = ",".join(map(str, RATES)),
    balances: Annotated[
        str, typer.Option("--lambda", help="Lambdas of Eq. 7, comma separated.", metavar="LIST")
    ] = ",".join(map(str, BALANCES)),
    loss: Annotated[
        str, typer.Option(help="What to minimize.", metavar="|".join(LOSSES))
    ] = DEFAULTS.loss,
    saliency: Annotated[
        str, typer.Option(help="Whose maps to penalize.", metavar="|".join(SALIENCIES))
    ] = DEFAULTS.saliency,
    scale: Annotated[
        str, typer.Option(help="How the penalty is kept in bounds.", metavar="|".join(SCALES))
    ] = DEFAULTS.scale,
    weight: Annotated[
        float, typer.Option(help="Of what energy and rrr add to the cross entropy.")
    ] = DEFAULTS.weight,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = DEFAULTS.batch_size,
    optimizer: Annotated[
        str, typer.Option(help="SGD with momentum 0.9, or AdamW.", metavar="|".join(OPTIMIZERS))
    ] = DEFAULTS.optimizer,
    schedule: Annotated[
        str, typer.Option(help="How the learning rate goes on.", metavar="|".join(SCHEDULES))
    ] = DEFAULTS.schedule,
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
    train: Annotated[
        Path | None,
        typer.Option(help="Image folder that adds to the training images.", metavar="DIR"),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of masks or COCO JSON.", metavar="PATH")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Error group of the scan whose region maps must leave.", metavar="ID"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the run's images are now, if they have moved.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the run's model is now, if it has moved.", metavar="MODEL"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda")] = "auto",
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
