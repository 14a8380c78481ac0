"""Which errors share something? Groups of failing images that chance does not explain.

Systematic means that failures share what was said, where the network looked, or both. Three kinds
of group are tested, each against a chance of its own:

- **confusion**: "anything called dog" against errors that strike any image and any other class
  alike (exact binomial test); "cat called dog" against what the numbers of errors on cats and of
  errors called dog give by themselves (exact hypergeometric test).
- **region**: wrong images look at a region more often than right images *of the same predicted
  class* (exact hypergeometric test, its counts added over predicted classes).
- **both**: the same within one predicted class (one stratum: Fisher's exact test, one-sided).

Regions are fixed beforehand (`audit.regions`), and what is tested never depends on where images
look; so nothing is found and tested on the same counts. All tests together are corrected after Holm
(1979): the chance of a single false group among all of them is at most `alpha`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from audit.regions import REGIONS, Region, looked_at

__all__ = ["ErrorGroup", "GroupSearch", "added_hypergeometric", "find_groups", "holm"]

Kind = Literal["confusion", "region", "both"]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

SAME_IMAGES = 0.5
NEARLY_ALL = 0.8
SHARED_LABEL = 0.9


@dataclass(frozen=True, kw_only=True)
class ErrorGroup:
    """Failing images that share something, and how likely chance alone explains how many.

    Attributes:
        label: Class that at least nine in ten of them belong to, None where they differ.
        predicted: Class that all of them were called, None where they differ.
        region: Where the network looked, None where that took no part in the test.
        members: Positions of the images in the arrays given.
        of: Number of wrong images that were looked at for this kind of group.
        expected: Members that chance would give.
        compared: Positions of the right images that they were compared with; empty for confusions.
        compared_share: Share of those that look at the region, None for confusions.
        test: What was tested, in words.
    """

    kind: Kind
    label: int | None
    predicted: int | None
    region: Region | None
    members: Integers = field(repr=False)
    of: int
    expected: float
    compared: Integers = field(repr=False)
    compared_share: float | None
    p_value: float
    p_adjusted: float = 1.0
    test: str

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def excess(self) -> float:
        """How many more errors there are than chance would give."""
        return self.size - self.expected

    @property
    def area(self) -> float:
        """Share of the image that the region takes."""
        return 1.0 if self.region is None else self.region.area


@dataclass(frozen=True, kw_only=True)
class GroupSearch:
    """The groups found, the surest first, and how many were tested to find them."""

    groups: tuple[ErrorGroup, ...]
    tests: int
    alpha: float
    minimum: int
    errors: int
    errors_with_maps: int
    right_with_maps: int
    correction: str = "Holm"


def find_groups(
    labels: ArrayLike,
    predicted: ArrayLike,
    mapped: ArrayLike,
    maps: NDArray[np.floating],
    *,
    classes: int,
    alpha: float = 0.05,
    minimum: int = 5,
    at_most: int = 8,
) -> GroupSearch:
    """Return groups of wrong images that chance does not explain, overlapping ones left out.

    Args:
        labels: True classes, (N,).
        predicted: Predicted classes, (N,).
        mapped: Positions of the images that have maps, (M,); drawn without looking at the maps.
        maps: Their saliency maps of the predicted class, (M, h, w), >= 0.
        classes: Number of classes that the network tells apart.
        alpha: Chance of any false group at all.
        minimum: Smallest group that is reported.
        at_most: Most groups that are reported.
    """
    label, guess = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    positions = np.asarray(mapped, dtype=np.int64)
    found = [*_called(label, guess, classes), *_confusions(label, guess, classes, minimum)]
    tests = classes + _confusion_tests(label, guess, classes, minimum)
    looks = looked_at(maps) if len(positions) else np.zeros((0, len(REGIONS)), dtype=np.bool_)
    for predicted_class in (None, *_testable(label[positions], guess[positions], minimum)):
        found += _by_region(label, guess, positions, looks, predicted_class)
        tests += len(REGIONS)
    adjusted = holm([group.p_value for group in found], tests)
    sure = [
        replace(group, p_adjusted=p)
        for group, p in zip(found, adjusted, strict=True)
        if p <= alpha and group.size >= minimum
    ]
    kept = sorted(_distinct(sure), key=lambda group: (group.p_adjusted, -group.size))
    wrong = label[positions] != guess[positions]
    return GroupSearch(
        groups=tuple(kept[:at_most]),
        tests=tests,
        alpha=alpha,
        minimum=minimum,
        errors=int((label != guess).sum()),
        errors_with_maps=int(wrong.sum()),
        right_with_maps=int((~wrong).sum()),
    )


# --- what was said --------------------------------------------------------------------------------


def _called(label: Integers, guess: Integers, classes: int) -> Iterator[ErrorGroup]:
    """Yield "anything called b" for each class b that errors fall on.

    Chance: each image is as likely to be wrong as any other, and each wrong one as likely to fall
    on any of the other classes, so P[an error falls on b] = share of images not of b / (K - 1).
    """
    wrong = np.flatnonzero(label != guess)
    if not len(wrong) or classes < 2:
        return
    own = np.bincount(label, minlength=classes) / len(label)
    chances = (1 - own) / (classes - 1)
    counts = np.bincount(guess[wrong], minlength=classes)
    p_values = stats.binom.sf(counts - 1, len(wrong), chances)
    for b in np.flatnonzero(counts).tolist():
        yield ErrorGroup(
            kind="confusion",
            label=_shared(label[wrong[guess[wrong] == b]]),
            predicted=b,
            region=None,
            members=wrong[guess[wrong] == b],
            of=len(wrong),
            expected=float(len(wrong) * chances[b]),
            compared=np.empty(0, dtype=np.int64),
            compared_share=None,
            p_value=float(p_values[b]),
            test="exact binomial test, one-sided: errors strike any image and any class alike",
        )


def _confusions(
    label: Integers, guess: Integers, classes: int, minimum: int
) -> Iterator[ErrorGroup]:
    """Yield "a called b" for each such pair that occurs and could form a group.

    Only errors that could have been either enter: not those on b, nor those called a. Among them,
    given how many there are on a and how many are called b, the pair's number is hypergeometric.
    """
    table = _error_table(label, guess, classes)
    on, called = table.sum(axis=1), table.sum(axis=0)
    wrong = label != guess
    for a, b in np.argwhere(table).tolist():
        if on[a] < minimum or called[b] < minimum:
            continue
        count = int(table[a, b])
        total = int(table.sum() - on[b] - called[a] + table[b, a])
        of_a, as_b = int(on[a]), int(called[b])
        yield ErrorGroup(
            kind="confusion",
            label=a,
            predicted=b,
            region=None,
            members=np.flatnonzero(wrong & (label == a) & (guess == b)),
            of=int(wrong.sum()),
            expected=of_a * as_b / total,
            compared=np.empty(0, dtype=np.int64),
            compared_share=None,
            p_value=float(stats.hypergeom.sf(count - 1, total, as_b, of_a)),
            test="exact hypergeometric test, one-sided: label and answer of errors are unrelated",
        )


def _confusion_tests(label: Integers, guess: Integers, classes: int, minimum: int) -> int:
    """Return how many pairs could form a group, given their margins alone."""
    table = _error_table(label, guess, classes)
    on, called = table.sum(axis=1) >= minimum, table.sum(axis=0) >= minimum
    return int(on.sum() * called.sum() - (on & called).sum())


def _error_table(label: Integers, guess: Integers, classes: int) -> Integers:
    wrong = label != guess
    flat = np.bincount(label[wrong] * classes + guess[wrong], minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


# --- where the network looked ---------------------------------------------------------------------


def _by_region(
    label: Integers, guess: Integers, mapped: Integers, looks: Booleans, predicted: int | None
) -> Iterator[ErrorGroup]:
    """Yield "looked at r" for every region, over all predicted classes or within one."""
    chosen = np.flatnonzero((predicted is None) | (guess[mapped] == predicted))
    images, wrong = mapped[chosen], (label != guess)[mapped[chosen]]
    test = (
        "exact hypergeometric test, one-sided: wrong and right images of the same predicted class "
        "look there alike"
        if predicted is None
        else "Fisher's exact test, one-sided: wrong and right images of this predicted class look "
        "there alike"
    )
    for column, region in enumerate(REGIONS):
        there = looks[chosen, column]
        if not (there & wrong).any():
            continue
        expected, p_value = added_hypergeometric(guess[images], wrong, there)
        members = images[there & wrong]
        yield ErrorGroup(
            kind="region" if predicted is None else "both",
            label=_shared(label[members]),
            predicted=predicted if predicted is not None else _shared(guess[members], 1.0),
            region=region,
            members=members,
            of=int((label != guess)[mapped].sum()),
            expected=expected,
            compared=images[~wrong],
            compared_share=float(there[~wrong].mean()) if (~wrong).any() else None,
            p_value=p_value,
            test=test,
        )


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


def _testable(label: Integers, guess: Integers, minimum: int) -> list[int]:
    """Return the predicted classes with enough wrong and right images to compare."""
    wrong = np.bincount(guess[label != guess], minlength=1)
    right = np.bincount(guess[label == guess], minlength=1)
    both = min(len(wrong), len(right))
    enough = (wrong[:both] >= minimum) & (right[:both] >= minimum)
    return [int(b) for b in np.flatnonzero(enough)]


# --- which of them are told -----------------------------------------------------------------------


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


def _distinct(groups: Sequence[ErrorGroup]) -> list[ErrorGroup]:
    """Return groups that tell a reader different things.

    Confusions that hold mostly the same images are told by the surest one. Groups that looked
    somewhere compete where one lies mostly within another (a corner within an edge): the tightest
    region is told that holds nearly all of the errors in excess of chance.
    """
    kept: list[ErrorGroup] = []
    for group in sorted(groups, key=lambda one: (one.p_value, -one.size)):
        if group.region is None and not any(_overlap(group, other) for other in kept):
            kept.append(group)
    waiting = [group for group in groups if group.region is not None]
    while waiting:
        surest = min(waiting, key=lambda one: one.p_value)
        rivals = [group for group in waiting if _overlap(group, surest)]
        most = max(group.excess for group in rivals)
        # Below chance, which only a lax alpha lets through, the least is the most.
        enough = min(most, NEARLY_ALL * most)
        telling = [group for group in rivals if group.excess >= enough]
        # Of groups that look alike the one within a predicted class says more.
        told = min(telling, key=lambda one: (one.area, one.kind != "both", one.p_value))
        kept.append(told)
        waiting = [g for g in waiting if not _overlap(g, surest) and not _overlap(g, told)]
    return kept


def _overlap(one: ErrorGroup, other: ErrorGroup) -> bool:
    """Whether two confusions hold mostly the same images, or one region lies mostly in another."""
    if (one.region is None) != (other.region is None):
        return False  # what was said, and where it looked on top of that: both are worth telling
    shared = len(np.intersect1d(one.members, other.members))
    smaller, union = min(one.size, other.size), one.size + other.size - shared
    return shared > SAME_IMAGES * (union if one.region is None else smaller)


def _shared(values: Integers, least: float = SHARED_LABEL) -> int | None:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()]) if counts.max() >= least * len(values) else None
