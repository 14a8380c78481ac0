"""The command `repair export`: parse, call `repair.export` or `repair.onnx_verify`, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from audit import console
from audit.errors import ExportError, UsageError
from audit.options import CodeOption, JsonOption, TrustOption
from repair.options import ModelOption, RunOption


def export_command(
    run: RunOption = None,
    repair: Annotated[
        str | None,
        typer.Option(help="Name of a repair; the newest finished by default.", metavar="NAME"),
    ] = None,
    original: Annotated[
        bool, typer.Option("--original", help="Export the scanned model, unrepaired.")
    ] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Export this model, without a run; needs --data. Goes to ./exports.",
            metavar="MODEL",
        ),
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            help="Take uint8 pixels of the input size, or photographs of any; give probabilities.",
            metavar="nhwc|nchw|photo",
        ),
    ] = None,
    saliency: Annotated[
        bool,
        typer.Option("--saliency", help="Give the Grad-CAM of the predicted class as `map` too."),
    ] = False,
    map_layer: Annotated[
        str | None,
        typer.Option(
            help="Of which layer; the repaired one by default, else the last convolution.",
            metavar="LAYER",
        ),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Half precision inside; inputs and outputs float32.")
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set; 18 by default.", metavar="N")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Further copy of the model, if it passes.", metavar="FILE"),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Export nothing; repeat the proof of this file, by the run or the onnx.json "
            "beside it.",
            metavar="FILE",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Where the images are: the run's, if they have moved, or --checkpoint's."
        ),
    ] = None,
    model: ModelOption = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a --checkpoint.", metavar="NAME")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Class names of a --checkpoint, in output order.", metavar="FILE"),
    ] = None,
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    json: JsonOption = False,
) -> None:
    """Export to ONNX, and prove the file equal on held-out images in onnxruntime."""
    if original and repair is not None:
        raise UsageError("--original and --repair exclude each other; give one of them")
    if checkpoint is not None and (original or run is not None or repair is not None):
        raise UsageError(
            "--checkpoint stands for a model without a run; leave out --run, "
            "--repair and --original"
        )
    opening: dict[str, Any] = {
        "checkpoint": checkpoint,
        "arch": arch,
        "classes": classes,
        "data": data,
        "model": model,
        "trust_pickle": trust_pickle,
        "code": code,
    }
    if verify is not None:
        asked = {"--preprocess": preprocess, "--saliency": saliency, "--map-layer": map_layer,
                 "--fp16": fp16, "--opset": opset, "--out": out}  # fmt: skip
        for option, value in asked.items():
            if value:
                raise UsageError(f"--verify exports nothing; leave out {option}")
        _verify(verify, run, repair, original, opening, json=json)
        return

    from audit.runs import open_run_or_newest
    from repair.export import ExportRequest, export_checkpoint, export_network
    from repair.export_summary import export_summary

    settings: dict[str, Any] = {"preprocess": preprocess, **opening}
    request = ExportRequest(
        repair=repair,
        original=original,
        opset=opset,
        saliency=saliency,
        map_layer=map_layer,
        half=fp16,
        out=out,
        **settings,
    )
    if checkpoint is None:
        exported = export_network(open_run_or_newest(run), request)
    else:
        exported = export_checkpoint(request)
    if json:
        console.print_json(exported.proof)
    else:
        console.stdout.print(export_summary(exported.proof, exported.model))
    if not exported.passed:
        raise ExportError(
            f"the export is not equal to its source, do not use it: {exported.proof['reasons'][0]}"
        )


def _verify(
    path: Path,
    run: Path | None,
    repair: str | None,
    original: bool,
    opening: dict[str, Any],
    *,
    json: bool,
) -> None:
    from audit.runs import open_run_or_newest
    from repair.export_sources import chosen_repair
    from repair.export_summary import export_summary
    from repair.onnx_verify import VerifyRequest, verify_model

    folder = None
    if run is not None or repair is not None:
        opened = open_run_or_newest(run)
        folder = opened.path if original else chosen_repair(opened, repair).path
    proof = verify_model(path, VerifyRequest(folder=folder, **opening))
    if json:
        console.print_json(proof)
    else:
        console.stdout.print(export_summary(proof, path))
    if proof["status"] != "passed":
        raise ExportError(f"the file did not prove good, do not use it: {proof['reasons'][0]}")
