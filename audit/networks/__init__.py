"""Networks: opened from a file or a registry, captured as a graph, split at any layer.

    open_network(source)   a Network from a state dict, an exported program or a registry name
    Network                the program, its card (classes, preprocessing) and its fingerprint
    Layer                  a convolution or linear layer that can be retrained alone

Attributes are imported on first use: reading a card or the ImageNet names costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from audit.networks.card import ModelCard, Preprocessing, find_card, read_card, write_card

if TYPE_CHECKING:
    from audit.networks.layers import Layer
    from audit.networks.network import Network
    from audit.networks.opening import open_network
    from audit.networks.program import Program, Split

__all__ = [
    "Layer",
    "ModelCard",
    "Network",
    "Preprocessing",
    "Program",
    "Split",
    "find_card",
    "open_network",
    "read_card",
    "write_card",
]

_HOMES = {
    "Layer": "layers",
    "Network": "network",
    "Program": "program",
    "Split": "program",
    "open_network": "opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
