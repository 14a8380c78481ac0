"""Which layer to repair where a scan names none: the one whose short repair does most.

A scan judges layers by the images as they are. Where a shortcut is right in nearly all of them, or
costs little among other errors, they hardly show which layer obeys it; counterfactual ones, which
a repair can make of them, do. So each candidate is trained for a few epochs on what the repair
would learn from, by plain cross entropy and at its best rate (`repair.rates`), and that one is
taken which brings the validation cross entropy lowest. Logits are divided by one temperature for
all layers (`repair.temperature`): without it those layers win that can make all answers less sure,
and the last ones can best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from repair.config import RepairConfig
from repair.controls import ranked_layers
from repair.crossing import Room, cross_splits, further_versions
from repair.rates import TRIED_EPOCHS, try_rates
from repair.temperature import fit_temperature
from repair.training import train_layer

if TYPE_CHECKING:
    from audit.images import ImageFolder
    from audit.networks import Network, Split
    from audit.parallel import Team
    from audit.runs import Run
    from repair.cache import CrossingTensors
    from repair.counterfactuals import Counterfactuals

MOST_CANDIDATES = 16
_SPLITS = ("train", "val")


def layer_candidates(run: Run) -> list[str]:
    """Return the layers among which a repair may choose: those that the verdict names where it
    names several, else the most blamed ones, `MOST_CANDIDATES` at most."""
    named = [str(name) for name in run.verdict.get("layers") or []]
    return (named if len(named) > 1 else ranked_layers(run.layers))[:MOST_CANDIDATES]


def try_layers(
    network: Network,
    names: Sequence[str],
    folder: ImageFolder,
    positions: Mapping[str, Sequence[int]],
    config: RepairConfig,
    room: Room,
    *,
    counterfactuals: Mapping[str, Sequence[Counterfactuals]],
    team: Team,
    on_skip: Callable[[int, str], None] | None = None,
    on_tried: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the validation cross entropy in nats that a short repair of each layer comes to.

    Args:
        names: Of the layers.
        folder: The images.
        positions: This process's part of them, by split.
        config: The settings of the repair; its loss and its temperature are not read, and classes
            weigh alike.
        room: For what crosses the cut of one layer.
        counterfactuals: By split, what takes the place of its images.
        team: Processes that share the images; all get the same.
        on_skip: Called with place and reason for each image that cannot be decoded.
        on_tried: Called after each layer.
    """
    own = {split: positions[split] for split in _SPLITS}
    made = {split: list(counterfactuals.get(split, ()))[:TRIED_EPOCHS] for split in _SPLITS}
    reached = {}
    for name in names:
        split = network.program.split(name)
        crossing = cross_splits(
            network,
            split,
            folder,
            own,
            room,
            batch_size=config.batch_size,
            counterfactuals=made,
            on_skip=on_skip,
        )
        further = further_versions(crossing, "train")
        reached[name] = short_repair(
            split, crossing["train"], crossing["val"], config, versions=further, team=team
        )
        on_tried()
    return reached


def short_repair(
    split: Split,
    train: CrossingTensors,
    validation: CrossingTensors,
    config: RepairConfig,
    *,
    versions: Sequence[CrossingTensors],
    team: Team,
) -> float:
    """Return the lowest validation cross entropy that the layer comes to in `TRIED_EPOCHS` epochs
    by any rate, in nats, that of the untouched one included.

    Args:
        versions: Further ones of the images to learn from.
    """
    short = replace(config, loss="ce", temperature=fit_temperature(split, validation, team=team))
    repair = partial(train_layer, split, train, validation, loss="ce", versions=versions, team=team)
    tried = try_rates(repair, short)
    return min(tried.values())


def best_layer(reached: Mapping[str, float]) -> str:
    """Return the layer with the lowest cross entropy, the first of equal ones."""
    return min(reached, key=lambda name: reached[name])
