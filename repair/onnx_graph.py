"""From a network to an ONNX model: traced by PyTorch's exporter, cleaned, not proven yet."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import onnx
import torch

from audit.errors import ExportError, LayermendError
from audit.networks import Network
from repair.onnx_serving import BATCH_AXIS, INPUT, OPSET, Form, served_program
from repair.onnx_versions import check_exporter

__all__ = ["onnx_model", "serialized"]


def onnx_model(network: Network, form: Form) -> onnx.ModelProto:
    """Return the network as an ONNX model in single precision, whatever the form says.

    Raises:
        ExportError: PyTorch cannot export it, not to this operator set, or is known to do it wrong.
    """
    check_exporter()
    try:
        with _quiet():
            program = torch.onnx.export(
                served_program(network, form),
                dynamo=True,
                opset_version=form.opset,
                input_names=[INPUT],
                output_names=list(form.outputs),
                verbose=False,
            )
        if program is None:
            raise ExportError("PyTorch returned no ONNX model")
        model = program.model_proto
    except LayermendError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"PyTorch cannot export this network to ONNX: {lines[0]}") from error
    got = next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0
    )
    if got != form.opset:
        raise ExportError(
            f"PyTorch exported to operator set {got}, not {form.opset}; ask for --opset {got}, "
            f"or leave --opset out for {OPSET}"
        )
    _clean(model, form)
    return model


def serialized(model: onnx.ModelProto) -> bytes:
    """Return the model's bytes; raises ExportError where one file cannot hold them."""
    try:
        return bytes(model.SerializeToString())
    except Exception as error:
        raise ExportError(f"the model is too large for one ONNX file of 2 GiB: {error}") from error


def _clean(model: onnx.ModelProto, form: Form) -> None:
    """Name the free axes; drop the exporter's notes, which hold source paths of this machine."""
    graph = model.graph
    traced = (axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim)
    names = dict(zip(traced, form.free_axes, strict=False))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = names.get(axis.dim_param, BATCH_AXIS)
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del model.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and warnings off both streams."""
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
