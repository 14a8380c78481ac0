"""The artefact behind an error group: which images are compared for it, and what is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audit.artefacts import SMALLEST, Artefact, common_artefact, find_artefact
from audit.groups import ErrorGroup, GroupSearch, find_groups
from audit.regions import region_holding
from audit.runs import Run
from audit.wording import percent

__all__ = [
    "CommonArtefact",
    "GroupArtefact",
    "find_common_artefact",
    "find_group_artefact",
    "group_artefacts",
    "groups_with_artefacts",
]

LOOKED_AT = 64  # images of a group, twice as many others, four times as many called alike
SOUGHT_IN, COUNTED_IN = 192, 512  # images of any kind
ENOUGH = 32  # right images of the same classes to compare with; with fewer, right ones of any class

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class CommonArtefact:
    """Pixels that many images share, whatever is said of them.

    Attributes:
        seen: Places of images, drawn from all alike, (C,).
        carried: Which of them carry it, (C,).
    """

    artefact: Artefact
    seen: Integers
    carried: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class GroupArtefact:
    """An artefact, and how many images carry it of those that were looked at.

    Attributes:
        agreeing: Share right of the images that carry it and were called what the group's were, of
            all of them or of a draw; None where fewer than eight carry it.
        called: How many those are.
        alike: False where they were called anything: in a group of what many images share.
    """

    artefact: Artefact
    group: int
    group_carriers: int
    others: int
    others_carriers: int
    agreeing: float | None
    called: int
    alike: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return what `groups.json` holds; the pixels lie beside it."""
        found = self.artefact
        return {
            "sentence": self.sentence,
            "share_of_image": found.share,
            "box": list(found.box),
            "threshold": found.threshold,
            "looked_at": self.group,
            "carriers": self.group_carriers,
            "right_looked_at": self.others,
            "right_carriers": self.others_carriers,
            "agreeing": self.agreeing,
        }

    @property
    def sentence(self) -> str:
        place = region_holding(self.artefact.mask.numpy())
        where = place.name if place else "one place"
        return (
            f"{self.group_carriers} of {self.group} of its images look alike in {where}, "
            f"{percent(self.artefact.share)} of the image; {self.others_carriers} of {self.others} "
            f"right images do.{self._agreement}"
        )

    @property
    def _agreement(self) -> str:
        if self.agreeing is None:
            return ""
        share = percent(self.agreeing, 0)
        alike = " and were called alike" if self.alike else ""
        return f" Of {self.called} images that carry it{alike}, {share} are right."


def find_common_artefact(
    load: Callable[[Integers], Tensor], images: int, *, seed: int
) -> CommonArtefact | None:
    """Return the pixels that many images share, None where they share none.

    Args:
        load: As for `group_artefacts`.
        images: How many there are.
        seed: Of the draw, where there are many.
    """
    if images < SMALLEST:
        return None
    drawn = np.random.default_rng(seed).permutation(images)[:COUNTED_IN]
    first, pixels = _readable(load, drawn[:SOUGHT_IN])
    artefact = common_artefact(pixels)
    if artefact is None:
        return None
    seen, carried = [first], [artefact.carried_by(pixels).numpy()]
    for start in range(SOUGHT_IN, len(drawn), SOUGHT_IN):
        places, pixels = _readable(load, drawn[start : start + SOUGHT_IN])
        seen.append(places)
        carried.append(artefact.carried_by(pixels).numpy())
    return CommonArtefact(
        artefact=artefact, seen=np.concatenate(seen), carried=np.concatenate(carried)
    )


def groups_with_artefacts(
    load: Callable[[Integers], Tensor],
    labels: Integers,
    guesses: Integers,
    mapped: Integers,
    maps: NDArray[np.floating],
    *,
    classes: int,
    seed: int,
) -> tuple[GroupSearch, list[GroupArtefact | None]]:
    """Return the error groups, and the pixels that the images of each share.

    Where many images share pixels, those that carry them are a group of their own, unless the
    images of another group share pixels: that one says what they are called as well.

    Args:
        load, labels, guesses, seed: As for `group_artefacts`.
        mapped, maps, classes: As for `find_groups`.
    """
    common = find_common_artefact(load, len(labels), seed=seed)
    carriers = None if common is None else (common.seen, common.carried)
    search = find_groups(labels, guesses, mapped, maps, classes=classes, carriers=carriers)
    found = group_artefacts(load, labels, guesses, search.groups, common, seed=seed)
    told = list(zip(search.groups, found, strict=True))
    if any(artefact and group.kind != "artefact" for group, artefact in told):
        told = [(group, artefact) for group, artefact in told if group.kind != "artefact"]
    return replace(search, groups=tuple(group for group, _ in told)), [one for _, one in told]


def group_artefacts(
    load: Callable[[Integers], Tensor],
    labels: Integers,
    guesses: Integers,
    groups: Sequence[ErrorGroup],
    common: CommonArtefact | None = None,
    *,
    seed: int,
) -> list[GroupArtefact | None]:
    """Return for each group the pixels that its images share, None where they share none.

    Args:
        load: Returns the pixels of the images at some places in `labels`, uint8 (n, 3, H, W);
            those that cannot be read are left out.
        labels: True classes of the images that were sought for groups, (N,).
        guesses: What was said of them, (N,).
        groups: The groups.
        common: What many images share, where there is a group of those that carry it.
        seed: Of the draws, where there are many images.
    """
    found: list[GroupArtefact | None] = []
    for number, group in enumerate(groups):
        if group.kind == "artefact" and common is not None:
            found.append(_of_carriers(labels == guesses, group, common))
            continue
        generator = np.random.default_rng([seed, number])
        others = _compared(labels, guesses, group)
        ours = load(_drawn(group.members, LOOKED_AT, generator))
        theirs = load(_drawn(others, 2 * LOOKED_AT, generator))
        artefact = find_artefact(ours, theirs)
        if artefact is None:
            found.append(None)
            continue
        alike = np.flatnonzero(np.isin(guesses, guesses[group.members]))
        agreeing, called = _agreeing(load, labels == guesses, alike, artefact, generator)
        found.append(
            GroupArtefact(
                artefact=artefact,
                group=len(ours),
                group_carriers=int(artefact.carried_by(ours).sum()),
                others=len(theirs),
                others_carriers=int(artefact.carried_by(theirs).sum()),
                agreeing=agreeing,
                called=called,
            )
        )
    return found


def find_group_artefact(run: Run, group: Mapping[str, Any]) -> Artefact | None:
    """Return the pixels that an error group's images share, None where they share none."""
    told = group.get("artefact")
    if not told:
        return None
    place = [one["id"] for one in run.groups["groups"]].index(group["id"])
    mask, picture = run.group_artefact(place)
    return Artefact(
        mask=torch.from_numpy(mask),
        picture=torch.from_numpy(picture).permute(2, 0, 1),
        threshold=float(told["threshold"]),
    )


def _drawn(places: Integers, at_most: int, generator: np.random.Generator) -> Integers:
    return np.sort(generator.permutation(places)[:at_most])


def _of_carriers(
    right: NDArray[np.bool_], group: ErrorGroup, common: CommonArtefact
) -> GroupArtefact:
    """Return what many images share, and how many of those that carry it are right."""
    among_right, carriers = right[common.seen], int(common.carried.sum())
    agreeing = int((among_right & common.carried).sum())
    return GroupArtefact(
        artefact=common.artefact,
        group=group.size,
        group_carriers=group.size,
        others=int(among_right.sum()),
        others_carriers=agreeing,
        agreeing=agreeing / carriers,
        called=carriers,
        alike=False,
    )


def _readable(load: Callable[[Integers], Tensor], places: Integers) -> tuple[Integers, Tensor]:
    """Return the places of images that can be read, and their pixels."""
    pixels = load(places)
    if len(pixels) < len(places):
        each = [load(places[at : at + 1]) for at in range(len(places))]
        places, pixels = places[[len(one) > 0 for one in each]], torch.cat(each)
    return places, pixels


def _agreeing(
    load: Callable[[Integers], Tensor],
    right: NDArray[np.bool_],
    alike: Integers,
    artefact: Artefact,
    generator: np.random.Generator,
) -> tuple[float | None, int]:
    """Return which share of the images called alike that carry an artefact is right, and of how
    many. Wrong and right ones are drawn as they come, unlike those that it was found in."""
    places, pixels = _readable(load, _drawn(alike, 4 * LOOKED_AT, generator))
    carrying = places[artefact.carried_by(pixels).numpy()]
    share = float(right[carrying].mean()) if len(carrying) >= SMALLEST else None
    return share, len(carrying)


def _compared(labels: Integers, guesses: Integers, group: ErrorGroup) -> Integers:
    """Return the right images of the group's classes, or where they are few, of any class."""
    right = labels == guesses
    alike = np.flatnonzero(right & np.isin(labels, labels[group.members]))
    return alike if len(alike) >= ENOUGH else np.flatnonzero(right)
