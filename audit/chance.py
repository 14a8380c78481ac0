"""What chance gives: an exact test over strata, and a correction for many tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["added_hypergeometric", "holm"]


def added_hypergeometric(
    strata: ArrayLike, drawn: ArrayLike, marked: ArrayLike
) -> tuple[float, float]:
    """Return the expected number of drawn items that are marked, and P[at least so many].

    Within each stratum the number is hypergeometric; over independent strata their distributions
    are convolved, which is the exact one-sided test that the common odds ratio is 1.

    Source: Mantel and Haenszel 1959; exact form as in Agresti 2013, section 7.3.5.

    Args:
        strata: One number per item, equal for items of a stratum, (n,).
        drawn: Whether the item was drawn (here: is wrong), (n,).
        marked: Whether the item is marked (here: looked there), (n,).
    """
    draws, marks = np.asarray(drawn, dtype=np.bool_), np.asarray(marked, dtype=np.bool_)
    _, stratum = np.unique(np.asarray(strata), return_inverse=True)
    sizes, taken, lit = (
        np.bincount(stratum, weights=weights).astype(np.int64)
        for weights in (None, draws.astype(float), marks.astype(float))
    )
    observed = int((draws & marks).sum())
    expected = float((taken * lit / np.maximum(sizes, 1)).sum())
    distribution, least = np.ones(1), 0  # of the sum so far; its first entry is P[sum = least]
    for size, n, k in zip(sizes.tolist(), taken.tolist(), lit.tolist(), strict=True):
        low, high = max(0, n + k - size), min(n, k)
        least += low
        if low < high:
            counts = np.arange(low, high + 1)
            distribution = np.convolve(distribution, stats.hypergeom.pmf(counts, size, k, n))
    return expected, float(min(1.0, distribution[max(0, observed - least) :].sum()))


def holm(p_values: Sequence[float], tests: int | None = None) -> list[float]:
    """Return p-values adjusted after Holm (1979): max over j <= i of (m - j + 1) p_(j), at most 1.

    Args:
        tests: How many were made, m, where not all of their p-values are at hand; the others
            count as 1.
    """
    m = len(p_values) if tests is None else tests
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (m - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
