"""The command `repair transfer`: parse, call `repair.transfer`, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from audit import console
from audit.options import CodeOption, JsonOption, TrustOption
from repair.config import RepairConfig
from repair.options import (
    BalanceOption,
    BatchSizeOption,
    DeviceOption,
    EpochsOption,
    LossOption,
    NoR1Option,
    NoR2Option,
    OptimizerOption,
    RateOption,
    ScaleOption,
    stated_settings,
)

DEFAULTS = RepairConfig(epochs=50)


def transfer_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model file or registry name.", metavar="MODEL")],
    data: Annotated[
        Path, typer.Option(help="Images, one sub-folder for each new class.", metavar="DIR")
    ],
    out: Annotated[
        Path, typer.Option(help="Exported program to write, with card and record.", metavar="FILE")
    ] = Path("transferred.pt2"),
    filters: Annotated[int, typer.Option(help="Of the new 1x1 convolution.")] = 256,
    loss: LossOption = DEFAULTS.loss,
    scale: ScaleOption = DEFAULTS.scale,
    no_r1: NoR1Option = False,
    no_r2: NoR2Option = False,
    balance: BalanceOption = DEFAULTS.balance,
    learning_rate: RateOption = DEFAULTS.rate,
    epochs: EpochsOption = DEFAULTS.epochs,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    optimizer: OptimizerOption = DEFAULTS.optimizer,
    seed: Annotated[int, typer.Option(help="Of first weights, splits and order.")] = DEFAULTS.seed,
    no_controls: Annotated[
        bool, typer.Option("--no-controls", help="Skip the plain cross entropy control.")
    ] = False,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a state dict.", metavar="NAME")
    ] = None,
    device: DeviceOption = "auto",
    cache_gib: Annotated[
        float | None,
        typer.Option(
            help="Memory for the features; a quarter of the available by default.",
            min=0,
            metavar="GIB",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished transfer to --out.")
    ] = False,
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    json: JsonOption = False,
) -> None:
    """Give a network new classes: a 1x1 convolution and a classifier on its frozen features."""
    settings: dict[str, Any] = {
        "loss": loss,
        "scale": scale,
        "r1": not no_r1,
        "r2": not no_r2,
        "balance": balance,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "seed": seed,
        "controls": () if no_controls else ("ce",),
    }
    config = RepairConfig(**settings)
    from repair.summary import transfer_summary
    from repair.transfer import TransferRequest, transfer_network

    request = TransferRequest(
        model=model,
        data=data,
        out=out,
        filters=filters,
        arch=arch,
        device=device,
        cache_gib=cache_gib,
        command=("repair", *sys.argv[1:]),
        trust_pickle=trust_pickle,
        code=code,
        resume=resume,
        stated=frozenset(stated_settings(context, [*settings, "filters"])),
    )
    record = transfer_network(request, config)
    if json:
        console.print_json(record)
    else:
        console.stdout.print(transfer_summary(record))
