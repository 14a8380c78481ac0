"""Candidates for error groups: what failing images may share, each tested against chance.

- **confusion**: "anything called dog" against errors that strike any image and any other class
  alike (exact binomial test); "cat called dog" against what the numbers of errors on cats and of
  errors called dog give by themselves (exact hypergeometric test).
- **region**: wrong images look at a region more often than right images *of the same predicted
  class* (exact hypergeometric test, its counts added over predicted classes).
- **both**: the same within one predicted class (one stratum: Fisher's exact test, one-sided).
- **artefact**: wrong images carry pixels that many images share, wrong or right, more often than
  right ones do (Fisher's exact test, one-sided).

Regions are fixed beforehand (`audit.regions`), and what is tested never depends on where images
look, nor are shared pixels sought by what is said of images: nothing is found and tested on the
same counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from audit.chance import added_hypergeometric
from audit.regions import REGIONS, Region

__all__ = [
    "ErrorGroup",
    "by_artefact",
    "by_region",
    "called",
    "confusion_tests",
    "confusions",
    "testable",
]

Kind = Literal["confusion", "region", "both", "artefact"]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

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
        compared_share: Share of those that look at the region, or carry the artefact; None for
            confusions.
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


# --- what was said --------------------------------------------------------------------------------


def called(label: Integers, guess: Integers, classes: int) -> Iterator[ErrorGroup]:
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


def confusions(
    label: Integers, guess: Integers, classes: int, minimum: int
) -> Iterator[ErrorGroup]:
    """Yield "a called b" for each such pair that occurs and could form a group.

    Only errors that could have been either enter: not those on b, nor those called a. Among them,
    given how many there are on a and how many are called b, the pair's number is hypergeometric.
    """
    table = _error_table(label, guess, classes)
    on, onto = table.sum(axis=1), table.sum(axis=0)
    wrong = label != guess
    for a, b in np.argwhere(table).tolist():
        if on[a] < minimum or onto[b] < minimum:
            continue
        count = int(table[a, b])
        total = int(table.sum() - on[b] - onto[a] + table[b, a])
        of_a, as_b = int(on[a]), int(onto[b])
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


def confusion_tests(label: Integers, guess: Integers, classes: int, minimum: int) -> int:
    """Return how many pairs could form a group, given their margins alone."""
    table = _error_table(label, guess, classes)
    on, onto = table.sum(axis=1) >= minimum, table.sum(axis=0) >= minimum
    return int(on.sum() * onto.sum() - (on & onto).sum())


def _error_table(label: Integers, guess: Integers, classes: int) -> Integers:
    wrong = label != guess
    flat = np.bincount(label[wrong] * classes + guess[wrong], minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


# --- where the network looked ---------------------------------------------------------------------


def by_region(
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


def testable(label: Integers, guess: Integers, minimum: int) -> list[int]:
    """Return the predicted classes with enough wrong and right images to compare."""
    wrong = np.bincount(guess[label != guess], minlength=1)
    right = np.bincount(guess[label == guess], minlength=1)
    both = min(len(wrong), len(right))
    enough = (wrong[:both] >= minimum) & (right[:both] >= minimum)
    return [int(b) for b in np.flatnonzero(enough)]


# --- what is in the images ------------------------------------------------------------------------


def by_artefact(
    label: Integers, guess: Integers, seen: Integers, carried: Booleans
) -> Iterator[ErrorGroup]:
    """Yield "carries it", of the images in `seen`, in whose order `carried` says which do."""
    wrong = (label != guess)[seen]
    if not (wrong & carried).any():
        return
    expected, p_value = added_hypergeometric(np.zeros(len(seen)), wrong, carried)
    members = seen[wrong & carried]
    yield ErrorGroup(
        kind="artefact",
        label=_shared(label[members]),
        predicted=_shared(guess[members], 1.0),
        region=None,
        members=members,
        of=int(wrong.sum()),
        expected=expected,
        compared=seen[~wrong],
        compared_share=float(carried[~wrong].mean()) if (~wrong).any() else None,
        p_value=p_value,
        test="Fisher's exact test, one-sided: wrong and right images carry the artefact alike",
    )


def _shared(values: Integers, least: float = SHARED_LABEL) -> int | None:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()]) if counts.max() >= least * len(values) else None
