"""Changed signs that show one layer later.

A layer that takes what a batch norm left around nought, as the expansions of linear bottlenecks do
(Sandler et al. 2018, "MobileNetV2"), gives channels whose means are nought as well: weights of the
wrong sign change nothing that its own batch norm remembers. Behind the rectifier they do, in the
depthwise convolution that takes these channels one by one: there drift sets in, one layer after the
one at fault. Which of the two it is shows when all signs of the first are changed: channels whose
sign was wrong come back to what the second one's batch norm remembers, and the others leave it.
This is the project's own (ARCHITECTURE.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from audit.drift import BY_SIGNS, divergences
from audit.evidence import LayerEvidence, channel_sums
from audit.moves import turned_signs
from audit.networks.program import BatchNorm, Program

__all__ = ["WORTH_A_LOOK", "Behind", "depthwise_behind", "signs_behind"]

WORTH_A_LOOK = 0.25
"""Onset of drift from which a depthwise convolution is asked for its sender's signs: of networks
that are as they were trained the highest was .13, of changed signs the lowest .35
(ARCHITECTURE.md)."""

_MOST = 3  # depthwise convolutions, those where most drift sets in: each costs a pass


@dataclass(frozen=True)
class Behind:
    """A depthwise convolution and the layer that alone sends it its channels, by name."""

    sender: str
    depthwise: str


def depthwise_behind(evidence: Sequence[LayerEvidence], program: Program) -> list[Behind]:
    """Return the depthwise convolutions in which drift sets in, with their senders; the most first,
    three at most."""
    known = {one.layer.name: one.layer for one in evidence}
    drifting = [
        one
        for one in sorted(evidence, key=lambda one: -one.drift_onset)
        if not one.first_in_line and one.drift_onset >= WORTH_A_LOOK  # NaN is not
    ]
    found = []
    for one in drifting:
        channels, of_each, *_ = one.layer.shape
        if one.layer.kind != "conv2d" or of_each > 1:
            continue
        sender = known.get(_sender(program, one.layer.name))
        if sender is not None and sender.shape[0] == channels > 1:
            found.append(Behind(sender.name, one.layer.name))
    return found[:_MOST]


def _sender(program: Program, name: str) -> str:
    """Return the one layer whose output comes to another directly, or nothing."""
    before = program.feeding(name)
    passed_on = frozenset[str]().union(*(program.feeding(other) for other in before))
    last = before - passed_on
    return next(iter(last)) if len(last) == 1 else ""


def signs_behind(
    evidence: Sequence[LayerEvidence],
    program: Program,
    batches: Iterable[Tensor],
    pairs: Sequence[Behind],
) -> list[LayerEvidence]:
    """Return the evidence, of senders with the drift behind them that changed signs explain.

    Where these explain most of it, the onset of it is the sender's, unless its own is higher.

    Args:
        batches: Photographs, normalized, (B, 3, H, W).
        pairs: As `depthwise_behind` finds them.
    """
    images = list(batches)
    scores = {one.layer.name: one for one in evidence}
    for pair in pairs:
        sender, behind = scores[pair.sender], scores[pair.depthwise]
        norm = program.batch_norm_after(pair.depthwise)
        assert norm is not None  # it drifts
        as_it_is = _divergences(program, images, pair.depthwise, norm)
        parameters = program.split(pair.sender).parameters
        turned = program.with_state(turned_signs(parameters, slice(None)))
        gone = (as_it_is - _divergences(turned, images, pair.depthwise, norm)).clamp(min=0)
        share = float(gone.sum() / as_it_is.sum())
        if share >= BY_SIGNS and not sender.signs_onset >= behind.drift_onset:  # NaN is not
            scores[pair.sender] = replace(
                sender,
                drift_by_signs=share * behind.drift,
                signs_onset=behind.drift_onset,
                signs_seen_in=pair.depthwise,
            )
    return list(scores.values())


def _divergences(program: Program, images: Sequence[Tensor], layer: str, norm: BatchNorm) -> Tensor:
    return divergences(channel_sums(program, images, [layer])[layer], norm)
