"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["CodeOption", "JsonOption", "TrustOption"]

TrustOption = Annotated[
    bool, typer.Option("--trust-pickle", help="Let a pickled module run the code it carries.")
]
CodeOption = Annotated[
    Path | None, typer.Option(help="Folder with the code of a pickled module.", metavar="DIR")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and no table.")]
