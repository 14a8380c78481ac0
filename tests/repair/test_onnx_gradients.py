"""Gradients written out by hand, against autograd in double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

from audit.errors import ExportError
from repair.onnx_gradients import check_differentiable, output_gradient

Body = Callable[[Tensor], Tensor]

SCALE, SHIFT = torch.linspace(0.5, 1.5, 4), torch.linspace(-1, 1, 4)
KERNEL = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
GROUPED = torch.randn(8, 2, 3, 2, generator=torch.Generator().manual_seed(2))

BODIES: dict[str, Body] = {
    "convolution": lambda x: F.conv2d(x, KERNEL.to(x), SHIFT.new_ones(6).to(x), padding=1),
    "strides that leave a rest": lambda x: F.conv2d(x, KERNEL.to(x), stride=3, padding=1),
    "dilation": lambda x: F.conv2d(x, KERNEL.to(x), dilation=2, padding=(1, 2)),
    "groups": lambda x: F.conv2d(x, GROUPED.to(x), groups=2, stride=(2, 1)),
    "padding same": lambda x: F.conv2d(x, GROUPED.to(x), groups=2, padding="same"),
    "padding valid": lambda x: F.conv2d(x, KERNEL.to(x), padding="valid"),
    "relu": F.relu,
    "relu6": lambda x: F.relu6(4 * x),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "sigmoid, tanh": lambda x: torch.sigmoid(x) * torch.tanh(x),
    "hard swish": lambda x: F.hardswish(3 * x),
    "hard sigmoid": lambda x: F.hardsigmoid(3 * x),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "batch norm": lambda x: F.batch_norm(
        x, SHIFT.to(x), SCALE.to(x), SCALE.to(x), SHIFT.to(x), eps=0.1
    ),
    "batch norm without scale": lambda x: F.batch_norm(x, SHIFT.to(x), SCALE.to(x)),
    "layer norm": lambda x: F.layer_norm(x.movedim(1, 3), (4,), SCALE.to(x), SHIFT.to(x), 0.1),
    "max pooling that overlaps": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pooling rounded up": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "average pooling": lambda x: F.avg_pool2d(x, 2),
    "average pooling, padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average pooling, padding not counted": lambda x: F.avg_pool2d(
        x, 3, 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "pooling to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "pooling to a grid that does not divide": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "pooling to more cells": lambda x: F.adaptive_avg_pool2d(x, (9, 11)),
    "mean": lambda x: x.mean((2, 3)),
    "branches": lambda x: torch.cat([x, F.relu(x), x * x], 1)[:, 2:9] - 2 * F.relu(x[:, :1]),
    "squeeze and excite": lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
    "division, broadcasting": lambda x: x / (2 + x.mean((2, 3), keepdim=True) ** 2),
    "channel shuffle": lambda x: (
        x.view(x.shape[0], 2, 2, 7, 8).transpose(1, 2).reshape(x.shape[0], 4, 7, 8)
    ),
    "split": lambda x: torch.split(x, 3, 1)[0].mean(1, keepdim=True) * torch.split(x, 3, 1)[1],
    "permutation": lambda x: x.permute(0, 2, 3, 1) * SCALE.to(x),
    "padding": lambda x: F.pad(x, (1, 2, 0, 3)),
}


class _Classifier(nn.Module):
    """A convolution, what is tested, and a linear head on all that comes out of it."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.convolution = nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            width = body(torch.zeros(2, 4, 7, 8)).flatten(1).shape[1]
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.convolution(images)).flatten(1))


def traced(body: Body) -> tuple[_Classifier, fx.GraphModule, list[fx.Node]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _Classifier(body).double().eval()
    example = torch.zeros(2, 3, 7, 8, dtype=torch.float64)
    exported = torch.export.export(
        module, (example,), dynamic_shapes=({0: Dim("batch", min=1)},)
    ).run_decompositions({})
    return module, exported, list(exported.graph.nodes)


def evaluated(exported: torch.export.ExportedProgram, images: Tensor) -> dict[fx.Node, object]:
    """Every value of the functional graph, by torch's own interpreter."""
    values: dict[fx.Node, object] = {}

    class Recording(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            values[node] = super().run_node(node)
            return values[node]

    state = [
        exported.constants[name] if name in exported.constants else exported.state_dict[name]
        for spec in exported.graph_signature.input_specs
        if (name := spec.target) is not None
    ]
    Recording(exported.graph_module, garbage_collect_values=False).run(*state, images)
    return values


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", BODIES)
def test_a_gradient_is_the_one_of_autograd(name: str) -> None:
    module, exported, nodes = traced(BODIES[name])
    images = torch.randn(
        3, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    seed = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    place = module.convolution(images).detach().requires_grad_()
    logits = module.head(module.body(place).flatten(1))
    (expected,) = torch.autograd.grad((logits * seed).sum(), place)
    with torch.no_grad():
        values = evaluated(exported, images)
        (output,) = (node for node in nodes if node.op == "output")
        source = next(node for node in nodes if node.target is torch.ops.aten.conv2d.default)
        found = output_gradient(nodes, values, source, output.args[0][0], seed)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_an_operation_without_a_formula_is_named() -> None:
    _, _, nodes = traced(lambda x: torch.erfinv(x / 10))
    (output,) = (node for node in nodes if node.op == "output")
    source = next(node for node in nodes if node.target is torch.ops.aten.conv2d.default)
    with pytest.raises(ExportError, match="holds aten.erfinv.default.* choose a later layer"):
        check_differentiable(nodes, source, output.args[0][0])
