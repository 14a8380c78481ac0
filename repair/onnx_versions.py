"""Exporters that are known to write wrong ONNX files, refused before they are used.

The proof on held-out images would catch most of what they do; refusing them says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from audit.errors import ExportError

__all__ = ["KNOWN_BAD", "KnownBad", "check_exporter"]


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """Releases of a package below `fixed_in` write files that are wrong as `fault` says."""

    package: str
    fixed_in: str
    fault: str
    source: str


KNOWN_BAD = (
    # The fused bias took the name of the convolution's input, which residual branches share:
    # `bias_name = x.name + "_bias"`, still in 0.5.6, gone in 0.5.7 (microsoft/onnxscript 2680).
    KnownBad(
        package="onnxscript",
        fixed_in="0.5.7",
        fault="batch norms folded into convolutions that share an input overwrite each other's "
        "bias, so that residual networks give wrong classes",
        source="pytorch issues 166797 and 169178",
    ),
    # Reported with 2.7.1. Here two images are traced, and the proof wants a free batch axis.
    KnownBad(
        package="torch",
        fixed_in="2.9",
        fault="a batch axis that was declared free is written with the size that was traced",
        source="pytorch issue 157621",
    ),
)


def check_exporter(installed: Callable[[str], str] = version) -> None:
    """Refuse an exporter that is known to write wrong files.

    Raises:
        ExportError: It is installed; the message says what it does and what to install.
    """
    for known in KNOWN_BAD:
        try:
            found = installed(known.package)
        except PackageNotFoundError:
            raise ExportError(
                f"{known.package} is not installed; install {known.package}>={known.fixed_in}"
            ) from None
        if _release(found) < _release(known.fixed_in):
            raise ExportError(
                f"{known.package} {found} writes wrong ONNX files: {known.fault} "
                f"({known.source}); install {known.package}>={known.fixed_in}"
            )


def _release(text: str) -> tuple[int, ...]:
    """Return 2.13.0+cpu as (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
