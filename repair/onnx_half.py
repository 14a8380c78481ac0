"""An ONNX model with its weights and arithmetic in half precision.

Done on the finished graph, so that batch norms are folded in single precision first. Inputs and
outputs keep their types: a float input is cast at the door, and every output is cast back.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from audit.errors import ExportError

__all__ = ["to_half"]


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with float16 in place of float32 everywhere but at inputs and outputs.

    Raises:
        ExportError: A weight is too large for half precision (above 65504).
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    for tensor in graph.initializer:
        _halve(tensor, tensor.name)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _halve(attribute.t, node.name)
    del graph.value_info[:]  # their types are inferred anew
    first, last = [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            inside = f"{value.name}_half"
            _rename(graph, value.name, inside)
            first.append(_cast(value.name, inside, TensorProto.FLOAT16))
    for value in graph.output:
        inside = f"{value.name}_half"
        _rename(graph, value.name, inside)
        last.append(_cast(inside, value.name, TensorProto.FLOAT))
    nodes = [*first, *(part for node in graph.node for part in _kept_single(node)), *last]
    del graph.node[:]
    graph.node.extend(nodes)
    return onnx.shape_inference.infer_shapes(half)


def _halve(tensor: onnx.TensorProto, owner: str) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    largest = np.finfo(np.float16).max
    if np.isfinite(values).all() and (np.abs(values) > largest).any():
        raise ExportError(
            f"--fp16: {owner} holds {np.abs(values).max():.3g}, half precision ends at "
            f"{largest:.0f}; leave --fp16 out"
        )
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _kept_single(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the node between casts where onnxruntime's CPU kernels have no half precision."""
    if node.op_type != "ScatterElements":
        return [node]
    single = onnx.NodeProto()
    single.CopyFrom(node)
    before = []
    for place in (0, 2):  # data and updates; between them stand the indices
        single.input[place] = f"{node.name}_single_{place}"
        before.append(_cast(node.input[place], single.input[place], TensorProto.FLOAT))
    single.output[0] = f"{node.name}_single"
    return [*before, single, _cast(single.output[0], node.output[0], TensorProto.FLOAT16)]


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)
