"""Gradients of single images by a layer's weights, for a whole batch at once.

The gradient of a batch adds up its images and hides whether they agree. For a convolution, the
gradient of one image is a sum over places of the products of what comes in and what is asked of
what goes out; kept apart by image it costs what the gradient of the batch costs. One forward and
one backward pass give it for every layer: `margin_gradients` hands out all of them,
`add_gradients` adds them up without keeping them.

Source of the products: Goodfellow 2015, "Efficient Per-Example Gradient Computations".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from audit.networks.program import Call, Program

__all__ = ["Use", "add_gradients", "call_gradients", "error_margins", "margin_gradients"]

Use = tuple[Call, Tensor]
"""One use of a layer, and the gradient that is asked of its outputs, of their shape."""

aten = torch.ops.aten
_conv2d_weight = cast(Callable[..., Tensor], conv2d_weight)  # torch gives it no types

_FEW_PLACES = 64
"""Outputs of no more places take one matrix product; the copies that it needs cost more above."""

_MOST_VALUES = 2**26
"""Values of single images' gradients held at once: 256 MiB in single precision."""


def error_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p / (1 - p) of the true class per image, (B,): its cross entropy is softplus(-m).

    Below zero the other classes together are more likely.
    """
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf"))
    return true - others.logsumexp(dim=1)


def margin_gradients(
    program: Program, images: Tensor, labels: Tensor, layers: Sequence[str]
) -> tuple[Tensor, Iterator[tuple[str, Tensor]]]:
    """Return margins (B,), and per layer the gradient of each image's own by weight and bias.

    The gradient of the cross entropy is -sigmoid(-margin) times that of the margin; unlike it, the
    margin's does not vanish on images that the network is sure of. Gradients come one layer at a
    time, (B, P) with the weight's values first, P the number of values: all of them at once would
    take B times the memory of the network.
    """
    with torch.enable_grad():
        calls, logits = program.calls(images, layers)
        margins = error_margins(logits, labels)
        asked = torch.autograd.grad(margins.sum(), [call.outputs for call in calls])

    def by_layer() -> Iterator[tuple[str, Tensor]]:
        pairs = zip(calls, asked, strict=True)
        for layer, uses in groupby(pairs, key=lambda pair: pair[0].layer):
            yield layer, _rows(list(uses))

    return margins.detach(), by_layer()


@torch.no_grad()
def add_gradients(sums: Tensor, uses: Sequence[Use], factors: Tensor, units: Tensor) -> Tensor:
    """Add weighted sums of the images' gradients to `sums`; return each gradient's norm, (B,).

    sums_k += sum_i factors_ki g_i, and the last row += sum_i units_i g_i / |g_i|, nothing of an
    image without gradient.

    Args:
        sums: Changed in place, (K + 1, P), weight first.
        uses: Every use of one layer in one forward pass.
        factors: (K, B).
        units: (B,).
    """
    call, asked = uses[0]
    if len(uses) == 1 and call.operation is aten.linear.default and asked.dim() == 2:
        return _add_products(sums, call, asked, factors, units)
    images = max(1, _MOST_VALUES // sums.shape[1])
    norms = []
    for start in range(0, len(asked), images):
        part = slice(start, start + images)
        rows = _rows([(_part(call, part), asked[part]) for call, asked in uses])
        norms.append(torch.linalg.vector_norm(rows, dim=1))
        sums.addmm_(_weights(factors[:, part], units[part], norms[-1]), rows)
    return torch.cat(norms)


def _add_products(
    sums: Tensor, call: Call, asked: Tensor, factors: Tensor, units: Tensor
) -> Tensor:
    """`add_gradients` for one product per image, whose gradients need never be multiplied out."""
    bias = 0 if call.bias is None else 1
    lengths = (call.inputs.square().sum(dim=1) + bias).sqrt()
    norms: Tensor = torch.linalg.vector_norm(asked, dim=1) * lengths
    values = call.weight.numel()
    for row, weights in zip(sums, _weights(factors, units, norms), strict=True):
        weighed = weights[:, None] * asked
        row[:values].view(call.weight.shape).addmm_(weighed.mT, call.inputs)
        if bias:
            row[values:] += weighed.sum(dim=0)
    return norms


def _weights(factors: Tensor, units: Tensor, norms: Tensor) -> Tensor:
    shares = torch.where(norms > 0, units / norms, 0.0)
    return torch.cat([factors, shares[None]]).to(norms.dtype)


def _rows(uses: Sequence[Use]) -> Tensor:
    first, *others = [call_gradients(call, asked) for call, asked in uses]
    for other in others:
        first += other
    return first


def _part(call: Call, part: slice) -> Call:
    return replace(call, inputs=call.inputs[part], outputs=call.outputs[part])


@torch.no_grad()
def call_gradients(call: Call, asked: Tensor) -> Tensor:
    """Return each image's gradient by weight and bias, (B, P), weight first.

    Args:
        asked: Gradient by the call's outputs, of their shape; no image may depend on another.
    """
    if call.operation is aten.linear.default:
        by_weight, by_bias = _linear(call, asked)
    elif call.operation is aten.conv2d.default:
        by_weight, by_bias = _conv2d(call, asked)
    else:
        return _one_by_one(call, asked)
    parts = [by_weight.flatten(1)] if call.bias is None else [by_weight.flatten(1), by_bias]
    return torch.cat(parts, dim=1)


def _linear(call: Call, asked: Tensor) -> tuple[Tensor, Tensor]:
    inputs = call.inputs.reshape(len(asked), -1, call.inputs.shape[-1])
    asked = asked.reshape(len(asked), -1, asked.shape[-1])
    return asked.mT @ inputs, asked.sum(dim=1)


def _conv2d(call: Call, asked: Tensor) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = _conv_settings(call.settings)
    shape = call.weight.shape
    images, outputs, height, width = asked.shape
    if groups == 1 and height * width <= _FEW_PLACES:
        columns = F.unfold(call.inputs, (shape[2], shape[3]), dilation, padding, stride)
        by_weight = asked.reshape(images, outputs, -1) @ columns.mT
    else:  # on CPUs faster than any batched form that was tried, by up to ten times
        by_weight = torch.stack(
            [
                _conv2d_weight(one, shape, wanted, stride, padding, dilation, groups)
                for one, wanted in zip(call.inputs.unsqueeze(1), asked.unsqueeze(1), strict=True)
            ]
        )
    return by_weight.reshape(images, *shape), asked.sum(dim=(2, 3))


def _conv_settings(
    settings: Sequence[Any],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    given = dict(enumerate(settings))
    stride, padding, dilation, groups = (
        given.get(i, usual) for i, usual in enumerate((1, 0, 1, 1))
    )
    return _pair(stride), _pair(padding), _pair(dilation), int(groups)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


def _one_by_one(call: Call, asked: Tensor) -> Tensor:
    """Any other operation, slowly: one backward pass per image through this operation alone."""
    leaves = [t.requires_grad_() for t in (call.weight.clone(), call.bias) if t is not None]
    bias = None if call.bias is None else leaves[1]
    rows = []
    for image in range(len(asked)):
        with torch.enable_grad():
            inputs = call.inputs[image : image + 1]
            outputs = call.operation(inputs, leaves[0], bias, *call.settings)
        found = torch.autograd.grad(outputs, leaves, asked[image : image + 1])
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)
