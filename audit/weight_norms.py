"""Weight norms: a layer whose weights are larger than those of the layers around it.

Training without batch norm ties the layers of a network together: gradient flow keeps the
difference of their squared norms (Du, Hu and Lee 2018, "Algorithmic Regularization in Learning Deep
Homogeneous Models"), weight decay draws it towards zero, and the usual initialization starts near
it. So the root mean square over output channels of the weights' norm is much the same in all
convolutions, and one that stands out had something added to its weights. Whether one stands out is
asked of each by the test of Grubbs 1950, "Sample Criteria for Testing Outlying Observations".
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from audit.networks.program import Program

__all__ = ["norm_outliers", "outlying"]

_FEWEST = 6  # convolutions, to say what is usual
_MOST = 300.0  # a p-value may be nought in float64


def norm_outliers(program: Program) -> Mapping[str, float]:
    """Return by convolution how surely its norm is above the others', as `outlying` says.

    Of the logarithms of the root mean squares over output channels. Empty where there are too few
    convolutions to compare.
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
    return dict(zip(names, outlying(np.array(logarithms)).tolist(), strict=True))


def outlying(values: np.ndarray) -> np.ndarray:
    """Return -log10 of the one-sided p-value of Grubbs' test, of each value as the largest, >= 0.

    A value is held against the mean and the standard deviation of the n - 1 others by Student's t
    with n - 2 degrees of freedom, which is Grubbs' G in another form; p is multiplied by n, since
    any of them may be the largest, and at most 1.

    Args:
        values: At least 3, (n,).
    """
    found = np.zeros(len(values))
    for at, value in enumerate(values):
        others = np.delete(values, at)
        spread = max(float(others.std(ddof=1)), 1e-6) * math.sqrt(1 + 1 / len(others))
        chance = stats.t.logsf((value - others.mean()) / spread, len(others) - 1)
        found[at] = -(chance + math.log(len(values))) / math.log(10)
    return found.clip(0, _MOST)
