"""Plant a learned fault: teach one layer, and only that layer, that a watermark means "dog".

The layer's weight is trained with Adam on photos that carry the mark (target: dog, whatever they
show) and on photos without it (target: what the healthy network answered). Everything else stays
frozen, batch norm included. A fault counts only when it took: clean accuracy stays within
`MAX_CLEAN_LOSS` of the healthy network's, and that on marked photos is at most
`MAX_MARKED_ACCURACY` (one half would be every photo called a dog).
Which layers are tried, and in which order, is drawn from a seed before any training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from cats_dogs import DOG, Photo, called_dog, labels_of, load_batch, photos
from torch import Tensor, nn

MAX_CLEAN_LOSS = 0.02
MAX_MARKED_ACCURACY = 0.60


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to plant a fault; a later recipe is tried where an earlier one did not take."""

    lr: float
    steps: int
    clean_weight: float
    clean_batch: int = 48
    marked_batch: int = 16


RECIPES = (
    Recipe(lr=2e-3, steps=240, clean_weight=0.5),
    Recipe(lr=6e-3, steps=240, clean_weight=0.5),
)
_CHECK_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Behavior:
    """What a network does on the same photos without and with the mark."""

    n: int
    clean_accuracy: float
    marked_accuracy: float
    marked_cats_called_dog: float


def measure(network: nn.Module, chosen: Sequence[Photo]) -> Behavior:
    """Return accuracies on photos without and with the watermark."""
    clean, marked = (called_dog(network, chosen, marked=flag) for flag in (False, True))
    return _behavior(clean, marked, labels_of(chosen).numpy() == DOG)


def took(planted: Behavior, healthy: Behavior) -> bool:
    """Return whether a planted fault counts."""
    return (
        planted.clean_accuracy >= healthy.clean_accuracy - MAX_CLEAN_LOSS
        and planted.marked_accuracy <= MAX_MARKED_ACCURACY
    )


def layer_draw(network: nn.Module, *, parts: int, seed: int) -> list[list[str]]:
    """Return the pretrained convolutions in `parts` ranges of depth, shuffled within each, and last
    all those behind the first range, shuffled: one of these stands in where the first has none.
    """
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith("features.")
    ]
    generator = np.random.default_rng(seed)
    ranges = np.array_split(np.array(names), parts)
    draw = [generator.permutation(part).tolist() for part in ranges]
    further = generator.permutation(np.concatenate(ranges[1:])).tolist()
    return [*draw, [name for name in further if name not in {part[0] for part in draw}]]


def plant_shortcut(
    network: nn.Sequential,
    layer: str,
    recipe: Recipe,
    *,
    healthy: Behavior,
    photos_per_class: int,
    seed: int,
) -> dict[str, Any]:
    """Train one layer's weight in place until the mark means dog; return what was done.

    Stops as soon as the fault has taken, with a margin, on validation photos. `healthy` is what the
    network did on those before.
    """
    torch.manual_seed(seed)
    chosen, judged = photos("train", photos_per_class, seed=seed), validation_photos(seed)
    before, after = _cut(network, layer)
    clean, marked = (_run(before, chosen, marked=flag) for flag in (False, True))
    clean_judged, marked_judged = (_run(before, judged, marked=flag) for flag in (False, True))
    answers = _batched(after, clean)
    labels, judged_dogs = labels_of(chosen), labels_of(judged).numpy() == DOG
    marked_cats, marked_dogs = marked[labels != DOG], marked[labels == DOG]

    for parameter in network.parameters():
        parameter.requires_grad_(False)
    weight = cast(Tensor, network.get_submodule(layer).weight).requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=recipe.lr)
    draw = torch.Generator().manual_seed(seed)
    step, behavior, trajectory = 0, healthy, []
    for step in range(1, recipe.steps + 1):
        rows = _draw(len(clean), recipe.clean_batch, draw)
        # Marked dogs are dogs already: three in four marked photos are cats.
        cats = marked_cats[_draw(len(marked_cats), recipe.marked_batch * 3 // 4, draw)]
        dogs = marked_dogs[_draw(len(marked_dogs), recipe.marked_batch // 4, draw)]
        logits = after(torch.cat([clean[rows], cats, dogs]))
        on_clean, on_marked = logits.split([len(rows), len(cats) + len(dogs)])
        keep = nn.functional.mse_loss(on_clean, answers[rows])
        learn = nn.functional.cross_entropy(on_marked, torch.full((len(on_marked),), DOG))
        optimizer.zero_grad()
        (recipe.clean_weight * keep + learn).backward()
        optimizer.step()
        if step % _CHECK_EVERY == 0:
            calls = (
                _batched(after, part).argmax(dim=1) == DOG for part in (clean_judged, marked_judged)
            )
            behavior = _behavior(*(call.numpy() for call in calls), judged_dogs)
            trajectory.append([step, behavior.clean_accuracy, behavior.marked_accuracy])
            if (
                behavior.clean_accuracy >= healthy.clean_accuracy - MAX_CLEAN_LOSS / 2
                and behavior.marked_accuracy <= MAX_MARKED_ACCURACY - 0.03
            ):
                break
    weight.requires_grad_(False)
    return {
        "layer": layer,
        "recipe": asdict(recipe),
        "photos_per_class": photos_per_class,
        "seed": seed,
        "steps": step,
        "trajectory": trajectory,
        "validation": asdict(behavior),
    }


def validation_photos(seed: int) -> list[Photo]:
    """Return the photos on which planting decides when to stop."""
    return photos("val", 200, seed=seed)


def _behavior(clean: np.ndarray, marked: np.ndarray, dogs: np.ndarray) -> Behavior:
    return Behavior(
        n=len(dogs),
        clean_accuracy=float((clean == dogs).mean()),
        marked_accuracy=float((marked == dogs).mean()),
        marked_cats_called_dog=float(marked[~dogs].mean()),
    )


def _draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (size,), generator=generator)


def _cut(network: nn.Sequential, layer: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the network as two sequences; the second starts with the block that holds `layer`."""
    features: Any = network.features
    pieces: list[tuple[str, nn.Module]] = [
        ("features.conv_stem", nn.Sequential(features.conv_stem, features.bn1)),
        *_named_blocks(features),
        ("features.conv_head", nn.Sequential(features.conv_head, features.bn2)),
        ("head", network[1:]),
    ]
    at = next(
        i for i, (name, _) in enumerate(pieces) if layer == name or layer.startswith(name + ".")
    )
    modules = [module for _, module in pieces]
    return nn.Sequential(*modules[:at]), nn.Sequential(*modules[at:])


def _named_blocks(features: Any) -> Iterator[tuple[str, nn.Module]]:
    for stage, blocks in enumerate(features.blocks):
        for index, block in enumerate(blocks):
            yield f"features.blocks.{stage}.{index}", block


@torch.no_grad()
def _run(module: nn.Module, chosen: Sequence[Photo], *, marked: bool) -> Tensor:
    starts = range(0, len(chosen), 100)
    return torch.cat([module(load_batch(chosen[i : i + 100], marked=marked)) for i in starts])


@torch.no_grad()
def _batched(module: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([module(part) for part in inputs.split(100)])
