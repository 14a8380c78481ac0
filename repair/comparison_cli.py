"""The command `repair compare`: parse, call `repair.comparison`, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audit import console
from audit.options import CodeOption, JsonOption, TrustOption


def compare_command(
    first: Annotated[str, typer.Argument(help="Model file or registry name.", metavar="A")],
    second: Annotated[str, typer.Argument(help="Another with the same classes.", metavar="B")],
    data: Annotated[Path, typer.Option(help="Labeled images.", metavar="DIR")],
    split: Annotated[
        str, typer.Option(help="Which images.", metavar="test|val|train|all")
    ] = "test",
    layer: Annotated[
        str, typer.Option(help="Whose maps are compared.", metavar="LAYER")
    ] = "last_conv",
    arch: Annotated[
        str | None, typer.Option(help="Architecture of state dicts.", metavar="NAME")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per pass.")] = 32,
    device: Annotated[str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda")] = "auto",
    seed: Annotated[int, typer.Option(help="Of splits and intervals.")] = 0,
    trust_pickle: TrustOption = False,
    code: CodeOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two checkpoints on the same images: paired tests, map similarity, what changed."""
    from repair.comparison import ComparisonRequest, compare_networks
    from repair.summary import comparison_summary

    request = ComparisonRequest(
        first=first,
        second=second,
        data=data,
        split=split,
        layer=layer,
        arch=arch,
        batch_size=batch_size,
        device=device,
        seed=seed,
        trust_pickle=trust_pickle,
        code=code,
    )
    comparison = compare_networks(request)
    if json:
        console.print_json(comparison)
    else:
        console.stdout.print(comparison_summary(comparison))
