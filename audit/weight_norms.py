"""Weight norms: a layer whose weights are larger than those of the layers around it.

Training without batch norm ties the layers of a network together: gradient flow keeps the
difference of their squared norms (Du, Hu and Lee 2018, "Algorithmic Regularization in Learning Deep
Homogeneous Models"), weight decay draws it towards zero, and the usual initialization starts near
it. So the root mean square over output channels of the weights' norm is much the same in all
convolutions, and one that stands out had something added to its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from audit.networks.program import Program

__all__ = ["norm_outliers"]

_FEWEST = 6  # convolutions, to say what is usual
_ROBUST = 1.4826  # median absolute deviations in a standard deviation of a normal distribution


def norm_outliers(program: Program) -> Mapping[str, float]:
    """Return how far each convolution's norm is above the others', in robust standard deviations.

    The logarithm of its root mean square over output channels less the median of all, over their
    median absolute deviation times 1.4826. Empty where there are too few convolutions to compare.
    """
    names = [layer.name for layer in program.layers if layer.has_maps]
    if len(names) < _FEWEST:
        return {}
    logarithms = []
    for name in names:
        layer = program.layer(name)
        # Of a weight norm its magnitude is first, which holds the norms.
        weight = program.state[layer.parameter_names[0]].detach().double()
        channels = layer.shape[1 if layer.kind.startswith("conv_transpose") else 0]
        logarithms.append(0.5 * math.log(max(float(weight.square().sum()) / channels, 1e-30)))
    above = np.array(logarithms) - np.median(logarithms)
    spread = _ROBUST * float(np.median(np.abs(above)))
    return dict(zip(names, (above / max(spread, 1e-6)).tolist(), strict=True))
