"""Do raters agree, does their background matter, and how sure is a share that they gave?

Votes of one rater are not independent, so shares over several raters get intervals from a bootstrap
over raters. Where raters are of one mind that interval can shrink to nothing; its ends are never
closer than Wilson's, which take every vote for independent. Simulated with raters who differ, 95 %
intervals held the truth in 91 to 97 % from five raters on, in 77 to 96 % with three.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from audit.statistics import Interval, wilson

__all__ = [
    "BackgroundEffect",
    "difference_over_raters",
    "krippendorff_alpha",
    "rank_association",
    "share_over_raters",
]

_RESAMPLES = 2000
_EXACT_UP_TO = 8  # raters: 40,320 orders
_ORDERS = 20_000
_NAN = float("nan")

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class BackgroundEffect:
    """How an answer about a rater's background goes with how they voted.

    Attributes:
        rho: Spearman's rank correlation, NaN where either does not vary.
        p_value: Two-sided, of a permutation test; 1 where rho is NaN.
        exact: Whether every order was counted, instead of a seeded draw.
        raters: How many there are.
    """

    rho: float
    p_value: float
    exact: bool
    raters: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def share_over_raters(successes: ArrayLike, votes: ArrayLike, *, seed: int) -> Interval:
    """Return the share of all votes that are successes, with its interval over raters.

    Args:
        successes: One count per rater, (R,).
        votes: Of how many, (R,).
    """
    hits, n = _counts(successes), _counts(votes)
    alone = wilson(int(hits.sum()), int(n.sum()))
    if np.count_nonzero(n) < 2:
        return alone
    low, high = _ends(lambda drawn: _ratio(hits[drawn].sum(1), n[drawn].sum(1)), len(n), seed)
    return Interval(value=alone.value, low=min(low, alone.low), high=max(high, alone.high))


def difference_over_raters(
    successes: tuple[ArrayLike, ArrayLike], votes: tuple[ArrayLike, ArrayLike], *, seed: int
) -> Interval:
    """Return the first share minus the second, with its bootstrap interval over raters.

    With one rater there is no interval: its ends are NaN.

    Args:
        successes: Of the first and of the second share, one count per rater each, (R,).
        votes: Of how many each.
    """
    (hits, others), (n, m) = (tuple(map(_counts, pair)) for pair in (successes, votes))

    def differences(drawn: NDArray[np.int64]) -> Floats:
        first = _ratio(hits[drawn].sum(1), n[drawn].sum(1))
        return np.asarray(first - _ratio(others[drawn].sum(1), m[drawn].sum(1)))

    value = float(differences(np.arange(len(n))[None])[0]) if len(n) else _NAN
    if len(n) < 2 or math.isnan(value):
        return Interval(value=value, low=_NAN, high=_NAN)
    low, high = _ends(differences, len(n), seed)
    return Interval(value=value, low=min(low, value), high=max(high, value))


def krippendorff_alpha(ratings: Sequence[Mapping[int, str]], *, seed: int) -> Interval:
    """Return Krippendorff's alpha for nominal data, with its bootstrap interval over items.

    alpha = 1 - D_o / D_e, with D_o the share of pairs of answers within an item that differ, each
    item's pairs weighted by 1 / (m_u - 1), and D_e the same over all answers. Items with fewer than
    two answers say nothing. NaN where no item has two, or every answer is the same.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".

    Args:
        ratings: Of each item, the answer by rater.
    """
    answers = sorted({answer for item in ratings for answer in item.values()})
    counts = np.array(
        [[list(item.values()).count(a) for a in answers] for item in ratings if len(item) > 1],
        dtype=np.float64,
    ).reshape(-1, max(1, len(answers)))
    pairable = counts.sum(1)
    agreeing = (counts * (counts - 1)).sum(1) / np.maximum(pairable - 1, 1)

    def alphas(drawn: NDArray[np.int64]) -> Floats:
        totals = counts[drawn].sum(1)  # (draws, items, answers) -> (draws, answers)
        n = totals.sum(1)
        observed = 1 - _ratio(agreeing[drawn].sum(1), n)
        expected = 1 - _ratio((totals * (totals - 1)).sum(1), n * (n - 1))
        return 1 - _ratio(observed, expected)

    if not len(counts):
        return Interval(value=_NAN, low=_NAN, high=_NAN)
    value = float(alphas(np.arange(len(counts))[None])[0])
    if len(counts) < 2 or math.isnan(value):
        return Interval(value=value, low=_NAN, high=_NAN)
    low, high = _ends(alphas, len(counts), seed)
    return Interval(value=value, low=min(low, value), high=max(high, value))


def rank_association(levels: ArrayLike, scores: ArrayLike, *, seed: int) -> BackgroundEffect:
    """Return Spearman's correlation of two values per rater, tested by permutations.

    Up to eight raters every order is counted; beyond that p = (1 + at least as far) / (1 + drawn).

    Args:
        levels: Of the answer about the background, (R,).
        scores: Of how the rater voted, (R,).
    """
    ranks, others = stats.rankdata(np.asarray(levels)), stats.rankdata(np.asarray(scores))
    n = len(ranks)
    if n < 2 or np.ptp(ranks) == 0 or np.ptp(others) == 0:
        return BackgroundEffect(rho=_NAN, p_value=1.0, exact=True, raters=n)
    a, b = ranks - ranks.mean(), others - others.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    rho = float(a @ b) / scale
    exact = n <= _EXACT_UP_TO
    if exact:
        orders = np.array(list(itertools.permutations(range(n))))
    else:
        generator = np.random.default_rng(seed)
        orders = generator.permuted(np.tile(np.arange(n), (_ORDERS, 1)), axis=1)
    # A hair of slack: the same correlation, added up in another order, is no smaller one.
    farther = int(np.count_nonzero(np.abs(a[orders] @ b) / scale >= abs(rho) - 1e-12))
    p_value = farther / len(orders) if exact else (1 + farther) / (1 + len(orders))
    return BackgroundEffect(rho=rho, p_value=p_value, exact=exact, raters=n)


def _ends(
    statistic: Callable[[NDArray[np.int64]], Floats], n: int, seed: int
) -> tuple[float, float]:
    """Return the ends of the 95 % interval: percentiles, expanded for few units.

    alpha / 2 becomes Phi(-sqrt(n / (n - 1)) t), t being Student's quantile with n - 1 degrees of
    freedom: percentiles alone are too narrow by both.    Source: Hesterberg 2015, section 5.3.1

    Resamples without a value are left out.
    """
    drawn = np.random.default_rng(seed).integers(0, n, size=(_RESAMPLES, n))
    replicates = statistic(drawn)
    replicates = replicates[np.isfinite(replicates)]
    if not replicates.size:
        return _NAN, _NAN
    tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def _ratio(part: Floats, whole: Floats) -> Floats:
    result: Floats = np.full(np.shape(part), _NAN)
    np.divide(part, whole, out=result, where=np.asarray(whole) > 0)
    return result


def _counts(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64).ravel()
