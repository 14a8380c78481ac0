"""What a repair does unless told otherwise: it depends on what the scan knows.

Where a scan knows what the network may look at (masks) or must not (the region of an error group),
the repair is told so; otherwise it has the paper's loss. Images in which the shortcut of an error
group is wrong often enough teach the layer better of it than made ones; where it is nearly always
right, or only masks are known, the images are counterfactuals. `benchmarks/repair_shortcut.py` has
the figures.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from repair.config import RepairConfig
from repair.guidance import guidance_source, share_right

if TYPE_CHECKING:
    from audit.networks import Layer
    from audit.runs import Run

GUIDED_LOSS = "energy"
UNGUIDED_LOSS = "trust"
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
        choose: Which of `loss` and `counterfactuals` the run decides.
        masks: Masks that the user names.
        group: Error group that the user names.
    """
    if "loss" not in choose:
        return config, None
    source = guidance_source(run, masks=masks, group=group)
    guided = source is not None
    loss = (GUIDED_LOSS if guided else UNGUIDED_LOSS) if layer.has_maps else "ce"
    config = replace(config, loss=loss)
    if "counterfactuals" in choose and source is not None:
        agreeing = None if isinstance(source, Path) else share_right(run, source)
        enough = agreeing is not None and 1 - agreeing >= ENOUGH_COUNTEREXAMPLES
        config = replace(config, counterfactuals=not enough)
    images = " on counterfactual images" if config.counterfactuals else ""
    return config, f"the loss is {loss}{images}: {_reason(layer, guided)}; --loss chooses another"


def _reason(layer: Layer, guided: bool) -> str:
    if not layer.has_maps:
        return f"{layer.name} has no maps"
    if guided:
        return "it is known where the network may look"
    return "nothing says where the network may look"
