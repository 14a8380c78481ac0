"""New classes for a trained network: its features under a fresh head.

    features        the network up to its last feature maps
    transfer        1x1 convolution with 256 filters, then a rectifier
    classifier      mean over all positions, then one linear layer

Source: Halliwell and Lecue 2020, section 4.1. `repair.transfer` trains the head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from audit.errors import NetworkError
from audit.networks import Network, Split
from audit.networks.network import sha256_state
from audit.networks.program import Program

FILTERS = 256
CONVOLUTION, CLASSIFIER = "transfer", "classifier"


def with_new_head(
    network: Network, classes: Sequence[str], *, filters: int = FILTERS, seed: int = 0
) -> Network:
    """Return the network's features under an untrained head for other classes.

    Args:
        network: Its last feature maps, before pooling, are what the head reads.
        classes: One per output, in order.
        filters: Of the new 1x1 convolution.
        seed: Of the head's initial weights (PyTorch's default initialization).

    Raises:
        NetworkError: The network has no feature maps (B, C, H, W) that everything passes through.
    """
    program = network.program
    features, channels = _features(program)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = {
            CONVOLUTION: nn.Conv2d(channels, filters, kernel_size=1),
            "rectifier": nn.ReLU(),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
            CLASSIFIER: nn.Linear(filters, len(classes)),
        }
    module = nn.Sequential(OrderedDict([("features", features), *head.items()]))
    module = module.to(device=program.device, dtype=program.dtype)
    changed = Program.capture(module.eval(), program.input_size, device=program.device)
    card = replace(
        network.card,
        arch=None,
        arch_args={},
        classes=tuple(classes),
        provenance={
            **network.card.provenance,
            "head": f"1x1 convolution with {filters} filters, mean, linear; seed {seed}",
            "features_of": network.source,
            "features_of_sha256": network.sha256,
        },
    )
    return replace(network, program=changed, card=card, sha256=sha256_state(changed.state))


def head_split(network: Network) -> tuple[Split, dict[str, Tensor]]:
    """Return the cut before the new convolution, and the classifier's parameters by state entry."""
    program = network.program
    names = program.layer(CLASSIFIER).parameter_names
    return program.split(CONVOLUTION), {name: program.state[name] for name in names}


def _features(program: Program) -> tuple[nn.Module, int]:
    """Return the network up to its last feature maps, and how many channels these have."""
    module = program.to_exported().module()
    assert isinstance(module, fx.GraphModule)
    nodes = list(module.graph.nodes)
    cut = next((node for node in reversed(nodes) if _is_feature_maps(node)), None)
    if cut is None or _passed_by(nodes, cut):
        raise NetworkError(
            "this network has no last feature maps (batch, channels, height, width) that all of it "
            "passes through, so a new head has nowhere to stand; give a convolutional classifier"
        )
    nodes[-1].args = ((cut,),)
    for node in reversed(nodes):
        if node.op == "call_module" and not node.users:  # checks of the inputs' shapes
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    return fx.GraphModule(module, module.graph), int(cut.meta["val"].shape[1])


def _is_feature_maps(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(value, Tensor)
        and value.dim() == 4
        and int(value.shape[2] * value.shape[3]) > 1
    )


def _passed_by(nodes: Sequence[fx.Node], cut: fx.Node) -> bool:
    """Return whether anything of the image reaches the output without passing the cut."""
    reached: set[Any] = {node for node in nodes if node.op == "placeholder"}
    for node in nodes:
        if node is not cut and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return nodes[-1] in reached
