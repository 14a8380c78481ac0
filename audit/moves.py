"""Channel moves: two output channels of a layer exchanged, or the sign of one changed.

A conversion between formats, or a hand, can mix up the channels of a layer. No gradient step brings
them back: the way leads through worse networks. One move can bring back one, so each layer is given
one, undone afterwards, and judged by other images, as trial repairs are (`audit.trials`). In a
layer that is as it was trained hardly any move helps, so that the layer whose move clearly does
more than those of all others is the one whose channels were moved. (A second and a third move help
the others about as much.)

Which moves are tried is told by gradients. To exchange the weights w_c and w_d, or to turn w_c into
-w_c, changes the loss in first order by

    <g_c, w_d - w_c> + <g_d, w_c - w_d>        and        -2 <g_c, w_c>

with g the gradient by the weights, biases included: for all pairs of a layer at once one matrix
product. The most promising are made in earnest, and a layer's move is the one that helps the images
that it learns from most. This is the project's own; the matrix is the one by which Ainsworth et al.
2022, "Git Re-Basin", align two networks, with a gradient in the place of the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.networks.layers import Layer
from audit.networks.program import Program, Split
from audit.statistics import Interval
from audit.trials import bounded, error_share_removed

if TYPE_CHECKING:
    from audit.checkpoints import Checkpoint

__all__ = [
    "ChannelMove",
    "Move",
    "MoveConfig",
    "channel_moves",
    "first_order",
    "moved",
    "standing_out",
    "turned_signs",
]

MoveKind = Literal["exchange", "sign"]

_LEAST = 0.01  # share of the learning images' cross entropy that a move has to remove
_FEW = 32  # exchanges, of which none is left out: a layer of eight channels has 28


@dataclass(frozen=True, kw_only=True)
class MoveConfig:
    """How channel moves are tried.

    Attributes:
        candidates: Of each kind and layer, how many are made in earnest at most; of at most 32
            exchanges, as eight channels have, all.
        batch_size: Images a forward pass.
        budget_s: Seconds for all layers together: it buys as many candidates as half of it has
            time for, the most promising one of every layer first, then the second ones.
    """

    candidates: int = 6
    batch_size: int = 64
    budget_s: float | None = None

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError("moves need at least one candidate")
        if self.budget_s is not None and self.budget_s <= 0:
            raise ValueError("a budget is a positive number of seconds")


@dataclass(frozen=True, order=True)
class Move:
    """Two output channels exchanged, or the sign of one changed (then `other` is `channel`)."""

    kind: MoveKind
    channel: int
    other: int


@dataclass(frozen=True, kw_only=True)
class ChannelMove:
    """What the best move of one layer did to the held-out images.

    Attributes:
        move: None where none helped the learning images.
        gain: Share of the held-out cross entropy that it removes, with the interval of a bootstrap
            over images; negative where it does harm.
    """

    layer: Layer
    move: Move | None
    gain: Interval


def channel_moves(
    program: Program,
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    layers: Sequence[Layer],
    config: MoveConfig,
    *,
    seed: int,
    on_layer: Callable[[], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[ChannelMove]:
    """Return the best move of each layer that some were tried in, in the order of the layers.

    Transposed convolutions have none.

    Args:
        images: Normalized images that choose the moves, (M, 3, H, W), on the program's device,
            with labels (M,).
        held_out_images: Normalized images that judge them, (N, 3, H, W), with labels (N,).
        seed: Of the bootstrap.
        on_layer: Called when a layer is done.
        checkpoint: Where interrupted work is kept, and goes on from.
    """
    earlier = checkpoint.earlier if checkpoint else None
    started_s = time.perf_counter() - (earlier["spent_s"] if earlier else 0.0)
    learning = len(images)
    done: dict[str, Any] = dict(earlier["done"]) if earlier else {}
    if earlier:
        chosen = {
            name: [Move(*one) for one in candidates]
            for name, candidates in earlier["chosen"].items()
        }
    else:
        own = [one for one in layers if not one.kind.startswith("conv_transpose")]
        chosen = _chosen(program, images, labels, own, config)

    def keep() -> None:
        if checkpoint is not None:
            plain = {name: [_plain(move) for move in moves] for name, moves in chosen.items()}
            spent_s = time.perf_counter() - started_s
            checkpoint.save({"spent_s": spent_s, "chosen": plain, "done": done})

    if not earlier:
        keep()
    every_image = torch.cat([images, held_out_images]).contiguous(memory_format=torch.channels_last)
    # The same whichever layer a move is in.
    learned, judged = (
        _cross_entropies(program.uncut(), [part], targets, {}, config.batch_size)
        for part, targets in (
            (every_image[:learning], labels),
            (every_image[learning:], held_out_labels),
        )
    )
    least = float(learned.sum()) * (1 - _LEAST)
    waiting = [name for name in chosen if name not in done]
    for name, crossing in program.prefixes(every_image, waiting):
        left_s = np.inf
        if config.budget_s is not None:
            left_s = config.budget_s - (time.perf_counter() - started_s)
        split = program.split(name)
        done[name] = _tried(
            split,
            [tensor[:learning] for tensor in crossing],
            labels,
            [tensor[learning:] for tensor in crossing],
            held_out_labels,
            chosen[name] if left_s > 0 else [],
            config.batch_size,
            least=least,
        )
        if on_layer is not None:
            on_layer()
        if checkpoint is not None and checkpoint.due(16 * len(held_out_labels) * len(done)):
            keep()
    if waiting:
        keep()
    return [
        ChannelMove(
            layer=layer,
            move=_move(done[layer.name]["move"]),
            gain=error_share_removed(
                judged.numpy(), done[layer.name].get("after", judged).numpy(), seed=seed
            ),
        )
        for layer in layers
        if layer.name in done
    ]


def standing_out(moves: Sequence[ChannelMove]) -> list[ChannelMove]:
    """Return them by gain, best first; none where the best one's interval includes nothing."""
    order = sorted(moves, key=lambda one: one.gain.value, reverse=True)
    return order if order and order[0].gain.low > 0 else []


def moved(parameters: Mapping[str, Tensor], move: Move) -> dict[str, Tensor]:
    """Return a layer's parameters, its weight first, after a move.

    A weight norm has its magnitude first, and the sign changes with that alone.
    """
    if move.kind == "sign":
        return turned_signs(parameters, move.channel)
    found = {name: value.detach().clone() for name, value in parameters.items()}
    for name, value in parameters.items():
        found[name][[move.channel, move.other]] = value.detach()[[move.other, move.channel]]
    return found


def turned_signs(parameters: Mapping[str, Tensor], channels: int | slice) -> dict[str, Tensor]:
    """Return a layer's parameters, as `moved` takes them, with the signs of channels changed."""
    found = {name: value.detach().clone() for name, value in parameters.items()}
    for name in _with_signs(parameters):
        found[name][channels] = -found[name][channels]
    return found


def _with_signs(parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of those that change with a channel's sign: the first, and biases."""
    weight = next(iter(parameters))
    return {name for name, value in parameters.items() if name == weight or value.dim() == 1}


def first_order(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return what moves change the loss by, in first order: every exchange (C, C), every sign (C,).

    Args:
        parameters: Of a layer, its weight first; output channels on the first axis.
        gradients: Of the loss by each of them, and maybe by others.
    """
    products, signs, with_signs = [], [], _with_signs(parameters)
    for name, value in parameters.items():
        flat = value.detach().reshape(len(value), -1).double()
        product = gradients[name].reshape(len(value), -1).double() @ flat.T
        products.append(product)
        if name in with_signs:
            signs.append(-2 * product.diagonal())
    total = torch.stack(products).sum(dim=0)
    own = total.diagonal()
    return total + total.T - own - own.unsqueeze(1), torch.stack(signs).sum(dim=0)


def _promising(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], most: int
) -> list[tuple[float, Move]]:
    """Return the best moves of each kind by first order, those that should help; all exchanges
    where there are few."""
    exchanges, signs = first_order(parameters, gradients)
    one, other = torch.triu_indices(len(signs), len(signs), 1, device=signs.device)
    changes = exchanges[one, other]
    few = len(changes) <= _FEW
    found = [
        (float(changes[at]), Move("exchange", int(one[at]), int(other[at])))
        for at in changes.argsort()[: None if few else most].tolist()
        if few or changes[at] < 0
    ]
    found += [
        (float(signs[at]), Move("sign", at, at))
        for at in signs.argsort()[:most].tolist()
        if signs[at] < 0
    ]
    return sorted(found)


def _chosen(
    program: Program,
    images: Tensor,
    labels: Tensor,
    layers: Sequence[Layer],
    config: MoveConfig,
) -> dict[str, list[Move]]:
    """Return the moves to try, by layer."""
    splits = [program.split(layer.name) for layer in layers]
    leaves = {
        name: value.detach().clone().requires_grad_()
        for split in splits
        for name, value in split.parameters.items()
    }
    started_s = time.perf_counter()
    gradients = _gradients(program.uncut(), [images], labels, leaves, config.batch_size)
    # Forward and backward are three forwards; a move costs one, of half the layers on average.
    move_s = (time.perf_counter() - started_s) / 6
    ranked = sorted(
        (place, change, at, move)
        for at, split in enumerate(splits)
        for place, (change, move) in enumerate(
            _promising(split.parameters, gradients, config.candidates)
        )
    )
    if config.budget_s is not None:
        ranked = ranked[: max(1, int(config.budget_s / 2 / max(move_s, 1e-9)))]
    chosen: dict[str, list[Move]] = {}
    for _, _, at, move in ranked:
        chosen.setdefault(splits[at].layer.name, []).append(move)
    return chosen


def _tried(
    split: Split,
    crossing: Sequence[Tensor],
    labels: Tensor,
    held_out: Sequence[Tensor],
    held_out_labels: Tensor,
    candidates: Sequence[Move],
    batch_size: int,
    *,
    least: float,
) -> dict[str, Any]:
    """Make the move of a layer that leaves the learning images less error than `least`, the one
    that leaves least, and judge it."""
    best: Move | None = None
    for move in candidates:
        trial = moved(split.parameters, move)
        error = float(_cross_entropies(split, crossing, labels, trial, batch_size).sum())
        if error < least:
            least, best = error, move
    if best is None:
        return {"move": None}
    repaired = moved(split.parameters, best)
    after = _cross_entropies(split, held_out, held_out_labels, repaired, batch_size)
    return {"move": _plain(best), "after": after}


def _gradients(
    split: Split,
    crossing: Sequence[Tensor],
    labels: Tensor,
    leaves: Mapping[str, Tensor],
    batch_size: int,
) -> dict[str, Tensor]:
    """Return the gradients of the summed cross entropy by each leaf."""
    sums = [torch.zeros_like(value) for value in leaves.values()]
    for at in range(0, len(labels), batch_size):
        part = slice(at, at + batch_size)
        logits = split.suffix([tensor[part] for tensor in crossing], leaves)
        loss = F.cross_entropy(logits, labels[part], reduction="sum")
        for total, gradient in zip(
            sums, torch.autograd.grad(loss, list(leaves.values())), strict=True
        ):
            total += gradient
    return dict(zip(leaves, sums, strict=True))


def _cross_entropies(
    split: Split,
    crossing: Sequence[Tensor],
    labels: Tensor,
    parameters: Mapping[str, Tensor],
    batch_size: int,
) -> Tensor:
    with torch.no_grad():
        starts = range(0, len(labels), batch_size)
        parts = ([tensor[at : at + batch_size] for tensor in crossing] for at in starts)
        logits = torch.cat([split.folded_suffix(part, parameters) for part in parts])
    return bounded(F.cross_entropy(logits.double(), labels, reduction="none")).cpu()


def _plain(move: Move) -> tuple[str, int, int]:
    return (move.kind, move.channel, move.other)


def _move(plain: tuple[MoveKind, int, int] | None) -> Move | None:
    return None if plain is None else Move(*plain)
