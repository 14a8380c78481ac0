"""Layers and their names: what can be retrained alone, and what people call it.

A layer answers to its module path (``features.28``) and to its aliases: VGG-shaped networks to the
names that Keras gave VGG-16 (``block5_conv3``, ``fc1``, ``predictions``), every network to
``last_conv``. A name that nothing answers to is an error that offers the closest ones.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from audit.errors import LayerNotFoundError

__all__ = ["Layer", "find_layer", "match_layers", "with_aliases"]

LayerKind = Literal["conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "network"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or linear layer that can be retrained alone, with its bias.

    Attributes:
        name: Module path, as in the state dict without ``.weight``.
        aliases: Further names that the layer answers to.
        kind: The operation; `network` for all layers together.
        shape: Shape of the weight.
        parameters: Number of trainable values, bias included.
        parameter_names: State entries that training changes.
        output_shape: Shape of the output of its last call, without the batch axis.
        channels_last: True where the channels are the last axis of the output.
        index: Position in the order of computation, 0 first.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: LayerKind
    shape: tuple[int, ...]
    parameters: int
    parameter_names: tuple[str, ...]
    output_shape: tuple[int, ...]
    channels_last: bool = False
    index: int

    @property
    def alias(self) -> str:
        """The alias that says most, empty where there is none."""
        return self.aliases[0] if self.aliases else ""

    @property
    def has_maps(self) -> bool:
        """True where the output has two spatial axes, so that class activation maps exist."""
        return len(self.output_shape) == 3

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of its maps; (1, 1) where it has none."""
        if not self.has_maps:
            return 1, 1
        height, width = self.output_shape[:2] if self.channels_last else self.output_shape[1:]
        return height, width


def with_aliases(
    layers: Sequence[Layer], *, pools_before: Sequence[int] | None
) -> tuple[Layer, ...]:
    """Return the layers with their aliases.

    Args:
        layers: In the order of computation.
        pools_before: For a plain chain of layers, how many pooling steps precede each; None for
            any other network.
    """
    keras: list[str | None] = [None] * len(layers)
    if pools_before is not None and max(pools_before, default=0) > 0:
        keras = _keras_vgg_names(layers, pools_before)
    last_conv = max((layer.index for layer in layers if layer.has_maps), default=-1)
    named = []
    for layer, keras_name in zip(layers, keras, strict=True):
        aliases = (keras_name, "last_conv" if layer.index == last_conv else None)
        kept = tuple(alias for alias in aliases if alias and alias != layer.name)
        named.append(replace(layer, aliases=kept))
    return tuple(named)


def find_layer(layers: Sequence[Layer], name: str, *, network: str) -> Layer:
    """Return the layer of that name or alias.

    Raises:
        LayerNotFoundError: Nothing answers to the name; the message lists the closest ones.
    """
    for layer in layers:
        if layer.name == name:
            return layer
    for layer in layers:
        if name in layer.aliases:
            return layer
    known = [alias for layer in layers for alias in (layer.name, *layer.aliases)]
    closest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"closest: {', '.join(closest)}" if closest else f"such as: {', '.join(known[:5])}"
    raise LayerNotFoundError(
        f"no layer {name!r} in {network}; {hint} (`audit layers MODEL` lists all)"
    )


def match_layers(layers: Sequence[Layer], pattern: str, *, network: str) -> tuple[Layer, ...]:
    """Return the layers that a comma-separated list of glob patterns selects, in order.

    Raises:
        LayerNotFoundError: A pattern selects nothing.
    """
    chosen: set[str] = set()
    for glob in filter(None, (part.strip() for part in pattern.split(","))):
        hits = {
            layer.name
            for layer in layers
            if any(fnmatch.fnmatchcase(name, glob) for name in (layer.name, *layer.aliases))
        }
        if not hits:
            hits = {find_layer(layers, glob, network=network).name}
        chosen |= hits
    return tuple(layer for layer in layers if layer.name in chosen)


def _keras_vgg_names(layers: Sequence[Layer], pools_before: Sequence[int]) -> list[str | None]:
    names: list[str | None] = []
    linear_count = sum(layer.kind == "linear" for layer in layers)
    in_block: dict[int, int] = {}
    linear_seen = 0
    for layer, pools in zip(layers, pools_before, strict=True):
        if layer.kind == "linear":
            linear_seen += 1
            names.append("predictions" if linear_seen == linear_count else f"fc{linear_seen}")
        else:
            in_block[pools] = in_block.get(pools, 0) + 1
            names.append(f"block{pools + 1}_conv{in_block[pools]}")
    return names
