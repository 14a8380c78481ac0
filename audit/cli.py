"""The `audit` command: parse, call the library, print.

What needs torch is imported by the commands themselves, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from audit import console
from audit.options import CodeOption, JsonOption, TrustOption

app = typer.Typer(
    help="Find the layer of an image classifier that makes systematic mistakes.",
    no_args_is_help=True,
    add_completion=False,
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A state dict (.pt, .pth, .safetensors), an exported program (.pt2), a pickled "
        "module, torchvision:NAME or timm:NAME.",
        metavar="MODEL",
    ),
]
ArchOption = Annotated[
    str | None, typer.Option(help="Architecture of a state dict.", metavar="NAME")
]
ClassesOption = Annotated[
    Path | None, typer.Option(help="Class names in output order, one a line.", metavar="FILE")
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(help="Run folder; the newest under ./runs by default.", metavar="RUN"),
]


def main() -> None:
    console.run_app(app)


@app.command()
def scan(
    context: typer.Context,
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            help="Image folder: one sub-folder per class, or train/val/test with those.",
            metavar="DIR",
        ),
    ],
    arch: ArchOption = None,
    classes: ClassesOption = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Where the object is: a folder of masks named like the images, or a COCO JSON "
            "file. Without, maps are judged by a proxy.",
            metavar="DIR|JSON",
        ),
    ] = None,
    map_threshold: Annotated[
        float,
        typer.Option(
            help="With --masks, share of a map's energy inside the mask that makes it accurate.",
            metavar="SHARE",
        ),
    ] = 0.5,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to try, as glob patterns; all by default.", metavar="GLOB"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Saliency of the gallery's maps.",
            metavar="gradcam|guided-gradcam|hirescam|layercam|gradients",
        ),
    ] = "gradcam",
    limit: Annotated[
        int | None, typer.Option(help="Scan a stratified sample of N images.", min=1, metavar="N")
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Seconds for the trial repairs, at most.", metavar="SECONDS"),
    ] = 300.0,
    batch_size: Annotated[int, typer.Option(help="Images a batch.", min=1)] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Processes that load images; by itself by default.", min=0)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda")] = "auto",
    devices: Annotated[
        int, typer.Option(help="Processes on this machine that share the images.", metavar="N")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of splits, samples and bootstraps.", min=0)] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the newest unfinished scan of MODEL and DIR."),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder that run folders are made in.", metavar="DIR")
    ] = Path("runs"),
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    fail_on_flag: Annotated[
        bool, typer.Option("--fail-on-flag", help="Exit with 3 when a layer is flagged.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Scan predictions and saliency of a model and flag the layer at fault."""
    from audit.parallel import join_team
    from audit.scan import ScanConfig, ScanRequest, scan_model

    settings: dict[str, Any] = {
        "layers": layers,
        "method": method,
        "limit": limit,
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "seed": seed,
        "map_threshold": map_threshold,
        "budget_s": budget,
    }
    config = ScanConfig(**settings)
    request = ScanRequest(
        model=model,
        data=data,
        out=out,
        arch=arch,
        classes=classes,
        masks=masks,
        trust_pickle=trust_pickle,
        code=code,
        resume=resume,
        stated=_stated(context, [*settings, "masks"]),
        command=("audit", *sys.argv[1:]),
    )
    team = join_team(devices, device)
    run = scan_model(request, config, team=team)
    if not team.leads:
        return
    if json:
        console.print_json({**run.info, "verdict": run.verdict, "run": str(run.path)})
    else:
        from audit.summary import scan_summary

        console.stdout.print(scan_summary(run))
    if fail_on_flag and run.verdict["verdict"] != "none":
        from audit.errors import GateTripped

        flagged = ", ".join(run.verdict["layers"][:3])
        raise GateTripped(f"the scan flagged {flagged} ({run.verdict['verdict']})")


def _stated(context: typer.Context, settings: list[str]) -> frozenset[str]:
    """Return the settings that stand on the command line itself."""
    options = {"budget_s": "budget"}
    sources = {n: context.get_parameter_source(options.get(n, n)) for n in settings}
    return frozenset(n for n, source in sources.items() if source and source.name == "COMMANDLINE")


@app.command("layers")
def layers_command(
    model: ModelArgument,
    arch: ArchOption = None,
    classes: ClassesOption = None,
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    json: JsonOption = False,
) -> None:
    """List every layer that can be retrained alone: name, alias, kind, shape, parameters."""
    from audit.networks import open_network

    network = open_network(model, arch=arch, classes=classes, trust_pickle=trust_pickle, code=code)
    rows = [
        {
            "name": layer.name,
            "alias": layer.alias,
            "aliases": list(layer.aliases),
            "kind": layer.kind,
            "shape": list(layer.shape),
            "parameters": layer.parameters,
        }
        for layer in network.program.layers
    ]
    if json:
        console.print_json({"model": model, "layers": rows})
        return
    from audit.summary import layers_table

    console.stdout.print(layers_table(rows))


@app.command()
def report(
    run: RunArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file; RUN/report.html by default.", metavar="FILE")
    ] = None,
) -> None:
    """Write one self-contained HTML file about a run and its newest repair."""
    from audit.report import write_report
    from audit.runs import open_run_or_newest

    print(write_report(open_run_or_newest(run), out))


def _limit(text: str, metavar: str = "SHARE") -> Any:
    highest = 1.0 if metavar == "SHARE" else None
    return typer.Option(help=text, min=0, max=highest, metavar=metavar)


@app.command("gate")
def gate_command(
    run: RunArgument = None,
    min_accuracy: Annotated[
        float | None, _limit("Least share of images that are right, such as .9.")
    ] = None,
    min_worst_class: Annotated[
        float | None, _limit("Least accuracy of the class that does worst.")
    ] = None,
    max_cross_entropy: Annotated[
        float | None, _limit("Largest mean cross entropy.", "NATS")
    ] = None,
    min_case1: Annotated[
        float | None, _limit("Least share of images that are right with an accurate map.")
    ] = None,
    max_case2: Annotated[
        float | None, _limit("Largest share of images that are wrong with an accurate map.")
    ] = None,
    max_case3: Annotated[
        float | None, _limit("Largest share of images that are right with an inaccurate map.")
    ] = None,
    max_case4: Annotated[
        float | None, _limit("Largest share of images that are wrong with an inaccurate map.")
    ] = None,
    no_flag: Annotated[
        bool, typer.Option("--no-flag", help="The verdict must be `none`: no layer at fault.")
    ] = False,
    max_groups: Annotated[int | None, _limit("Most error groups that beat chance.", "N")] = None,
    max_group_share: Annotated[
        float | None, _limit("Largest share of the errors in one error group.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Images that accuracy, cross entropy and cases are measured on; all by default, "
            "with --repair the test split. Verdict and groups are of the whole scan.",
            metavar="all|train|val|test",
        ),
    ] = None,
    confident: Annotated[
        bool,
        typer.Option(
            "--confident",
            help="The end of the 95 % interval has to pass, not only the estimate: few images "
            "are then no proof, and every class has to pass by its own interval.",
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Judge the newest accepted repair, not the scanned model."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Hold a run against limits, for pipelines: exits with 0 if all are met, with 3 if not.

    1 means that a number is missing (and why), 2 that the command line is wrong.
    """
    from audit.errors import GateTripped
    from audit.gate import GateConfig, Limits, gate
    from audit.runs import open_run_or_newest
    from audit.summary import gate_failures, gate_summary

    limits = Limits(
        min_accuracy=min_accuracy,
        min_worst_class=min_worst_class,
        max_cross_entropy=max_cross_entropy,
        min_case1=min_case1,
        max_case2=max_case2,
        max_case3=max_case3,
        max_case4=max_case4,
        max_flagged=0 if no_flag else None,
        max_groups=max_groups,
        max_group_share=max_group_share,
    )
    config = GateConfig(limits=limits, split=split, confident=confident, repair=repair)
    result = gate(open_run_or_newest(run), config)
    if json:
        console.print_json(result.as_dict())
    else:
        console.stdout.print(gate_summary(result))
    if result.failed:
        raise GateTripped(gate_failures(result))


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for images, model and run.", metavar="DIR")
    ] = Path("layermend-demo"),
    seed: Annotated[int, typer.Option(help="Of images, splits and training.", min=0)] = 0,
) -> None:
    """Tell the whole story on an embedded example: scan, repair, export, report."""
    from audit.demo import run_demo

    run_demo(out, seed=seed)
