"""Which errors share something? Groups of failing images that chance does not explain.

Systematic means that failures share what was said, where the network looked, or both. Every such
candidate is tested (`audit.candidates`), and all tests together are corrected after Holm (1979):
the chance of a single false group among all of them is at most `alpha`. Of groups that overlap the
one is told that says most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audit.candidates import (
    ErrorGroup,
    by_artefact,
    by_region,
    called,
    confusion_tests,
    confusions,
    testable,
)
from audit.chance import holm
from audit.regions import REGIONS, looked_at

__all__ = ["ErrorGroup", "GroupSearch", "find_groups"]

SAME_IMAGES = 0.5
NEARLY_ALL = 0.8


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
    carriers: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None,
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
        carriers: Positions of images, (C,), drawn without looking at labels, and which of them
            carry the pixels that many of them share; None where none are shared.
        alpha: Chance of any false group at all.
        minimum: Smallest group that is reported.
        at_most: Most groups that are reported.
    """
    label, guess = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    positions = np.asarray(mapped, dtype=np.int64)
    found = [*called(label, guess, classes), *confusions(label, guess, classes, minimum)]
    tests = classes + confusion_tests(label, guess, classes, minimum)
    looks = looked_at(maps) if len(positions) else np.zeros((0, len(REGIONS)), dtype=np.bool_)
    for predicted_class in (None, *testable(label[positions], guess[positions], minimum)):
        found += by_region(label, guess, positions, looks, predicted_class)
        tests += len(REGIONS)
    adjusted = holm([group.p_value for group in found], tests)
    if carriers is not None:
        # One test, that has as much of alpha as all the others together: there are so many where
        # there are many classes that it would get none.
        carrying = list(by_artefact(label, guess, *carriers))
        found, tests = [*found, *carrying], tests + 1
        adjusted = [min(1.0, 2 * p) for p in (*adjusted, *(one.p_value for one in carrying))]
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


# --- which of them are told -----------------------------------------------------------------------


def _distinct(groups: Sequence[ErrorGroup]) -> list[ErrorGroup]:
    """Return groups that tell a reader different things.

    Confusions that hold mostly the same images are told by the surest one. Groups that looked
    somewhere compete where one lies mostly within another (a corner within an edge): the tightest
    region is told that holds nearly all of the errors in excess of chance.
    """
    kept: list[ErrorGroup] = []
    said = [group for group in groups if group.kind == "confusion"]
    for group in sorted(said, key=lambda one: (one.p_value, -one.size)):
        if not any(_overlap(group, other) for other in kept):
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
    return [*kept, *(group for group in groups if group.kind == "artefact")]


def _overlap(one: ErrorGroup, other: ErrorGroup) -> bool:
    """Whether two confusions hold mostly the same images, or one region lies mostly in another."""
    if (one.region is None) != (other.region is None):
        return False  # what was said, and where it looked on top of that: both are worth telling
    shared = len(np.intersect1d(one.members, other.members))
    smaller, union = min(one.size, other.size), one.size + other.size - shared
    return shared > SAME_IMAGES * (union if one.region is None else smaller)
