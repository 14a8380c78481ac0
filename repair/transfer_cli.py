"""The command `repair transfer`: parse, call `repair.transfer`, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from audit import console
from audit.options import CodeOption, JsonOption, TrustOption
from repair.config import OPTIMIZERS, RepairConfig
from repair.losses import LOSSES, SCALES

DEFAULTS = RepairConfig(epochs=50)


def transfer_command(
    model: Annotated[str, typer.Argument(help="Model file or registry name.", metavar="MODEL")],
    data: Annotated[
        Path, typer.Option(help="Images, one sub-folder for each new class.", metavar="DIR")
    ],
    out: Annotated[
        Path, typer.Option(help="Exported program to write, with card and record.", metavar="FILE")
    ] = Path("transferred.pt2"),
    filters: Annotated[int, typer.Option(help="Of the new 1x1 convolution.")] = 256,
    loss: Annotated[
        str, typer.Option(help="What to minimize.", metavar="|".join(LOSSES))
    ] = DEFAULTS.loss,
    scale: Annotated[
        str, typer.Option(help="How the penalty is kept in bounds.", metavar="|".join(SCALES))
    ] = DEFAULTS.scale,
    no_r1: Annotated[bool, typer.Option("--no-r1", help="Leave out R1 = CE (1 - S).")] = False,
    no_r2: Annotated[bool, typer.Option("--no-r2", help="Leave out R2 = S (1 - CE).")] = False,
    balance: Annotated[
        float, typer.Option("--lambda", help="The lambda of Eq. 7, 0 to 1.")
    ] = DEFAULTS.balance,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Learning rate.")
    ] = DEFAULTS.learning_rate,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = DEFAULTS.batch_size,
    optimizer: Annotated[
        str, typer.Option(help="SGD with momentum 0.9, or AdamW.", metavar="|".join(OPTIMIZERS))
    ] = DEFAULTS.optimizer,
    seed: Annotated[int, typer.Option(help="Of first weights, splits and order.")] = DEFAULTS.seed,
    no_controls: Annotated[
        bool, typer.Option("--no-controls", help="Skip the plain cross entropy control.")
    ] = False,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a state dict.", metavar="NAME")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda")] = "auto",
    cache_gib: Annotated[
        float | None,
        typer.Option(
            help="Memory for the features; a quarter of the available by default.",
            min=0,
            metavar="GIB",
        ),
    ] = None,
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    json: JsonOption = False,
) -> None:
    """Give a network new classes: a 1x1 convolution and a classifier on its frozen features."""
    config = RepairConfig(
        loss=loss,
        scale=scale,  # type: ignore[arg-type]  # checked there
        r1=not no_r1,
        r2=not no_r2,
        balance=balance,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,  # type: ignore[arg-type]
        seed=seed,
        controls=() if no_controls else ("ce",),
    )
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
    )
    record = transfer_network(request, config)
    if json:
        console.print_json(record)
    else:
        console.stdout.print(transfer_summary(record))
