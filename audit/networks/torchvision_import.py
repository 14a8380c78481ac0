"""Import torchvision, also beside a CPU-only torch.

torchvision's wheels for Linux are built against a CUDA torch. Beside a CPU-only torch their
compiled operators cannot be loaded, and then the import as a whole fails (seen with 0.28): it
attaches shape functions to `torchvision::nms` and `torchvision::qnms`, which nobody has defined:

    RuntimeError: operator torchvision::nms does not exist

Defining the two schemas beforehand is enough. Models, transforms and data sets work; the operators
themselves (box suppression for detectors) stay without an implementation and say so when called.
Nothing is defined where the plain import works.
"""

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch forgets the schemas when their library object is collected, so it lives as long as we do.
_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Return the torchvision package, ready for `torchvision.models` and the rest.

    Call it before anything else imports torchvision, timm included. A second call is free.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: It does not fit the installed torch for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::nms does not exist" not in str(error):
            raise
    _forget_partial_import()
    _define_missing_operators()
    return importlib.import_module("torchvision")


def _define_missing_operators() -> None:
    global _library
    if _library is None:
        _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            _library.define(schema)  # type: ignore[no-untyped-call]


def _forget_partial_import() -> None:
    """Drop the submodules that the failed import left behind, so that it can start afresh."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
