"""The gradient of a class score by a layer's output, written out as ordinary operations.

onnxruntime cannot differentiate, so the graph must already hold the gradient. This module walks the
functional graph of a network backwards from the logits and applies one closed formula for each
operation (the chain rule, by hand), made of operations that ONNX has: a convolution's is a
transposed convolution, a rectifier's a mask, a pooled linear head's the weights of the class over
the number of cells. `torch.autograd` is not used: what it calls has no counterpart in ONNX.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from audit.errors import ExportError

__all__ = ["check_differentiable", "output_gradient"]

aten = torch.ops.aten

Rule = Callable[[Any, tuple[Any, ...], Any], dict[int, Any]]
"""(gradient by the output, inputs, output) -> gradient by the input at each position."""


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
        by_position = _RULES[node.target](gradient, inputs, values[node])
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
        if node.target not in _RULES or _is_refused(node):
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


def _is_refused(node: fx.Node) -> bool:
    """Say whether a rule does not hold for the settings of this call."""
    arguments = _all_arguments(node)
    if node.target is aten.avg_pool2d.default:
        return bool(arguments[6] is not None)  # a divisor of its own
    if node.target is aten.pad.default:
        return bool(arguments[2] != "constant")
    if node.target is aten.slice.Tensor:
        whole = not arguments[2] and arguments[3] in (None, sys.maxsize)
        return bool(arguments[4] != 1 or (arguments[1] == 0 and not whole))
    if node.target is aten.conv2d.padding:
        return arguments[4] == "same" and any(step != 1 for step in arguments[3])
    return False


# -------------------------------------------------------------------- layers and norms


def _conv2d(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, weight, _bias, stride, padding, dilation, groups = inputs
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    size, kernel = images.shape[2:], weight.shape[2:]
    left_over = [
        size[i]
        - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1))
        - 1
        for i in range(2)
    ]  # rows and columns that the stride never came to
    shares = F.conv_transpose2d(
        gradient, weight, None, stride, padding, left_over, groups, dilation
    )
    return {0: shares}


def _conv2d_named_padding(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, weight, bias, stride, padding, dilation, groups = inputs
    if padding == "valid":
        return _conv2d(gradient, (images, weight, bias, stride, 0, dilation, groups), None)
    dilation = _pair(dilation)
    wide = F.conv_transpose2d(gradient, weight, None, 1, 0, 0, groups, dilation)
    for axis in (2, 3):  # the padding is shorter by one on the left where it is odd
        total = dilation[axis - 2] * (weight.shape[axis] - 1)
        wide = wide.narrow(axis, total // 2, images.shape[axis])
    return {0: wide}


def _linear(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: torch.matmul(gradient, inputs[1])}


def _batch_norm(parts: Any, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, weight, _bias, _mean, variance, _momentum, eps = inputs
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    return {0: parts[0] * scale.view(1, -1, *([1] * (images.dim() - 2)))}


def _layer_norm(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, shape, weight, _bias, eps = inputs[:5]
    axes = list(range(images.dim() - len(shape), images.dim()))
    centered = images - images.mean(axes, keepdim=True)
    inverse = torch.rsqrt((centered * centered).mean(axes, keepdim=True) + eps)
    normal = centered * inverse
    scaled = gradient if weight is None else gradient * weight
    along = (scaled * normal).mean(axes, keepdim=True)
    return {0: inverse * (scaled - scaled.mean(axes, keepdim=True) - normal * along)}


# -------------------------------------------------------------------- activations


def _relu(gradient: Tensor, _: Any, output: Tensor) -> dict[int, Any]:
    return {0: _where(output > 0, gradient)}


def _hardtanh(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, low, high = inputs
    return {0: _where((images > low) & (images < high), gradient)}


def _relu6(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return _hardtanh(gradient, (inputs[0], 0, 6), None)


def _leaky_relu(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: torch.where(inputs[0] > 0, gradient, gradient * inputs[1])}


def _sigmoid(gradient: Tensor, _: Any, output: Tensor) -> dict[int, Any]:
    return {0: gradient * output * (1 - output)}


def _tanh(gradient: Tensor, _: Any, output: Tensor) -> dict[int, Any]:
    return {0: gradient * (1 - output * output)}


def _silu(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    share = torch.sigmoid(inputs[0])
    return {0: gradient * share * (1 + inputs[0] * (1 - share))}


def _hardsigmoid(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: _where((inputs[0] > -3) & (inputs[0] < 3), gradient / 6)}


def _hardswish(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images = inputs[0]
    bent = torch.where(images < 3, gradient * (images / 3 + 0.5), gradient)
    return {0: _where(images > -3, bent)}


def _gelu(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, approximate = inputs
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (images + 0.044715 * images * images * images)
        bend = torch.tanh(inner)
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * images * images)
        return {0: gradient * (0.5 * (1 + bend) + 0.5 * images * (1 - bend * bend) * slope)}
    share = 0.5 * (1 + torch.erf(images / math.sqrt(2)))
    density = torch.exp(-0.5 * images * images) / math.sqrt(2 * math.pi)
    return {0: gradient * (share + images * density)}


# -------------------------------------------------------------------- pooling


def _adaptive_avg_pool2d(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, (height, width) = inputs
    if height == width == 1:
        return {0: (gradient / (images.shape[2] * images.shape[3])).expand_as(images)}
    rows = F.adaptive_avg_pool1d(_eye(images, 2), height)  # (H, height)
    columns = F.adaptive_avg_pool1d(_eye(images, 3), width)
    return {0: torch.matmul(torch.matmul(rows, gradient), columns.T)}


def _avg_pool2d(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, kernel, stride, padding, ceil_mode, count_padding, _divisor = inputs
    kernel, padding = _pair(kernel), _pair(padding)
    stride = _pair(stride) if stride else kernel
    rows, columns = (
        F.avg_pool1d(
            _eye(images, 2 + i), kernel[i], stride[i], padding[i], ceil_mode, count_padding
        )
        for i in range(2)
    )  # a mean over a rectangle is a mean over rows of means over columns
    return {0: torch.matmul(torch.matmul(rows, gradient), columns.T)}


def _max_pool2d(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, kernel, stride, padding, dilation, ceil_mode = inputs
    _, winners = F.max_pool2d(
        images, kernel, stride or kernel, padding, dilation, ceil_mode, return_indices=True
    )
    empty = torch.zeros_like(images).flatten(2)
    return {0: empty.scatter_add(2, winners.flatten(2), gradient.flatten(2)).reshape(images.shape)}


def _mean(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, axes, keep = inputs[:3]
    axes = sorted(axis % images.dim() for axis in axes)
    if not keep:
        for axis in axes:
            gradient = gradient.unsqueeze(axis)
    cells = math.prod(images.shape[axis] for axis in axes)
    return {0: (gradient / cells).expand_as(images)}


# -------------------------------------------------------------------- arithmetic and shapes


def _add(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: _sum_to(gradient, inputs[0]), 1: _sum_to(gradient * inputs[2], inputs[1])}


def _sub(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: _sum_to(gradient, inputs[0]), 1: _sum_to(-gradient * inputs[2], inputs[1])}


def _mul(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    left, right = inputs
    return {0: _sum_to(gradient * right, left), 1: _sum_to(gradient * left, right)}


def _div(gradient: Tensor, inputs: tuple[Any, ...], output: Tensor) -> dict[int, Any]:
    left, right = inputs
    return {
        0: _sum_to(gradient / right, left),
        1: _sum_to(-gradient * output / right, right),
    }


def _power(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    base, exponent = inputs
    return {0: gradient * exponent * base ** (exponent - 1)}


def _reshaped(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: gradient.reshape(inputs[0].shape)}


def _unchanged(gradient: Tensor, _inputs: Any, _: Any) -> dict[int, Any]:
    return {0: gradient}


def _permute(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    order = [axis % gradient.dim() for axis in inputs[1]]
    return {0: gradient.permute([order.index(axis) for axis in range(len(order))])}


def _transpose(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: gradient.transpose(inputs[1], inputs[2])}


def _expand(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    return {0: _sum_to(gradient, inputs[0])}


def _cat(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    tensors, axis = inputs
    sizes = [tensor.shape[axis] for tensor in tensors]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {0: [gradient.narrow(axis, at, size) for at, size in zip(starts, sizes, strict=True)]}


def _split(parts: Any, inputs: tuple[Any, ...], output: Any) -> dict[int, Any]:
    pieces = [parts[i] if i in parts else torch.zeros_like(piece) for i, piece in enumerate(output)]
    return {0: torch.cat(pieces, dim=inputs[2])}


def _slice(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, axis, start, _end, _step = inputs
    if axis == 0:  # the whole batch
        return {0: gradient}
    size, start = images.shape[axis], start or 0
    start = start + size if start < 0 else min(start, size)
    before = torch.zeros_like(images.narrow(axis, 0, start))
    end = start + gradient.shape[axis]
    after = torch.zeros_like(images.narrow(axis, end, size - end))
    return {0: torch.cat([before, gradient, after], dim=axis)}


def _pad(gradient: Tensor, inputs: tuple[Any, ...], _: Any) -> dict[int, Any]:
    images, amounts = inputs[:2]
    for i, left in enumerate(amounts[::2]):  # the last axis first
        axis = images.dim() - 1 - i
        gradient = gradient.narrow(axis, left, images.shape[axis])
    return {0: gradient}


# -------------------------------------------------------------------- small parts


def _pair(setting: Any) -> tuple[int, int]:
    if isinstance(setting, int):
        return setting, setting
    return (setting[0], setting[0]) if len(setting) == 1 else (setting[0], setting[1])


def _where(condition: Tensor, gradient: Tensor) -> Tensor:
    return torch.where(condition, gradient, torch.zeros_like(gradient))


def _eye(images: Tensor, axis: int) -> Tensor:
    return torch.eye(images.shape[axis], dtype=images.dtype, device=images.device)


def _sum_to(gradient: Tensor, like: Any) -> Tensor:
    """Undo broadcasting: sum over the axes along which an input was repeated."""
    if not isinstance(like, Tensor):
        return gradient
    extra = gradient.dim() - like.dim()
    repeated = [
        axis
        for axis in range(extra, gradient.dim())
        if isinstance(like.shape[axis - extra], int)
        and like.shape[axis - extra] == 1
        and not (isinstance(gradient.shape[axis], int) and gradient.shape[axis] == 1)
    ]
    if repeated:
        gradient = gradient.sum(repeated, keepdim=True)
    return gradient.sum(list(range(extra))) if extra else gradient


_RULES: dict[Any, Rule] = {
    aten.conv2d.default: _conv2d,
    aten.conv2d.padding: _conv2d_named_padding,
    aten.linear.default: _linear,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.relu.default: _relu,
    aten.hardtanh.default: _hardtanh,
    aten.relu6.default: _relu6,
    aten.leaky_relu.default: _leaky_relu,
    aten.sigmoid.default: _sigmoid,
    aten.tanh.default: _tanh,
    aten.silu.default: _silu,
    aten.hardsigmoid.default: _hardsigmoid,
    aten.hardswish.default: _hardswish,
    aten.gelu.default: _gelu,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.max_pool2d.default: _max_pool2d,
    aten.mean.dim: _mean,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.pow.Tensor_Scalar: _power,
    aten.view.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten.flatten.using_ints: _reshaped,
    aten.squeeze.dims: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.clone.default: _unchanged,
    aten.alias.default: _unchanged,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.cat.default: _cat,
    aten.split.Tensor: _split,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
}
