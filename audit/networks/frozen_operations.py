"""Operations whose weights are frozen, at the cost that their derivatives have.

Gradients of a map need the derivative of a backward pass. torch's own double backward of a
convolution also computes the gradient of the weight, group by group, whether or not anyone asks for
it, and that of a batch norm its statistics'. With frozen weights both operations are linear but for
a constant: the backward pass is the transposed operation, and the derivative of the backward pass
is the operation itself. Values and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

__all__ = ["batch_norm_scale", "convolution", "frozen_batch_norm", "transposed_convolution"]

Settings = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the 2-d convolution; arguments as for ``torch.nn.functional.conv2d``.

    Mixed precision, and weights that learn, are left to torch.
    """
    settings = (list(stride), list(padding), list(dilation), groups)
    if not _frozen(inputs, weight, bias):
        return F.conv2d(inputs, weight, bias, *settings)
    return cast(Tensor, _CONVOLUTION(inputs, weight, bias, settings))


def transposed_convolution(
    gradients: Tensor, weight: Tensor, input_size: Sequence[int], settings: Settings
) -> Tensor:
    """Return the gradient by the input (B, C, H, W) for gradients by the output."""
    stride, padding, dilation, groups = settings
    found = conv2d_input(list(input_size), weight, gradients, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]  # torch has no types there
    return cast(Tensor, found)


def frozen_batch_norm(
    activations: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return the batch norm of evaluation, by the statistics that it remembers."""
    if not _frozen(activations, weight, bias):
        return F.batch_norm(activations, mean, variance, weight, bias, False, momentum, eps)
    found = _BATCH_NORM(activations, weight, bias, mean, variance, eps)
    return cast(Tensor, found)


def batch_norm_scale(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Return what a batch norm of evaluation multiplies each channel by, (C,)."""
    scale = (variance + eps).rsqrt()
    return scale if weight is None else scale * weight


def _frozen(inputs: Tensor, *learned: Tensor | None) -> bool:
    return (
        torch.is_grad_enabled()
        and inputs.requires_grad
        and not any(tensor is not None and tensor.requires_grad for tensor in learned)
        and not torch.is_autocast_enabled(inputs.device.type)
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings, ctx.input_size = settings, inputs.shape
        return F.conv2d(inputs, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        back = _TRANSPOSED_CONVOLUTION(gradients[0], weight, ctx.input_size, ctx.settings)
        return back, None, None, None


class _TransposedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradients: Tensor, weight: Tensor, input_size: Sequence[int], settings: Settings
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = settings
        return transposed_convolution(gradients, weight, input_size, settings)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return convolution(tangents[0], weight, None, *ctx.settings), None, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activations: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(batch_norm_scale(weight, variance, eps))
        return F.batch_norm(activations, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None, None]:
        (scale,) = ctx.saved_tensors
        by_channel = scale.view(1, -1, *(1,) * (gradients[0].dim() - 2))
        return gradients[0] * by_channel, None, None, None, None, None


_CONVOLUTION: Callable[..., Any] = _Convolution.apply
_TRANSPOSED_CONVOLUTION: Callable[..., Any] = _TransposedConvolution.apply
_BATCH_NORM: Callable[..., Any] = _BatchNorm.apply
