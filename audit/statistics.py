"""How sure are we? Intervals and paired tests over images, from scipy's special functions.

Shares of images get Wilson intervals; everything else a percentile bootstrap over images, in which
an image is drawn with all that belongs to it. Two models are compared on the same images only:
McNemar's exact test for who turned right, a paired bootstrap for by how much.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

__all__ = [
    "Interval",
    "McNemar",
    "accuracy_difference",
    "auroc",
    "bootstrap_mean",
    "calibration_error",
    "classification_metrics",
    "mcnemar",
    "wilson",
]

_DRAWS_AT_ONCE = 2**21  # numbers per block of resamples: bounds the memory, not the result
_NAN = float("nan")

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the ends of its confidence interval; all NaN where nothing was observed."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Images that changed sides between two models, and how likely chance alone explains it.

    Attributes:
        fixed: Wrong before, right after.
        broken: Right before, wrong after.
        p_value: Two-sided, exact.
    """

    fixed: int
    broken: int
    p_value: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return a share of `n` with Wilson's score interval.

    center = (p + z^2 / 2n) / (1 + z^2 / n)
    half width = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)

    Source: Wilson 1927. Raises ValueError for successes outside [0, n].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n")
    if n == 0:
        return Interval(value=_NAN, low=_NAN, high=_NAN)
    share = successes / n
    z = float(special.ndtri(0.5 + level / 2))
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half_width = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n of n the formula is exactly 0 and 1; rounding would put the share outside.
    low = 0.0 if successes == 0 else center - half_width
    high = 1.0 if successes == n else center + half_width
    return Interval(value=share, low=low, high=high)


def bootstrap_mean(
    values: ArrayLike, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Return the mean over images with its percentile bootstrap interval."""
    sample = np.asarray(values, dtype=np.float64).ravel()
    if sample.size == 0:
        return Interval(value=_NAN, low=_NAN, high=_NAN)

    def means(drawn: Integers) -> Floats:
        return np.asarray(sample[drawn].mean(axis=1))

    replicates = _bootstrap(means, sample.size, seed=seed, resamples=resamples)
    return _percentile(float(sample.mean()), replicates, level)


def mcnemar(right_before: ArrayLike, right_after: ArrayLike) -> McNemar:
    """Return McNemar's exact test of two models on the same images.

    Under chance each image that changed sides is as likely fixed as broken, so
    p = min(1, 2 P[Binomial(fixed + broken, 1/2) <= min(fixed, broken)])

    Source: McNemar 1947, in its exact form.
    """
    before, after = _paired(right_before, right_after)
    fixed = int(np.count_nonzero(~before & after))
    broken = int(np.count_nonzero(before & ~after))
    tail = float(special.bdtr(min(fixed, broken), fixed + broken, 0.5)) if fixed + broken else 1.0
    return McNemar(fixed=fixed, broken=broken, p_value=min(1.0, 2 * tail))


def accuracy_difference(
    right_before: ArrayLike, right_after: ArrayLike, *, seed: int, resamples: int = 2000
) -> Interval:
    """Return accuracy after minus accuracy before, with its paired bootstrap interval."""
    before, after = _paired(right_before, right_after)
    change = after.astype(np.float64) - before.astype(np.float64)
    return bootstrap_mean(change, seed=seed, resamples=resamples)


def auroc(
    scores: ArrayLike,
    positives: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return how well a score tells positive images from the others, with its bootstrap interval.

    AUROC = P[score of a positive > score of a negative] + P[they are equal] / 2

    Resamples that draw one kind of image only say nothing and are left out. NaN if the sample
    itself has one kind only.
    """
    score = np.asarray(scores, dtype=np.float64).ravel()
    positive = np.asarray(positives, dtype=np.bool_).ravel()
    if score.size != positive.size:
        raise ValueError(f"{score.size} scores for {positive.size} images")
    if positive.all() or not positive.any():
        return Interval(value=_NAN, low=_NAN, high=_NAN)

    _, tied = np.unique(score, return_inverse=True)  # equal scores share a number, in score order
    groups = int(tied.max()) + 1
    code = tied * 2 + positive

    def areas(drawn: Integers) -> Floats:
        counts = _count(code[drawn], 2 * groups).reshape(len(drawn), groups, 2)
        negatives, wins = counts[..., 0], counts[..., 1]
        below = np.cumsum(negatives, axis=1) - negatives
        pairs = negatives.sum(axis=1) * wins.sum(axis=1)
        total = (wins * (below + negatives / 2)).sum(axis=1)
        area: Floats = np.full(len(drawn), _NAN)
        np.divide(total, pairs, out=area, where=pairs > 0)
        return area

    value = float(areas(np.arange(score.size)[None])[0])
    replicates = _bootstrap(areas, score.size, seed=seed, resamples=resamples)
    return _percentile(value, replicates[np.isfinite(replicates)], level)


def calibration_error(confidence: ArrayLike, right: ArrayLike, *, bins: int = 15) -> float:
    """Return the expected calibration error: how far confidence is from the share that is right.

    ECE = sum_b n_b / n |share right in b - mean confidence in b|, over bins of equal width on
    (0, 1]    Source: Naeini et al. 2015; Guo et al. 2017, Eq. 3, with its 15 bins

    Args:
        confidence: Probability of the predicted class, in [0, 1], (n,).
        right: Whether the prediction is the true class, (n,).

    Raises:
        ValueError: The sizes differ, or nothing was given.
    """
    sure = np.asarray(confidence, dtype=np.float64).ravel()
    hits = np.asarray(right, dtype=np.float64).ravel()
    if sure.size != hits.size or not sure.size:
        raise ValueError(f"{sure.size} confidences and {hits.size} outcomes")
    bin_of = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=hits - sure, minlength=bins)
    return float(np.abs(gaps).sum() / sure.size)


def calibration_interval(
    confidence: ArrayLike,
    right: ArrayLike,
    *,
    seed: int,
    bins: int = 15,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return the expected calibration error with its bootstrap interval over images.

    Arguments as for `calibration_error`. Resampling adds noise to every bin, and noise adds to the
    error: the percentile interval is moved down by the mean excess of the resamples, not below 0.
    """
    value = calibration_error(confidence, right, bins=bins)
    sure = np.asarray(confidence, dtype=np.float64).ravel()
    gaps = np.asarray(right, dtype=np.float64).ravel() - sure
    bin_of = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    own = [np.where(bin_of == b, gaps, 0.0) for b in np.unique(bin_of)]

    def errors(drawn: Integers) -> Floats:
        return np.asarray(sum(np.abs(values[drawn].sum(axis=1)) for values in own) / sure.size)

    replicates = _bootstrap(errors, sure.size, seed=seed, resamples=resamples)
    excess = max(0.0, float(replicates.mean()) - value)
    return _percentile(value, np.maximum(replicates - excess, 0.0), level)


def classification_metrics(
    labels: ArrayLike,
    predicted: ArrayLike,
    cross_entropies: ArrayLike,
    classes: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Return accuracy, macro precision and recall, cross entropy and recall per class, JSON-ready.

    Precision and recall are means over the classes that occur in the labels, in the sample as in
    each resample; a class that is never predicted has precision 0. With a handful of images per
    class, resamples miss whole classes and these two intervals come out too narrow: trust the
    accuracy's then. `per_class` lists the classes that occur, each with the share of its images
    that are right (its recall).

    Args:
        labels: True classes as positions in `classes`, (n,).
        predicted: Predicted classes likewise, (n,).
        cross_entropies: One per image, in nats, (n,).
        classes: The names, in the order of the model's outputs.
    """
    label = np.asarray(labels, dtype=np.int64).ravel()
    guess = np.asarray(predicted, dtype=np.int64).ravel()
    entropy = np.asarray(cross_entropies, dtype=np.float64).ravel()
    if not label.size == guess.size == entropy.size:
        raise ValueError(
            f"{label.size} labels, {guess.size} predictions and {entropy.size} cross entropies"
        )
    right = label == guess
    per_class = _per_class(label, right, classes)
    precision, recall = _macro_scores(label, guess, seed=seed, resamples=resamples)
    return {
        "n": int(label.size),
        "accuracy": wilson(int(right.sum()), label.size).as_dict(),
        "precision": precision.as_dict(),
        "recall": recall.as_dict(),
        "cross_entropy": bootstrap_mean(entropy, seed=seed, resamples=resamples).as_dict(),
        # Among equal shares the one that is surest to be low: the most images.
        "worst_class": min(per_class, key=lambda row: (row["value"], row["high"]), default=None),
        "per_class": per_class,
    }


def _per_class(label: Integers, right: Booleans, classes: Sequence[str]) -> list[dict[str, Any]]:
    support = np.bincount(label, minlength=len(classes))
    hits = np.bincount(label[right], minlength=len(classes))
    return [
        {
            "name": classes[index],
            "n": int(support[index]),
            **wilson(int(hits[index]), int(support[index])).as_dict(),
        }
        for index in np.flatnonzero(support).tolist()
    ]


def _macro_scores(
    label: Integers, guess: Integers, *, seed: int, resamples: int
) -> tuple[Interval, Interval]:
    if label.size == 0:
        nothing = Interval(value=_NAN, low=_NAN, high=_NAN)
        return nothing, nothing
    # Classes without images never count, so guesses of them share one extra column.
    occurring, code = np.unique(label, return_inverse=True)
    columns = len(occurring) + 1
    place = np.searchsorted(occurring, guess).clip(max=len(occurring) - 1)
    guess_code = np.where(occurring[place] == guess, place, len(occurring))
    hit_code = np.where(label == guess, code, len(occurring))

    def scores(drawn: Integers) -> Floats:
        support = _count(code[drawn], columns)[:, :-1]
        guesses = _count(guess_code[drawn], columns)[:, :-1]
        hits = _count(hit_code[drawn], columns)[:, :-1]
        present = support > 0
        precision = np.where(present, hits / np.maximum(guesses, 1), 0).sum(axis=1)
        recall = (hits / np.maximum(support, 1)).sum(axis=1)
        sums: Floats = np.stack([precision, recall], axis=1)
        return np.asarray(sums / present.sum(axis=1, keepdims=True))

    value = scores(np.arange(label.size)[None])[0]
    replicates = _bootstrap(scores, label.size, columns, seed=seed, resamples=resamples)
    precision, recall = (
        _percentile(float(value[column]), replicates[:, column], 0.95) for column in (0, 1)
    )
    return _around_value(precision), _around_value(recall)


def _bootstrap(
    statistic: Callable[[Integers], Floats], n: int, width: int = 0, *, seed: int, resamples: int
) -> Floats:
    """Return a statistic of every resample, (resamples, ...).

    Args:
        statistic: Takes positions of drawn images, (block, n); returns one row per resample.
        n: Images in the sample.
        width: Numbers per resample that the statistic needs beside the n positions.
    """
    return np.concatenate(
        [statistic(drawn) for drawn in _draws(n, max(n, width), seed=seed, resamples=resamples)]
    )


def _draws(n: int, width: int, *, seed: int, resamples: int) -> Iterator[Integers]:
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // width)
    for start in range(0, resamples, rows):
        yield generator.integers(0, n, size=(min(rows, resamples - start), n))


def _count(codes: Integers, columns: int) -> Integers:
    """Return how often each code occurs in each row, (rows, n) -> (rows, columns)."""
    rows = len(codes)
    offsets = np.arange(rows)[:, None] * columns
    return np.bincount((codes + offsets).ravel(), minlength=rows * columns).reshape(rows, columns)


def _percentile(value: float, replicates: Floats, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def _around_value(interval: Interval) -> Interval:
    """Stretch an interval to its estimate, which resamples of tiny classes can all miss."""
    low, high = min(interval.low, interval.value), max(interval.high, interval.value)
    return Interval(value=interval.value, low=low, high=high)


def _paired(before: ArrayLike, after: ArrayLike) -> tuple[Booleans, Booleans]:
    left = np.asarray(before, dtype=np.bool_).ravel()
    right = np.asarray(after, dtype=np.bool_).ravel()
    if left.size != right.size:
        raise ValueError(f"paired comparison of {left.size} images with {right.size}")
    return left, right
