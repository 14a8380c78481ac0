"""The artefact behind an error group: which images are compared for it, and what is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from audit.artefacts import Artefact, find_artefact
from audit.groups import ErrorGroup
from audit.wording import percent

__all__ = ["GroupArtefact", "group_artefacts"]

LOOKED_AT = 64  # images of a group, and twice as many others
ENOUGH = 32  # right images of the same classes to compare with; with fewer, right ones of any class

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GroupArtefact:
    """An artefact, and how many images carry it of those that were looked at."""

    artefact: Artefact
    group: int
    group_carriers: int
    others: int
    others_carriers: int

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
        }

    @property
    def sentence(self) -> str:
        return (
            f"{self.group_carriers} of {self.group} of its images look alike in one place, "
            f"{percent(self.artefact.share)} of the image; {self.others_carriers} of {self.others} "
            "right images do."
        )


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
        ours = load(np.sort(generator.permutation(group.members)[:LOOKED_AT]))
        theirs = load(np.sort(generator.permutation(others)[: 2 * LOOKED_AT]))
        artefact = find_artefact(ours, theirs)
        if artefact is None:
            found.append(None)
            continue
        found.append(
            GroupArtefact(
                artefact=artefact,
                group=len(ours),
                group_carriers=int(artefact.carried_by(ours).sum()),
                others=len(theirs),
                others_carriers=int(artefact.carried_by(theirs).sum()),
            )
        )
    return found


def _compared(labels: Integers, guesses: Integers, group: ErrorGroup) -> Integers:
    """Return the right images of the group's classes, or where they are few, of any class."""
    right = labels == guesses
    alike = np.flatnonzero(right & np.isin(labels, labels[group.members]))
    return alike if len(alike) >= ENOUGH else np.flatnonzero(right)
