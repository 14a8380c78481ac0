"""What a repair does unless told otherwise: it depends on what the scan knows.

Images in which a shortcut is wrong often enough teach a layer better of it, as they are, than made
ones do. So where an error group's artefact or region is wrong in a quarter of the images, the
repair learns from them as they are, by the paper's loss, which of all that were tried wins back
most there and harms least. Where it is nearly always right
the images are counterfactual: an artefact is another image's pixels, and the layer learns what the
network itself says of the image without it (`repair.teaching`); of a region the loss is `energy`.
With masks, which say nothing about how often the rest misleads, several images lend each what lies
around its object, and the loss is plain cross entropy of logits that are not too sure
(`repair.temperature`). Where nothing is known the loss is the paper's.
`benchmarks/repair_shortcut.py` has the figures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repair.config import AUTO, RepairConfig
from repair.guidance import guidance_source, share_right

if TYPE_CHECKING:
    from audit.networks import Layer
    from audit.runs import Run

ARTEFACT_LOSS = "ce"
MASKS_LOSS = "ce"
REGION_LOSS = "energy"
UNGUIDED_LOSS = "trust"
DISTILL = 0.8
"""Share of the network's own answers where an artefact is known."""

MASK_DONORS = 8
"""How many images lend an image, in turn, what lies outside its mask."""

ENOUGH_COUNTEREXAMPLES = 0.25
"""Share wrong of the images in which the network looks at a group's region, or that carry its
artefact."""


def settle(
    run: Run,
    layer: Layer | None,
    config: RepairConfig,
    choose: Collection[str],
    *,
    masks: Path | None = None,
    group: str | None = None,
) -> tuple[RepairConfig, str | None]:
    """Return the settings with those that were left to the run decided, and how, in one line.

    Args:
        run: The scan.
        layer: To be repaired; one without maps has plain cross entropy. None where it is not yet
            known.
        config: The settings.
        choose: Which of `loss`, `counterfactuals`, `donors`, `distill` and `temperature` the run
            decides.
        masks: Masks that the user names.
        group: Error group that the user names.
    """
    if "loss" not in choose:
        return config, None
    source = guidance_source(run, masks=masks, group=group)
    made = source is not None and not _enough(run, source)
    masked = made and isinstance(source, Path)
    answers = made and not isinstance(source, Path) and bool((source or {}).get("artefact"))
    if masked:
        loss, reason = MASKS_LOSS, "it is known where the objects are"
    elif answers:
        loss, reason = ARTEFACT_LOSS, "it is known which pixels mislead the network"
    elif made:
        loss, reason = REGION_LOSS, "it is known where the network may look"
    elif source is not None:
        loss, reason = UNGUIDED_LOSS, "what misleads the network is often wrong in these images"
    else:
        loss, reason = UNGUIDED_LOSS, "nothing says where the network may look"
    if layer is not None and not layer.has_maps and loss != "ce":
        loss, reason = "ce", f"{layer.name} has no maps"
    config = replace(config, loss=loss)
    if "counterfactuals" in choose and source is not None:
        config = replace(config, counterfactuals=made)
    if "donors" in choose and config.counterfactuals and isinstance(source, Path):
        config = replace(config, donors=MASK_DONORS)
    if "temperature" in choose and masked:
        config = replace(config, temperature=AUTO)
    if "distill" in choose and answers:
        config = replace(config, distill=DISTILL)
    images = " on counterfactual images" if config.counterfactuals else ""
    images += ", by the network's own answers without the artefact" if config.distill else ""
    return config, f"the loss is {loss}{images}: {reason}; --loss chooses another"


def _enough(run: Run, source: Path | Mapping[str, Any]) -> bool:
    """Whether images show often enough that what a group says is wrong; of masks nobody knows."""
    agreeing = None if isinstance(source, Path) else share_right(run, source)
    return agreeing is not None and 1 - agreeing >= ENOUGH_COUNTEREXAMPLES
