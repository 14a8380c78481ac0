"""The gradient of a class score by a layer's output, written out as ordinary operations.

onnxruntime cannot differentiate, so the graph must already hold the gradient. This module walks the
functional graph of a network backwards from the logits and applies the formula of each operation
(`onnx_gradient_rules.py`): the chain rule, by hand. Behind a layer that only pooling and a linear
head follow, nothing is left of it but the weights of the class over the number of cells.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from audit.errors import ExportError
from repair.onnx_gradient_rules import RULES, is_refused

__all__ = ["check_differentiable", "output_gradient"]

aten = torch.ops.aten


def output_gradient(
    nodes: Sequence[fx.Node],
    values: Mapping[fx.Node, Any],
    source: fx.Node,
    target: fx.Node,
    seed: Tensor,
) -> Tensor:
    """Return d(sum of seed * target) / d source, in the shape of the source's value.

    Args:
        nodes: The functional graph, in the order of computation.
        values: What each node gave in the forward pass.
        source: By whose value to differentiate; nothing before it is visited.
        target: The node of the logits (B, K).
        seed: (B, K); the one-hot class gives the gradient of each image's own class score.

    Raises:
        ExportError: An operation behind the source has no formula here.
    """
    behind = check_differentiable(nodes, source, target)
    gradients: dict[fx.Node, Any] = {target: seed}
    for node in reversed(nodes):
        if node is source or node not in behind or node not in gradients:
            continue
        gradient = gradients.pop(node)
        if node.target is operator.getitem:
            parent, part = node.args[0], node.args[1]
            parts = gradients.setdefault(cast(fx.Node, parent), {})
            parts[part] = parts[part] + gradient if part in parts else gradient
            continue
        inputs = fx.map_arg(_all_arguments(node), lambda n: values[n])
        by_position = RULES[node.target](gradient, inputs, values[node])
        for position, found in by_position.items():
            argument = _all_arguments(node)[position]
            pairs = zip(argument, found, strict=True) if _is_list(argument) else [(argument, found)]
            for parent, share in pairs:
                if isinstance(parent, fx.Node) and parent in behind:
                    known = gradients.get(parent)
                    gradients[parent] = share if known is None else known + share
    return cast(Tensor, gradients[source])


def check_differentiable(
    nodes: Sequence[fx.Node], source: fx.Node, target: fx.Node
) -> frozenset[fx.Node]:
    """Return the nodes that lie between source and target, both included.

    Raises:
        ExportError: One of them has no formula here, or there is no way from source to target.
    """
    reached = {source}
    for node in nodes:
        if any(parent in reached for parent in node.all_input_nodes):
            if node.target in (aten.sym_size.int, operator.mul):
                continue  # a size, not a value
            reached.add(node)
    needed = {target}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    behind = frozenset(reached & needed)
    if target not in behind:
        raise ExportError("the layer does not reach the logits, so there is no map of it")
    for node in nodes:
        if node not in behind or node is source or node.target is operator.getitem:
            continue
        if node.target not in RULES or is_refused(node.target, _all_arguments(node)):
            raise ExportError(
                f"--saliency cannot be had at this layer: what follows it holds {node.target}, "
                "whose gradient layermend cannot write into an ONNX graph; choose a later layer "
                "with --map-layer, or leave --saliency out"
            )
    return behind


def _all_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a call by position, with the schema's defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return tuple(node.args)
    filled = []
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            filled.append(node.args[position])
        else:
            default = argument.default_value if argument.has_default_value() else None
            filled.append(node.kwargs.get(argument.name, default))
    return tuple(filled)


def _is_list(argument: Any) -> bool:
    return isinstance(argument, list | tuple)
