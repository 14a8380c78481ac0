"""What a repair learns from: the images of its run by split, and where their maps may lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from audit import console
from audit.images import ImageFolder, SkippedFile
from audit.runs import Run
from repair.config import RepairConfig
from repair.counterfactuals import Counterfactuals, draw_donors
from repair.guidance import Guidance, find_guidance
from repair.sources import Additions, open_scanned_images, positions, with_training_images
from repair.teaching import check_can_hide, mixed_targets, own_answers

if TYPE_CHECKING:
    from audit.networks import Layer, Network

_SPLITS = ("train", "val", "test")

CHANGED = "counterfactual test"
"""The split of test images with other images' pixels where the network must not look."""


@dataclass(frozen=True, kw_only=True)
class RepairImages:
    """The images of a repair and what became of those that it could not use."""

    folder: ImageFolder
    positions: dict[str, tuple[int, ...]]
    changed: tuple[SkippedFile, ...]
    additions: Additions | None
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        run: Run,
        network: Network,
        *,
        data: Path | None = None,
        train: Path | None = None,
        seed: int = 0,
    ) -> RepairImages:
        """Return the run's images, with those of a further training folder.

        Args:
            data: Where the run's images are, if they have moved.
            train: Folder of further training images.
            seed: Of that folder's splits.
        """
        folder, changed = open_scanned_images(run, data=data)
        additions = None
        if train is not None:
            folder, additions = with_training_images(folder, train, network.card.classes, seed=seed)
        found = {split: positions(folder, split) for split in _SPLITS}  # type: ignore[arg-type]
        return cls(folder=folder, positions=found, changed=changed, additions=additions)

    def class_weights(self, network: Network, config: RepairConfig) -> Tensor | None:
        """Return the weight of each class's images, None where all images weigh alike."""
        if not config.balance_classes:
            return None
        from sklearn.utils.class_weight import compute_class_weight

        labels = [self.folder.records[i].label for i in self.positions["train"]]
        present = np.unique(labels)
        weights = torch.ones(len(network.card.classes))
        found = compute_class_weight("balanced", classes=present, y=labels)
        weights[present] = torch.from_numpy(found).float()
        return weights

    def skip(self, position: int, reason: str) -> None:
        self.skipped[self.folder.records[position].path] = reason

    def as_dict(self) -> dict[str, Any]:
        return {
            "root": str(self.folder.root),
            "changed": [vars(skip) for skip in self.changed],
            "skipped": [{"path": path, "reason": why} for path, why in self.skipped.items()],
            "added": self.additions.as_dict() if self.additions else None,
        }


def hidden_pixels(
    run: Run,
    network: Network,
    images: RepairImages,
    config: RepairConfig,
    *,
    masks: Path | None = None,
    group: str | None = None,
) -> Guidance | None:
    """Return which pixels of an image mislead the network, None where the settings hide none.

    Raises:
        LayermendError: They hide some, and nothing says which; or they ask for answers without
            them, and it is not known which images they mislead in.
    """
    if not config.counterfactuals and not config.distill:
        return None
    guidance = find_guidance(
        run,
        images.folder,
        [position for split in _SPLITS for position in images.positions[split]],
        network.card.preprocessing,
        network.program.input_size,
        masks=masks,
        group=group,
    )
    if config.distill:
        check_can_hide(guidance)
    return guidance


def make_counterfactuals(
    network: Network, images: RepairImages, config: RepairConfig, guidance: Guidance | None
) -> dict[str, tuple[Counterfactuals, ...]]:
    """Return how the images are made counterfactual, by split: with as many donors an image as the
    settings say for those of training, else with one. Those of the test split stand beside them as
    they are, by the name of `CHANGED`: what is judged is not changed.

    Nothing where the settings ask for none.
    """
    made: dict[str, tuple[Counterfactuals, ...]] = {}
    if not config.counterfactuals or guidance is None:
        return made
    versions = min(config.donors, config.epochs)  # no epoch would take the others
    for number, split in enumerate(_SPLITS):
        own = images.positions[split]
        made[CHANGED if split == "test" else split] = tuple(
            Counterfactuals(
                folder=images.folder,
                preprocessing=network.card.preprocessing,
                allowed=guidance.masks,
                donors=draw_donors(
                    own,
                    guidance.masks,
                    seed=2 * config.seed + number,
                    version=version,
                    # An object can be hidden where its mask is known.
                    lenders=guidance.masks.among(own) if guidance.hides_objects else own,
                ),
                hide_objects=guidance.hides_objects,
            )
            for version in range(versions if split == "train" else 1)
        )
    return made


def find_targets(
    network: Network,
    images: RepairImages,
    config: RepairConfig,
    guidance: Guidance | None,
    own: Sequence[int],
) -> Tensor | None:
    """Return what the training images are to be taken for, as `train_layer` has it; None for their
    labels.

    Args:
        guidance: From `hidden_pixels`.
        own: Positions of the training images that this process learns from.

    Raises:
        RunError: No image can show what else could be there.
    """
    if not config.distill or guidance is None:
        return None
    with console.progress("asking the network, artefacts hidden", None) as bar:
        answers = own_answers(
            network,
            images.folder,
            images.positions["train"],
            guidance,
            own=own,
            divisor=config.divisor,
            batch_size=config.batch_size,
            seed=config.seed,
            on_image=bar.advance,
        )
    labels = [record.label for record in images.folder.records]
    return mixed_targets(answers, labels, config.distill)


def find_guide(
    run: Run,
    network: Network,
    images: RepairImages,
    config: RepairConfig,
    *,
    masks: Path | None = None,
    group: str | None = None,
) -> Callable[[Layer], Guidance | None]:
    """Return what says where the maps at a layer may lie; nothing where the loss does not ask."""

    found: dict[tuple[int, int], Guidance] = {}

    def at(layer: Layer) -> Guidance | None:
        if not config.loss_function.needs_masks:
            return None
        size = network.program.input_size if config.looks_at_pixels else layer.map_size
        if size not in found:
            found[size] = find_guidance(
                run,
                images.folder,
                images.positions["train"],
                network.card.preprocessing,
                size,
                masks=masks,
                group=group,
            )
        return found[size]

    return at
