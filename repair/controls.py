"""Beside what a repair is judged: the same images and steps, one thing changed.

    ce             the same layer by plain cross entropy: does the penalty do anything?
    shuffled       the same loss, each image charged for another one's map: do the maps matter?
    originals      the same loss, images and labels as they are: do counterfactual ones matter?
    labels         the same loss from labels alone: do the network's own answers matter?
    logits         the same loss, logits as they are: does the temperature matter?
    next-layer     the layer that the scan would have repaired next, by the same loss: was the right
                   layer repaired?
    random-layer   a layer drawn by the seed, by the same loss: would any layer do?
    last-layer     the last linear layer by plain cross entropy, on request: is that all it takes?
                   (Kirichenko et al. 2022, "Last layer re-training is sufficient")
    full           all layers by plain cross entropy, on request: is one layer enough?
    auto-rgn       the same, each tensor's learning rate scaled by its relative gradient norm, on
                   request (Lee et al. 2022, "Surgical fine-tuning")

`CONTROLS` names them all, `plan_controls` says which of the chosen ones a repair can have and on
which layer; `repair.layer` trains and judges them. No torch here: the command line reads its
choices and defaults from this module.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from audit.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from audit.networks import Layer

Place = Literal["same", "next", "random", "last", "all"]

ALL_LAYERS = "all layers"


@dataclass(frozen=True, kw_only=True)
class Control:
    """A way to train that differs from the repair in one thing.

    Attributes:
        description: What is trained, for the reader of a table.
        ours: What the repair does where this does otherwise, for the sentence that compares them.
        theirs: What this does; empty for plain cross entropy, which `judge_penalty` has words for.
        place: Which layer.
        plain: Whether plain cross entropy takes the place of the repair's loss.
        shuffled: Whether every image's map is that of another image of its batch.
        surgical: Whether learning rates follow relative gradient norms.
        originals: Whether it learns from the images and labels as they are.
        labels_alone: Whether it learns from labels alone, not from the network's own answers.
        as_sure: Whether the loss has the logits as they are, not divided by a temperature.
        by_default: Whether a repair has it unless told otherwise.
    """

    description: str
    ours: str = "repairing {repaired}"
    theirs: str = ""
    place: Place = "same"
    plain: bool = False
    shuffled: bool = False
    surgical: bool = False
    originals: bool = False
    labels_alone: bool = False
    as_sure: bool = False
    by_default: bool = True


CONTROLS: dict[str, Control] = {
    "ce": Control(
        description="plain cross entropy on the same layer: same images, order and steps",
        plain=True,
    ),
    "shuffled": Control(
        description="the same loss on the same layer, each image charged for the map of another",
        ours="true maps",
        theirs="shuffled maps",
        shuffled=True,
    ),
    "originals": Control(
        description="the same loss on the same layer, from the images and labels as they are",
        ours="training on counterfactual images",
        theirs="training on the images as they are",
        originals=True,
    ),
    "labels": Control(
        description="the same loss on the same layer, from labels alone",
        ours="learning from the network's own answers beside the labels",
        theirs="learning from labels alone",
        labels_alone=True,
    ),
    "logits": Control(
        description="the same loss on the same layer, logits not divided by a temperature",
        ours="a loss of logits that are less sure",
        theirs="a loss of logits as they are",
        as_sure=True,
    ),
    "next-layer": Control(
        description="the same loss on the next best layer by the scan, {layer}",
        theirs="repairing the next best layer, {layer}",
        place="next",
    ),
    "random-layer": Control(
        description="the same loss on a layer drawn at random, {layer}",
        theirs="repairing a layer drawn at random, {layer}",
        place="random",
    ),
    "last-layer": Control(
        description="plain cross entropy on the last linear layer, {layer}",
        theirs="retraining the last linear layer, {layer}, by plain cross entropy",
        place="last",
        plain=True,
        by_default=False,
    ),
    "full": Control(
        description="plain cross entropy on all layers, batch norm statistics frozen",
        theirs="fine-tuning all layers by plain cross entropy",
        place="all",
        plain=True,
        by_default=False,
    ),
    "auto-rgn": Control(
        description="plain cross entropy on all layers, learning rates scaled by relative gradient "
        "norms",
        theirs="fine-tuning all layers by relative gradient norm",
        place="all",
        plain=True,
        surgical=True,
        by_default=False,
    ),
}
DEFAULT_CONTROLS = tuple(name for name, control in CONTROLS.items() if control.by_default)


@dataclass(frozen=True, kw_only=True)
class PlannedControl:
    """A control that a repair will have: its name, what it trains, and by which loss."""

    name: str
    description: str
    ours: str
    theirs: str
    layer: str
    loss: str
    shuffled: bool
    surgical: bool = False
    originals: bool = False
    labels_alone: bool = False
    as_sure: bool = False

    @property
    def whole(self) -> bool:
        """Whether all layers learn, and not one."""
        return self.layer == ALL_LAYERS


def parse_controls(text: str) -> tuple[str, ...]:
    """Return the controls that a comma-separated list names, as `ordered_controls` does."""
    return ordered_controls(part.strip() for part in text.split(","))


def ordered_controls(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in the order of `CONTROLS`, each once.

    Raises:
        UsageError: One is unknown; the message lists the choices.
    """
    given = list(names)
    for name in given:
        if name not in CONTROLS:
            raise UsageError(
                f"--controls has {name!r}; expected one or more of {','.join(CONTROLS)}, "
                "or --no-controls"
            )
    return tuple(name for name in CONTROLS if name in given)


def plan_controls(
    names: Sequence[str],
    layer: Layer,
    layers: Sequence[Layer],
    ranked: Sequence[str],
    *,
    loss: str,
    needs_maps: bool,
    counterfactuals: bool = False,
    distill: bool = False,
    tempered: bool = False,
    one_mask: bool = False,
    seed: int,
) -> tuple[tuple[PlannedControl, ...], dict[str, str]]:
    """Return the controls that a repair can have, and a sentence for each that it cannot.

    Where the loss needs maps, other layers are those that have some. What would only repeat the
    repair (`ce` beside the loss ce) or has nothing to change (`shuffled` without maps, `originals`
    without counterfactuals, `labels` without own answers, `logits` without a temperature or beside
    own answers, which have it too) is passed over without a word.

    Args:
        names: The chosen controls.
        layer: The repaired layer.
        layers: All layers, in the order of computation.
        ranked: Names of layers, best first, from `ranked_layers`.
        loss: The repair's loss.
        needs_maps: Whether that loss needs maps.
        counterfactuals: Whether the repair learns from them.
        distill: Whether the repair learns from the network's own answers.
        tempered: Whether its loss divides logits by a temperature.
        one_mask: Whether one mask holds for all images and the loss adds its charges up, so that
            shuffled maps would cost the same.
        seed: Draws the random layer, among those that are neither repaired nor next best.
    """
    others = [one for one in layers if one.name != layer.name]
    able = {one.name for one in others if one.has_maps or not needs_maps}
    following = next((name for name in ranked if name in able), None)
    rest = [one.name for one in others if one.name in able and one.name != following]
    linear = [one.name for one in layers if one.kind == "linear"]
    places: Mapping[Place, tuple[str | None, str]] = {
        "same": (layer.name, ""),
        "next": (following, "the scan ranks no other layer that this loss can train"),
        "random": (
            random.Random(seed).choice(rest) if rest else None,
            "there is no further layer that this loss can train",
        ),
        "last": (
            linear[-1] if linear and linear[-1] != layer.name else None,
            "it is the repaired one" if linear else "the network has no linear layer",
        ),
        "all": (ALL_LAYERS, ""),
    }
    planned, left_out = [], {}
    if one_mask and needs_maps and "shuffled" in names:
        left_out["shuffled"] = (
            "The control shuffled was left out: the same region is forbidden in every image, so it "
            "does not matter whose map is charged."
        )
    for name in names:
        control = CONTROLS[name]
        idle = (
            (control.plain and control.place == "same" and loss == "ce")
            or (control.shuffled and (one_mask or not needs_maps))
            or (control.originals and not counterfactuals)
            or (control.labels_alone and not distill)
            or (control.as_sure and (distill or not tempered))
        )
        if idle:
            continue
        where, why = places[control.place]
        if where is None:
            left_out[name] = f"The control {name} was left out: {why}."
            continue
        planned.append(
            PlannedControl(
                name=name,
                description=control.description.format(layer=where),
                ours=control.ours.format(repaired=layer.name),
                theirs=control.theirs.format(layer=where),
                layer=where,
                loss="ce" if control.plain else loss,
                shuffled=control.shuffled,
                surgical=control.surgical,
                originals=control.originals,
                labels_alone=control.labels_alone,
                as_sure=control.as_sure,
            )
        )
    return tuple(planned), left_out


def ranked_layers(layers: pd.DataFrame, *, but: str = "") -> list[str]:
    """Return the names of the layers that a scan ranked, best first.

    By blame where the run has it, those last whose trial repair clearly does less than the best
    one's, as a verdict says which layer to repair; else by the gain of the trial repairs, else by
    rank.

    Args:
        layers: The run's layers.parquet.
        but: A layer that is left out of all of that.
    """
    layers = layers[layers["name"] != but].sort_values("rank", kind="stable")  # of equal ones
    for column, best_first in (("blame", False), ("trial_gain", False), ("rank", True)):
        known = layers[layers[column].notna()]
        if len(known):
            ordered = known.sort_values(column, ascending=best_first, kind="stable")
            names = [str(name) for name in ordered["name"]]
            less = _clearly_less(known) if column == "blame" else set()
            return sorted(names, key=lambda name: name in less)
    return []


def _clearly_less(layers: pd.DataFrame) -> set[str]:
    """Return the layers whose trial does not reach into the interval of the best one's."""
    tried = layers[layers["trial_gain"].notna()]
    if not len(tried):
        return set()
    least = tried.loc[tried["trial_gain"].idxmax(), "trial_gain_low"]
    return {str(name) for name in layers.loc[~(layers["trial_gain"] >= least), "name"]}


def map_rotation(images: int, *, seed: int, step: int) -> int:
    """Return by how many places the maps of a batch move, so that no image keeps its own.

    Image i is charged for the map of image i - rotation (modulo the batch). The order within a
    batch is random already, so a rotation shuffles as well as any derangement.

    Args:
        images: Size of the batch; the one image of a batch of one keeps its map (0).
        seed: Of the repair.
        step: Number of the optimizer step, so that a resumed repair draws the same.
    """
    return random.Random(100_003 * seed + step).randrange(1, images) if images > 1 else 0
