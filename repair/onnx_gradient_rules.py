"""What each operation does to a gradient that comes back through it, in operations that ONNX has.

A convolution's rule is a transposed convolution, a rectifier's a mask, pooling's a matrix of shares
on either side, maximum pooling's a scatter to the winners. `torch.autograd` is not used: what it
calls (convolution_backward and its like) has no counterpart in ONNX. All rules are linear in the
gradient and take what the forward pass gave; tests hold each against autograd in double precision.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RULES", "Rule", "is_refused"]

aten = torch.ops.aten

Rule = Callable[[Any, tuple[Any, ...], Any], dict[int, Any]]
"""(gradient by the output, inputs, output) -> gradient by the input at each position."""


def is_refused(target: Any, arguments: tuple[Any, ...]) -> bool:
    """Say whether the rule of an operation does not hold for these settings of it."""
    if target is aten.avg_pool2d.default:
        return bool(arguments[6] is not None)  # a divisor of its own
    if target is aten.pad.default:
        return bool(arguments[2] != "constant")
    if target is aten.slice.Tensor:
        whole = not arguments[2] and arguments[3] in (None, sys.maxsize)
        return bool(arguments[4] != 1 or (arguments[1] == 0 and not whole))
    if target is aten.conv2d.padding:
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


RULES: dict[Any, Rule] = {
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
