"""Photographs of any size as the network sees them, inside the exported graph.

Scaled until they just cover the input size divided by `crop`, and the input size cut from the
center: `audit.images.decoding.preprocess`, to the bit. ONNX's own Resize is not: onnxruntime's
rounds other weights.

Scaling is separable, so it is two matrix products, the row of an output pixel holding its weights.
Only what the cut leaves is computed. Weights and sums are whole numbers, as in Pillow, and float64
holds them exactly.

Source: Pillow 13, `src/libImaging/Resample.c`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from audit.errors import UsageError
from audit.networks import Preprocessing

__all__ = ["check_resizable", "resized"]

_PRECISION = float(2**22)  # weights are whole multiples of its inverse


def _triangle(offsets: Tensor) -> Tensor:
    return (1 - offsets.abs()).clamp(min=0)


def _cubic(offsets: Tensor) -> Tensor:
    """Return Keys' cubic with a = -0.5."""
    far = offsets.abs()
    inner = (1.5 * far - 2.5) * far * far + 1
    outer = (((far - 5) * far + 8) * far - 4) * -0.5
    return torch.where(far < 1, inner, torch.where(far < 2, outer, torch.zeros_like(far)))


def _lanczos(offsets: Tensor) -> Tensor:
    inside = (offsets >= -3) & (offsets < 3)
    return torch.where(inside, _sinc(offsets) * _sinc(offsets / 3), torch.zeros_like(offsets))


def _sinc(offsets: Tensor) -> Tensor:
    at_zero = offsets == 0
    turned = torch.where(at_zero, torch.ones_like(offsets), offsets * math.pi)
    return torch.where(at_zero, torch.ones_like(offsets), turned.sin() / turned)


_FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # and how far they reach
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


def check_resizable(settings: Preprocessing) -> None:
    """Raise UsageError where photographs are prepared in a way that is not known here."""
    if settings.interpolation not in _FILTERS:
        raise UsageError(
            f"--preprocess photo scales {', '.join(_FILTERS)}, and this model wants "
            f"{settings.interpolation}; take nhwc and prepare the photographs yourself"
        )


def resized(photos: Tensor, settings: Preprocessing) -> Tensor:
    """Return what the network sees of photographs.

    Args:
        photos: Upright RGB, uint8 (B, 3, H, W), of any size.
        settings: Input size (h, w), `crop` and interpolation.

    Returns:
        uint8 (B, 3, h, w).
    """
    height, width = (torch.full((), size, dtype=torch.int64) for size in photos.shape[2:])
    cover_height, cover_width = (round(size / settings.crop) for size in settings.input_size)
    is_wide = cover_height * width >= cover_width * height
    across = torch.where(is_wide, cover_height * width // height, cover_width)
    down = torch.where(is_wide, cover_height, cover_width * height // width)
    rows = _weights(photos.shape[2], height, down, settings.input_size[0], settings)
    columns = _weights(photos.shape[3], width, across, settings.input_size[1], settings)
    pixels = photos.double()
    found = _rounded(rows @ _rounded(pixels @ columns.T))  # (B, 3, H, W) -> (B, 3, h, w)
    # What is rounded in between depends on the order; tall photographs are first scaled down.
    is_tall = (height > down) & (height - down > 2 * (width - across))
    found_tall = _rounded(_rounded(rows @ pixels) @ columns.T)
    return torch.where(is_tall, found_tall, found).to(torch.uint8)


def _weights(
    places: int, given: Tensor, scaled: Tensor, wanted: int, settings: Preprocessing
) -> Tensor:
    """Return the weight of each given place in each wanted one, whole numbers, (wanted, given).

    Args:
        places: How many places are given along this axis.
        given: The same.
        scaled: How many there are after scaling.
        wanted: How many of those are cut from the center.
        settings: Interpolation.
    """
    shape, reach = _FILTERS[settings.interpolation]
    scale = given.double() / scaled.double()
    wider = scale.clamp(min=1)
    first = ((scaled - wanted).double() / 2).round()  # half to even, as Python rounds
    centers = ((first + torch.arange(wanted, dtype=torch.float64) + 0.5) * scale)[:, None]
    at = torch.arange(places, dtype=torch.float64)[None]
    within = (at >= (centers - reach * wider + 0.5).floor()) & (
        at < (centers + reach * wider + 0.5).floor()
    )
    weights = shape((at - centers + 0.5) / wider) * within
    weights = weights / weights.sum(dim=1, keepdim=True) * _PRECISION
    return torch.where(weights < 0, (weights - 0.5).ceil(), (weights + 0.5).floor())


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + _PRECISION / 2) / _PRECISION).floor().clamp(0, 255)
