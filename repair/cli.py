"""The `repair` command: parse, call the library, print.

Choices come from `repair.losses` and `repair.config`; what needs torch is imported by the commands
themselves, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from audit import console
from audit.errors import UsageError
from audit.options import CodeOption, JsonOption, TrustOption
from repair.comparison_cli import compare_command
from repair.config import AUTO, KEEPS, RepairConfig
from repair.controls import CONTROLS, DEFAULT_CONTROLS, parse_controls
from repair.export_cli import export_command
from repair.grid_cli import grid_command
from repair.losses import LOSSES
from repair.options import (
    AnyLayerOption,
    AnyRateOption,
    BalanceOption,
    BatchSizeOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    GroupOption,
    MasksOption,
    ModelOption,
    NoR1Option,
    NoR2Option,
    OptimizerOption,
    RunOption,
    SaliencyOption,
    ScaleOption,
    ScheduleOption,
    TrainOption,
    WeightOption,
    is_stated,
    parse_rate,
    stated_settings,
)
from repair.transfer_cli import transfer_command

app = typer.Typer(
    help="Retrain one layer of a scanned network, prove what it did, and export the result.",
    no_args_is_help=True,
    add_completion=False,
)

DEFAULTS = RepairConfig()


def main() -> None:
    console.run_app(app)


@app.command("layer")
def layer_command(
    context: typer.Context,
    name: AnyLayerOption = None,
    run: RunOption = None,
    train: TrainOption = None,
    loss: Annotated[
        str,
        typer.Option(
            help="What to minimize; auto: trust, or ce or energy on made images where what "
            "misleads the network is nearly always right in these.",
            metavar="|".join([AUTO, *LOSSES]),
        ),
    ] = AUTO,
    saliency: SaliencyOption = DEFAULTS.saliency,
    scale: ScaleOption = DEFAULTS.scale,
    no_r1: NoR1Option = False,
    no_r2: NoR2Option = False,
    balance: BalanceOption = DEFAULTS.balance,
    weight: WeightOption = DEFAULTS.weight,
    temperature: Annotated[
        str | None,
        typer.Option(
            help="What the loss divides logits by; auto: what makes the network as sure as it is "
            "right on validation images. By default auto where the loss is auto and there are "
            "masks, else 1.",
            metavar="T|auto",
        ),
    ] = None,
    masks: MasksOption = None,
    group: GroupOption = None,
    counterfactuals: Annotated[
        bool | None,
        typer.Option(
            "--counterfactuals/--no-counterfactuals",
            help="Learn from images whose forbidden pixels are other images'; by default where the "
            "loss is auto and a region is known.",
        ),
    ] = None,
    donors: Annotated[
        int | None,
        typer.Option(
            help="Other images that lend an image those pixels, epoch by epoch in turn. By default "
            "as many as pay where the loss is auto and there are masks, else one.",
            metavar="N",
        ),
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            help="Share of the network's own answers, an artefact hidden, in what is learned; the "
            "rest is the label. By default as much as pays where the loss is auto and the scan "
            "found an artefact.",
            metavar="SHARE",
        ),
    ] = None,
    learning_rate: AnyRateOption = AUTO,
    schedule: ScheduleOption = DEFAULTS.schedule,
    epochs: EpochsOption = DEFAULTS.epochs,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    optimizer: OptimizerOption = DEFAULTS.optimizer,
    keep: Annotated[
        str,
        typer.Option(
            help="Which epoch's weights to write: the best by validation, or the last.",
            metavar="|".join(KEEPS),
        ),
    ] = DEFAULTS.keep,
    patience: Annotated[
        int, typer.Option(help="Stop after so many epochs without progress; 0: never.")
    ] = DEFAULTS.patience,
    balance_classes: Annotated[
        bool, typer.Option("--balance-classes", help="Weigh images by their class's rarity.")
    ] = False,
    with_norm: Annotated[
        bool,
        typer.Option("--with-norm", help="Train scale and shift of the batch norm that follows."),
    ] = False,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision, bfloat16.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Lay tensors out channels last.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log every epoch for TensorBoard.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of images.")] = DEFAULTS.seed,
    seeds: Annotated[
        int, typer.Option(help="Train by so many seeds and judge the penalty over all of them.")
    ] = DEFAULTS.seeds,
    device: DeviceOption = "auto",
    devices: Annotated[
        int, typer.Option(help="Processes on this machine that share the images.", metavar="N")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest unfinished repair.")
    ] = False,
    controls: Annotated[
        str,
        typer.Option(
            help="Beside what the repair is judged, comma separated.", metavar=",".join(CONTROLS)
        ),
    ] = ",".join(DEFAULT_CONTROLS),
    no_controls: Annotated[
        bool, typer.Option("--no-controls", help="Train the repair alone.")
    ] = False,
    cache_gib: Annotated[
        float | None,
        typer.Option(
            help="Memory for what enters the layer; a quarter of the available by default. "
            "0 alone: no cache, also not on disk.",
            min=0,
            metavar="GIB",
        ),
    ] = None,
    cache_disk_gib: Annotated[
        float | None,
        typer.Option(
            help="Disk for what that memory cannot hold; a quarter of the free by default.",
            min=0,
            metavar="GIB",
        ),
    ] = None,
    data: DataOption = None,
    model: ModelOption = None,
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    json: JsonOption = False,
) -> None:
    """Retrain one layer, everything else frozen, and judge it on held-out images."""
    if no_controls and is_stated(context, "controls"):
        raise UsageError("--controls and --no-controls exclude each other; give one of them")
    settings: dict[str, Any] = {
        "loss": DEFAULTS.loss if loss == AUTO else loss,
        "counterfactuals": bool(counterfactuals),
        "donors": DEFAULTS.donors if donors is None else donors,
        "distill": distill or 0.0,
        "saliency": saliency,
        "scale": scale,
        "balance": balance,
        "weight": weight,
        "temperature": DEFAULTS.temperature
        if temperature is None
        else parse_rate(temperature, "--temperature"),
        "r1": not no_r1,
        "r2": not no_r2,
        "learning_rate": parse_rate(learning_rate),
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "schedule": schedule,
        "keep": keep,
        "patience": patience,
        "balance_classes": balance_classes,
        "with_norm": with_norm,
        "amp": amp,
        "channels_last": channels_last,
        "seed": seed,
        "seeds": seeds,
        "controls": () if no_controls else parse_controls(controls),
    }
    config = RepairConfig(**settings)

    from audit.parallel import join_team
    from audit.runs import open_run_or_newest
    from repair.layer import RepairRequest, repair_layer
    from repair.summary import repair_summary

    choose = {"loss"} if loss == AUTO else set()
    choose |= {"counterfactuals"} if counterfactuals is None else set()
    choose |= {"distill"} if distill is None else set()
    choose |= {"donors"} if donors is None else set()
    choose |= {"temperature"} if temperature is None else set()
    request = RepairRequest(
        layer=name,
        train=train,
        data=data,
        model=model,
        device=device,
        cache_gib=cache_gib,
        cache_disk_gib=cache_disk_gib,
        masks=masks,
        group=group,
        tensorboard=tensorboard,
        resume=resume,
        choose=frozenset(choose),
        stated=frozenset(stated_settings(context, settings)) - choose,
        command=("repair", *sys.argv[1:]),
        trust_pickle=trust_pickle,
        code=code,
    )
    team = join_team(devices, device)
    repair = repair_layer(open_run_or_newest(run), config, request, team=team)
    if not team.leads:
        return
    if json:
        console.print_json(repair.info)
    else:
        console.stdout.print(repair_summary(repair))


app.command("transfer")(transfer_command)
app.command("compare")(compare_command)
app.command("grid")(grid_command)
app.command("export")(export_command)
