"""Cases 1 to 4: was the prediction right, and did the map lie on the object?

    case 1  right, accurate map        case 3  right, inaccurate map
    case 2  wrong, accurate map        case 4  wrong, inaccurate map

Source: Halliwell and Lecue 2020, Fig. 2; the table of shares with intervals is their Table 3. What
makes a map accurate comes from one of three sources: masks of the object, votes of people, or the
proxy of `audit.faithfulness` where there is neither. The source, its threshold and its rule in
words travel with every result, so that a proxy is never taken for the truth. Nothing here needs
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from audit.statistics import Interval, wilson

__all__ = [
    "CASES",
    "MapAccuracy",
    "Source",
    "assign_cases",
    "by_masks",
    "by_proxy",
    "by_votes",
    "case_table",
    "vote_share",
]

Source = Literal["masks", "votes", "proxy"]
CASES = (1, 2, 3, 4)
_MANY, _RARE = 50, 0.01


@dataclass(frozen=True, kw_only=True)
class MapAccuracy:
    """Which maps are accurate, by what rule; None where the source says nothing of an image.

    `note` is a warning about the source, empty where there is nothing to warn of.
    """

    source: Source
    threshold: float
    rule: str
    accurate: tuple[bool | None, ...]
    note: str = ""


def by_masks(energy_inside: ArrayLike, threshold: float) -> MapAccuracy:
    """Return which maps have at least a share `threshold` of their energy inside the mask.

    Args:
        energy_inside: Per image in [0, 1]; NaN where there is no mask.
    """
    return MapAccuracy(
        source="masks",
        threshold=threshold,
        rule=f"A map is accurate if at least {threshold:.0%} of its energy lies inside the mask of "
        "the object.",
        accurate=_at_least(energy_inside, threshold),
    )


def by_proxy(faithfulness: ArrayLike, threshold: float) -> MapAccuracy:
    """Return which maps pass for accurate by insertion.

    The threshold is an absolute probability, tuned on networks of five classes. Where (nearly) all
    maps of many fall on one side of it, it tells nothing apart, and no image is given a case.

    Args:
        faithfulness: Per image, as `audit.faithfulness.faithfulness` gives it; NaN where it was
            not measured.
    """
    accurate = _at_least(faithfulness, threshold)
    known = [passes for passes in accurate if passes is not None]
    note = ""
    if len(known) >= _MANY and not _RARE <= sum(known) / len(known) <= 1 - _RARE:
        accurate = (None,) * len(accurate)
        note = (
            f"The proxy tells nothing about this network: {sum(known)} of {len(known)} maps reach "
            f"its threshold of {threshold:.2f}, so no image was given a case. Give masks of the "
            "objects with --masks."
        )
    return MapAccuracy(
        source="proxy",
        threshold=threshold,
        rule="Proxy: a map passes for accurate if the region that it keeps, shown alone on a "
        "blurred image, is taken for the true class with a mean probability of at least "
        f"{threshold:.2f} (insertion). No mask and no person has said where the object is.",
        accurate=accurate,
        note=note,
    )


def by_votes(
    paths: Sequence[str], votes: Mapping[str, Sequence[bool]], *, threshold: float = 0.5
) -> MapAccuracy:
    """Return which maps a majority of people called accurate.

    Args:
        paths: The images, in the order of the result.
        votes: By path, one answer a person: does the map lie on the object? Images that nobody
            voted on, and ties, stay undecided.
        threshold: The share of yes that has to be exceeded; no needs as much of the rest.
    """
    accurate: list[bool | None] = []
    for path in paths:
        share = vote_share(votes.get(path, ()))
        if math.isnan(share.value) or share.value == threshold:
            accurate.append(None)
        else:
            accurate.append(share.value > threshold)
    return MapAccuracy(
        source="votes",
        threshold=threshold,
        rule=f"A map is accurate if more than {threshold:.0%} of the people who judged it say that "
        "it lies on the object.",
        accurate=tuple(accurate),
    )


def vote_share(votes: Sequence[bool]) -> Interval:
    """Return the share of yes among one image's votes with its Wilson interval."""
    return wilson(sum(map(bool, votes)), len(votes))


def assign_cases(right: ArrayLike, accurate: Sequence[bool | None]) -> list[int | None]:
    """Return the case of each image, None where nothing is known of its map."""
    cases: list[int | None] = []
    for correct, lies_on_object in zip(np.asarray(right, dtype=bool), accurate, strict=True):
        if lies_on_object is None:
            cases.append(None)
        else:
            cases.append((1 if lies_on_object else 3) + (0 if correct else 1))
    return cases


def case_table(cases: Sequence[int | None], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the share of images in each case, over all images and for each class, JSON-ready.

    One row has `class` (None over all), `n` images with a case, `without` images that have none,
    and `case1` to `case4`: `count`, and the share as `value` with its 95 % Wilson interval `low`
    and `high`.

    Args:
        class_names: The true class of each image; rows follow their first appearance.
    """
    if len(cases) != len(class_names):
        raise ValueError(f"{len(cases)} cases for {len(class_names)} images")
    members: dict[str | None, list[int | None]] = {None: list(cases)}
    for case, name in zip(cases, class_names, strict=True):
        members.setdefault(name, []).append(case)
    return [_row(name, found) for name, found in members.items()]


def _row(name: str | None, cases: Sequence[int | None]) -> dict[str, Any]:
    known = [case for case in cases if case is not None]
    row: dict[str, Any] = {"class": name, "n": len(known), "without": len(cases) - len(known)}
    for case in CASES:
        count = known.count(case)
        row[f"case{case}"] = {"count": count, **wilson(count, len(known)).as_dict()}
    return row


def _at_least(values: ArrayLike, threshold: float) -> tuple[bool | None, ...]:
    return tuple(
        None if math.isnan(value) else value >= threshold
        for value in np.asarray(values, dtype=np.float64).tolist()
    )
