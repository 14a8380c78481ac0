"""The artefact behind an error group: which images are compared for it, and what is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audit.artefacts import SMALLEST, Artefact, find_artefact
from audit.groups import ErrorGroup
from audit.runs import Run
from audit.wording import percent

__all__ = ["GroupArtefact", "find_group_artefact", "group_artefacts"]

LOOKED_AT = 64  # images of a group, twice as many others, four times as many called alike
ENOUGH = 32  # right images of the same classes to compare with; with fewer, right ones of any class

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GroupArtefact:
    """An artefact, and how many images carry it of those that were looked at.

    Attributes:
        agreeing: Share right of the images that carry it and were called what the group's were, of
            all of them or of a draw; None where fewer than eight carry it.
        called: How many those are.
    """

    artefact: Artefact
    group: int
    group_carriers: int
    others: int
    others_carriers: int
    agreeing: float | None
    called: int

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
        return (
            f"{self.group_carriers} of {self.group} of its images look alike in one place, "
            f"{percent(self.artefact.share)} of the image; {self.others_carriers} of {self.others} "
            f"right images do.{self._agreement}"
        )

    @property
    def _agreement(self) -> str:
        if self.agreeing is None:
            return ""
        share = percent(self.agreeing, 0)
        return f" Of {self.called} images that carry it and were called alike, {share} are right."


def group_artefacts(
    load: Callable[[Integers], Tensor],
    labels: Integers,
    guesses: Integers,
    groups: Sequence[ErrorGroup],
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
        seed: Of the draws, where there are many images.
    """
    found: list[GroupArtefact | None] = []
    for number, group in enumerate(groups):
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


def _agreeing(
    load: Callable[[Integers], Tensor],
    right: NDArray[np.bool_],
    alike: Integers,
    artefact: Artefact,
    generator: np.random.Generator,
) -> tuple[float | None, int]:
    """Return which share of the images called alike that carry an artefact is right, and of how
    many. Wrong and right ones are drawn as they come, unlike those that it was found in."""
    carrying = [
        place
        for place in _drawn(alike, 4 * LOOKED_AT, generator).tolist()
        if bool(artefact.carried_by(load(np.array([place]))).any())
    ]
    share = float(right[carrying].mean()) if len(carrying) >= SMALLEST else None
    return share, len(carrying)


def _compared(labels: Integers, guesses: Integers, group: ErrorGroup) -> Integers:
    """Return the right images of the group's classes, or where they are few, of any class."""
    right = labels == guesses
    alike = np.flatnonzero(right & np.isin(labels, labels[group.members]))
    return alike if len(alike) >= ENOUGH else np.flatnonzero(right)
