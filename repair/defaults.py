"""What a repair does unless told otherwise: it depends on what the scan knows.

Where an error group shares an artefact, the layer learns from counterfactual images, whose artefact
is another image's pixels, what the network itself says of them without it: `repair.teaching`. Where
masks say what the network may look at, or a group's region where it must not, the repair is told
so; otherwise it has the paper's loss. Images in which the shortcut of a region is wrong often
enough teach the layer better of it than made ones; where it is nearly always right, or only masks
are known, the images are counterfactuals. `benchmarks/repair_shortcut.py` has the figures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repair.config import RepairConfig
from repair.guidance import guidance_source, share_right

if TYPE_CHECKING:
    from audit.networks import Layer
    from audit.runs import Run

ARTEFACT_LOSS = "ce"
GUIDED_LOSS = "energy"
UNGUIDED_LOSS = "trust"
DISTILL = 0.8
"""Share of the network's own answers where an artefact is known."""

ENOUGH_COUNTEREXAMPLES = 0.25
"""Share of the images in which the network looks at a group's region and is wrong."""


def settle(
    run: Run,
    layer: Layer,
    config: RepairConfig,
    choose: Collection[str],
    *,
    masks: Path | None = None,
    group: str | None = None,
) -> tuple[RepairConfig, str | None]:
    """Return the settings with those that were left to the run decided, and how, in one line.

    Args:
        run: The scan.
        layer: To be repaired; one without maps has plain cross entropy.
        config: The settings.
        choose: Which of `loss`, `counterfactuals` and `distill` the run decides.
        masks: Masks that the user names.
        group: Error group that the user names.
    """
    if "loss" not in choose:
        return config, None
    source = guidance_source(run, masks=masks, group=group)
    artefact = not isinstance(source, Path) and bool((source or {}).get("artefact"))
    if artefact:
        loss, reason = ARTEFACT_LOSS, "it is known which pixels mislead the network"
    elif source is not None:
        loss, reason = GUIDED_LOSS, "it is known where the network may look"
    else:
        loss, reason = UNGUIDED_LOSS, "nothing says where the network may look"
    if not layer.has_maps and loss != "ce":
        loss, reason = "ce", f"{layer.name} has no maps"
    config = replace(config, loss=loss)
    if "counterfactuals" in choose and source is not None:
        config = replace(config, counterfactuals=artefact or not _enough(run, source))
    if "distill" in choose and artefact:
        config = replace(config, distill=DISTILL)
    images = " on counterfactual images" if config.counterfactuals else ""
    images += ", by the network's own answers without the artefact" if config.distill else ""
    return config, f"the loss is {loss}{images}: {reason}; --loss chooses another"


def _enough(run: Run, source: Path | Mapping[str, Any]) -> bool:
    """Whether images show often enough that what a region says is wrong; of masks nobody knows."""
    agreeing = None if isinstance(source, Path) else share_right(run, source)
    return agreeing is not None and 1 - agreeing >= ENOUGH_COUNTEREXAMPLES
