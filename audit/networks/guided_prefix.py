"""Guided backpropagation through the frozen part of a network, without running it forward again.

What lies before a cut never changes, and neither do its gates for an image: where its rectifiers
were active, and which position each max pooling took. Given the gates, guided gradients at the
image are a piecewise linear function of those at the cut: transposed operations, clipped at every
rectifier. `GuidedPrefix.gates` finds them once, one bit for each output of a rectifier;
`GuidedPrefix.pull_back` carries gradients from the cut to the image, and its derivative carries
tangents the other way. Neither needs an activation, and convolutions followed by a batch norm are
one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from audit.networks.frozen_operations import (
    Settings,
    batch_norm_scale,
    transposed_convolution,
)

if TYPE_CHECKING:
    from audit.networks.program import Program

__all__ = ["GuidedPrefix"]

aten = torch.ops.aten

_RECTIFIERS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default}
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default
_SUMS: dict[Any, float] = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}
# Linear in one tensor or in a list of them, and cheap: no rules of their own.
_LINEAR = {
    aten.adaptive_avg_pool2d.default,
    aten.alias.default,
    aten.avg_pool2d.default,
    aten.cat.default,
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.mean.dim,
    aten.pad.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.view.default,
}
_LARGEST_WINDOW = 256  # of a max pooling, so that a position in it is one byte
_BITS = 8


class _Step(Protocol):
    """One operation of the prefix: `sources` -> `node`, linear once its gates are known."""

    @property
    def node(self) -> fx.Node: ...

    @property
    def sources(self) -> tuple[fx.Node, ...]: ...

    def pull(self, gradients: Tensor, gates: dict[fx.Node, Tensor]) -> Sequence[Tensor]:
        """Return the gradients by the sources, guided; `gates` learns where they were clipped."""
        ...

    def push(self, tangents: Sequence[Tensor], gates: Mapping[fx.Node, Tensor]) -> Tensor:
        """Return the tangent of the output: the transposed of `pull`, where that was clipped."""
        ...


class _UnknownOperationError(Exception):
    """An operation that is not linear, given gates, or that has no rule here."""


class GuidedPrefix:
    """The operations between images and a cut, as guided gradients pass them.

    Attributes:
        bytes: What the gates of one image take.
    """

    def __init__(self, program: Program, nodes: Sequence[fx.Node], ends: Sequence[fx.Node]) -> None:
        self._program = program
        self._nodes = tuple(nodes)
        self._ends = tuple(ends)
        self._images = program.images_node
        constants = _Constants(program)
        self._steps = _steps(program, nodes, ends, constants)
        self._gates = [_gate(step) for step in self._steps if _has_gate(step)]
        self.bytes = sum(gate.bytes for gate in self._gates)
        last_use = {node: at for at, step in enumerate(self._steps) for node in step.sources}
        self._expiring: list[list[fx.Node]] = [[] for _ in self._steps]
        for node, at in last_use.items():
            if node not in self._ends:
                self._expiring[at].append(node)

    @classmethod
    def build(
        cls, program: Program, nodes: Sequence[fx.Node], ends: Sequence[fx.Node]
    ) -> GuidedPrefix | None:
        """Return the prefix, or None where an operation in it has no rule.

        Args:
            nodes: All that the ends need of the graph, in the order of computation.
            ends: What crosses the cut.
        """
        try:
            return cls(program, nodes, ends)
        except _UnknownOperationError:
            return None

    def gates(self, images: Tensor) -> Tensor:
        """Return the gates of normalized images (B, 3, H, W): uint8 (B, bytes)."""
        packed = {}
        with torch.no_grad():
            for node, value in self._values(images):
                for gate in self._gates:
                    if gate.read is node:  # a rectifier and a pooling may read the same node
                        packed[gate.node] = gate.pack(value)
        parts = [packed[gate.node] for gate in self._gates]
        nothing = torch.empty((len(images), 0), dtype=torch.uint8, device=images.device)
        return torch.cat([nothing, *parts], dim=1)

    def pull_back(self, gradients: Sequence[Tensor], gates: Tensor) -> Tensor:
        """Return guided gradients at the image, (B, 3, H, W), differentiable in those at the cut.

        Args:
            gradients: By each tensor that crosses the cut, guided behind it.
            gates: Of the same images.
        """
        return cast(Tensor, _PULL_BACK(self, gates, *gradients))

    # ---------------------------------------------------------------- used by _PullBack

    def open_gates(self, packed: Tensor) -> dict[fx.Node, Tensor]:
        """Return each gate as its step takes it: bool, or int64 positions."""
        opened, at = {}, 0
        for gate in self._gates:
            opened[gate.node] = gate.unpack(packed[:, at : at + gate.bytes])
            at += gate.bytes
        return opened

    def pull(self, gradients: Sequence[Tensor], gates: dict[fx.Node, Tensor]) -> Tensor:
        """Return guided gradients at the image; rectifiers' gates close where they clipped."""
        arriving: dict[fx.Node, Tensor] = {}
        for node, gradient in zip(self._ends, gradients, strict=True):
            _add(arriving, node, gradient)
        for step in reversed(self._steps):
            gradient = arriving.pop(step.node)
            for source, part in zip(step.sources, step.pull(gradient, gates), strict=True):
                _add(arriving, source, part)
        return arriving[self._images]

    def push(self, tangents: Tensor, gates: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """Return the tangents at the cut for those at the image, through the same gates."""
        values = {self._images: tangents}
        for number, step in enumerate(self._steps):
            values[step.node] = step.push([values[node] for node in step.sources], gates)
            for gone in self._expiring[number]:
                del values[gone]
        return [values[node] for node in self._ends]

    def _values(self, images: Tensor) -> Iterator[tuple[fx.Node, Any]]:
        """Yield every node with its value; values are dropped after their last use."""
        values: dict[fx.Node, Any] = {}
        last_use = {source: node for node in self._nodes for source in node.all_input_nodes}
        expiring: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last_use.items():
            expiring.setdefault(node, []).append(source)
        for node in self._nodes:
            values[node] = self._program.evaluate(node, values, images)
            yield node, values[node]
            for gone in expiring.get(node, ()):
                del values[gone]


class _PullBack(torch.autograd.Function):
    """`GuidedPrefix.pull`, whose derivative is `GuidedPrefix.push`."""

    @staticmethod
    def forward(ctx: Any, prefix: GuidedPrefix, packed: Tensor, *gradients: Tensor) -> Tensor:
        device = gradients[0].device.type
        ctx.prefix, ctx.device = prefix, device
        ctx.amp = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.dtypes = tuple(gradient.dtype for gradient in gradients)
        gates = prefix.open_gates(packed)
        if ctx.amp[0]:
            gradients = tuple(gradient.to(ctx.amp[1]) for gradient in gradients)
        pulled = prefix.pull(gradients, gates).to(ctx.dtypes[0])
        ctx.nodes = tuple(gates)
        ctx.save_for_backward(*gates.values())
        return pulled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        gates = dict(zip(ctx.nodes, ctx.saved_tensors, strict=True))
        enabled, dtype = ctx.amp
        with torch.autocast(ctx.device, dtype, enabled=enabled):
            pushed = ctx.prefix.push(tangents[0], gates)
        return (None, None, *(t.to(d) for t, d in zip(pushed, ctx.dtypes, strict=True)))


_PULL_BACK: Callable[..., Any] = _PullBack.apply


def _add(arriving: dict[fx.Node, Tensor], node: fx.Node, gradient: Tensor) -> None:
    arriving[node] = arriving[node] + gradient if node in arriving else gradient


# -------------------------------------------------------------------- reading the graph


class _Constants:
    """Values of the graph that do not depend on the images."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._values: dict[fx.Node, Any] = {}

    def __call__(self, arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        if arg not in self._values:
            if self._program.depends_on_images(arg):
                raise _UnknownOperationError(arg.name)
            for source in arg.all_input_nodes:
                self(source)
            with torch.no_grad():
                self._values[arg] = self._program.evaluate(arg, self._values, None)
        return self._values[arg]


def _steps(
    program: Program,
    nodes: Sequence[fx.Node],
    ends: Sequence[fx.Node],
    constants: Callable[[Any], Any],
) -> list[_Step]:
    """Return the steps in the order of computation.

    Raises:
        _UnknownOperationError: One has no rule.
    """
    steps: dict[fx.Node, _Step] = {}
    inside = set(nodes)
    for node in nodes:
        if not program.depends_on_images(node) or node is program.images_node:
            continue
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):  # a batch norm; its first output is a node of its own
            continue
        if not isinstance(value, Tensor):  # the batch size
            continue
        sources = tuple(
            dict.fromkeys(
                source
                for source in node.all_input_nodes
                if program.depends_on_images(source)
                and isinstance(source.meta.get("val"), (Tensor, tuple, list))
            )
        )
        if not sources:
            raise _UnknownOperationError(node.name)
        step = _step(node, sources, constants)
        before = steps.get(step.sources[0])
        if isinstance(step, _Scale) and isinstance(before, _Convolution):
            users = [user for user in before.node.users if user in inside]
            if len(users) == 1 and before.node not in ends:
                del steps[before.node]
                step = before.scaled(step)
        steps[node] = step
    return list(steps.values())


def _step(node: fx.Node, sources: tuple[fx.Node, ...], constants: Callable[[Any], Any]) -> _Step:
    target, args = node.target, node.args
    if target is aten.conv2d.default:
        return _convolution(node, sources, constants)
    if target in _RECTIFIERS:
        return _rectifier(node, sources)
    if target is aten.max_pool2d.default:
        return _max_pool(node, sources)
    if getattr(target, "__name__", "") == "getitem" and args[1] == 0:
        norm = cast(fx.Node, args[0])
        if norm.target is _BATCH_NORM:
            return _batch_norm(node, norm, constants)
    if target in _SUMS and len(args) == 2 and not node.kwargs:
        return _sum(node, sources)
    if target in _LINEAR and _is_homogeneous(node):
        return _Linear(node=node, sources=sources)
    raise _UnknownOperationError(str(target))


def _size(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value without the batch axis."""
    return tuple(map(int, node.meta["val"].shape[1:]))


def _is_homogeneous(node: fx.Node) -> bool:
    """Return whether zeros give zeros, so that the operation is linear and not only affine."""
    if node.target is aten.constant_pad_nd.default:
        return len(node.args) < 3 or bool(node.args[2] == 0)
    if node.target is aten.pad.default:
        padding = [*node.args[2:], *node.kwargs.values()]
        return all(value in ("constant", None, 0) for value in padding)
    return True


# -------------------------------------------------------------------- operations without gates


@dataclass(frozen=True)
class _Convolution:
    node: fx.Node
    sources: tuple[fx.Node, ...]
    weight: Tensor
    settings: Settings

    def pull(self, gradients: Tensor, gates: dict[fx.Node, Tensor]) -> Sequence[Tensor]:
        size = (len(gradients), *_size(self.sources[0]))
        weight = self.weight.to(gradients.dtype)
        return (transposed_convolution(gradients, weight, size, self.settings),)

    def push(self, tangents: Sequence[Tensor], gates: Mapping[fx.Node, Tensor]) -> Tensor:
        return F.conv2d(tangents[0], self.weight.to(tangents[0].dtype), None, *self.settings)

    def scaled(self, scale: _Scale) -> _Convolution:
        """Return this convolution and what multiplies its outputs as one."""
        weight = self.weight * scale.scale.view(-1, 1, 1, 1)
        return _Convolution(scale.node, self.sources, weight, self.settings)


def _convolution(
    node: fx.Node, sources: tuple[fx.Node, ...], constants: Callable[[Any], Any]
) -> _Convolution:
    given = list(node.args)
    if len(sources) != 1 or sources[0] is not given[0]:
        raise _UnknownOperationError(node.name)
    defaults: list[Any] = [None, None, None, [1, 1], [0, 0], [1, 1], 1]
    stride, padding, dilation, groups = [*given, *defaults[len(given) :]][3:]
    settings = (list(stride), list(padding), list(dilation), int(groups))
    return _Convolution(node, sources, constants(given[1]), settings)


@dataclass(frozen=True)
class _Scale:
    """A batch norm of evaluation, as gradients see it."""

    node: fx.Node
    sources: tuple[fx.Node, ...]
    scale: Tensor

    def pull(self, gradients: Tensor, gates: dict[fx.Node, Tensor]) -> Sequence[Tensor]:
        return (gradients * self._by_channel(gradients),)

    def push(self, tangents: Sequence[Tensor], gates: Mapping[fx.Node, Tensor]) -> Tensor:
        return tangents[0] * self._by_channel(tangents[0])

    def _by_channel(self, values: Tensor) -> Tensor:
        return self.scale.view(1, -1, *(1,) * (values.dim() - 2))


def _batch_norm(node: fx.Node, norm: fx.Node, constants: Callable[[Any], Any]) -> _Scale:
    inputs, weight, _, _, variance, _, eps = norm.args
    scale = batch_norm_scale(constants(weight), constants(variance), float(cast(float, eps)))
    return _Scale(node, (cast(fx.Node, inputs),), scale)


@dataclass(frozen=True)
class _Sum:
    node: fx.Node
    sources: tuple[fx.Node, ...]
    signs: tuple[float, ...]

    def pull(self, gradients: Tensor, gates: dict[fx.Node, Tensor]) -> Sequence[Tensor]:
        return [gradients if sign == 1 else sign * gradients for sign in self.signs]

    def push(self, tangents: Sequence[Tensor], gates: Mapping[fx.Node, Tensor]) -> Tensor:
        parts = [t if sign == 1 else sign * t for t, sign in zip(tangents, self.signs, strict=True)]
        return sum(parts[1:], start=parts[0])


def _sum(node: fx.Node, sources: tuple[fx.Node, ...]) -> _Sum:
    signs = dict.fromkeys(sources, 0.0)
    for arg, sign in zip(node.args, (1.0, _SUMS[node.target]), strict=True):
        if arg in signs:
            signs[cast(fx.Node, arg)] += sign
    if any(_size(source) != _size(node) for source in sources):  # broadcast
        raise _UnknownOperationError(node.name)
    return _Sum(node, sources, tuple(signs.values()))


@dataclass(frozen=True)
class _Linear:
    """A cheap linear operation, transposed by automatic differentiation at zero."""

    node: fx.Node
    sources: tuple[fx.Node, ...]

    def pull(self, gradients: Tensor, gates: dict[fx.Node, Tensor]) -> Sequence[Tensor]:
        zeros = [
            gradients.new_zeros((len(gradients), *_size(source))).requires_grad_()
            for source in self.sources
        ]
        with torch.enable_grad():
            return torch.autograd.grad(self._run(zeros), zeros, gradients)

    def push(self, tangents: Sequence[Tensor], gates: Mapping[fx.Node, Tensor]) -> Tensor:
        return self._run(tangents)

    def _run(self, values: Sequence[Tensor]) -> Tensor:
        value = dict(zip(self.sources, values, strict=True))

        def resolved(node: fx.Node) -> Any:
            return value.get(node, len(values[0]))  # what is no tensor is the batch size

        args = fx.map_arg(self.node.args, resolved)
        kwargs = fx.map_arg(self.node.kwargs, resolved)
        if self.node.target is aten.view.default:  # of another memory format it may be none
            return values[0].reshape(cast("tuple[int, ...]", tuple(cast(Any, args[1]))))
        return cast(Callable[..., Tensor], self.node.target)(*args, **kwargs)


# -------------------------------------------------------------------- operations with gates


@dataclass(frozen=True)
class _Rectifier:
    """Passes gradients where it was active and, guided, those that are positive."""

    node: fx.Node
    sources: tuple[fx.Node, ...]
    low: float = 0.0
    high: float = math.inf
    guided: bool = True

    def pull(self, gradients: Tensor, gates: dict[fx.Node, Tensor]) -> Sequence[Tensor]:
        active = gates[self.node]
        if self.guided:
            # At zero the derivative of the clip is one, as torch has it for a clamp.
            gates[self.node] = active = active & (gradients >= 0)
        return (gradients * _zero_or_one(active),)

    def push(self, tangents: Sequence[Tensor], gates: Mapping[fx.Node, Tensor]) -> Tensor:
        return tangents[0] * _zero_or_one(gates[self.node])


def _zero_or_one(active: Tensor) -> Tensor:
    # Twice as fast to multiply by on a CPU as a bool.
    return active.view(torch.uint8)


def _rectifier(node: fx.Node, sources: tuple[fx.Node, ...]) -> _Rectifier:
    if node.target is aten.relu.default:
        return _Rectifier(node, sources)
    if node.target is aten.relu6.default:
        return _Rectifier(node, sources, high=6.0)
    bounds = [float(cast(float, bound)) for bound in node.args[1:3]]
    low, high = [*bounds, *(-1.0, 1.0)[len(bounds) :]]
    return _Rectifier(node, sources, low, high, guided=low == 0)


@dataclass(frozen=True)
class _MaxPool:
    """Passes gradients to the position that was the largest of each window."""

    node: fx.Node
    sources: tuple[fx.Node, ...]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    def pull(self, gradients: Tensor, gates: dict[fx.Node, Tensor]) -> Sequence[Tensor]:
        positions = gates[self.node]
        size = _size(self.sources[0])
        flat = gradients.new_zeros((len(gradients), size[0], size[1] * size[2]))
        flat.scatter_add_(2, positions, gradients.flatten(2))
        return (flat.view(len(gradients), *size),)

    def push(self, tangents: Sequence[Tensor], gates: Mapping[fx.Node, Tensor]) -> Tensor:
        taken = tangents[0].flatten(2).gather(2, gates[self.node])
        return taken.view(len(taken), *_size(self.node))

    def corners(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows (h, 1) and columns (w,) where windows begin; negative in the padding."""
        _, height, width = _size(self.node)
        rows = torch.arange(height, device=device) * self.stride[0] - self.padding[0]
        columns = torch.arange(width, device=device) * self.stride[1] - self.padding[1]
        return rows.unsqueeze(1), columns


def _max_pool(node: fx.Node, sources: tuple[fx.Node, ...]) -> _MaxPool:
    given = list(node.args)
    defaults: list[Any] = [None, None, [], [0, 0], [1, 1], False]
    kernel, stride, padding, dilation, ceil_mode = [*given, *defaults[len(given) :]][1:]
    pool = _MaxPool(
        node,
        sources,
        _pair(kernel),
        _pair(stride or kernel),
        _pair(padding),
        _pair(dilation),
        bool(ceil_mode),
    )
    if math.prod(pool.kernel) > _LARGEST_WINDOW:
        raise _UnknownOperationError(node.name)
    return pool


def _pair(value: Any) -> tuple[int, int]:
    first, last = (value[0], value[-1]) if isinstance(value, (list, tuple)) else (value, value)
    return int(first), int(last)


# -------------------------------------------------------------------- gates in bytes


class _Gate(Protocol):
    """How a gate is kept: `read` is the node whose value it is made of."""

    node: fx.Node
    read: fx.Node
    bytes: int

    def pack(self, value: Tensor) -> Tensor:
        """Return the gate, uint8 (B, bytes)."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """Return it as its step takes it."""
        ...


class _ActiveBits:
    """Where a rectifier was active: one bit each, eight to a byte."""

    def __init__(self, step: _Rectifier) -> None:
        self._step = step
        self.node = self.read = step.node
        self._count = math.prod(_size(step.node))
        self.bytes = math.ceil(self._count / _BITS)

    def pack(self, value: Tensor) -> Tensor:
        active = ((value > self._step.low) & (value < self._step.high)).flatten(1)
        padded = F.pad(active, (0, self.bytes * _BITS - self._count))
        places = _places(value.device)
        bits = padded.view(len(value), self.bytes, _BITS) * places
        return bits.sum(dim=2, dtype=torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        every = torch.arange(2**_BITS, dtype=torch.uint8, device=packed.device)
        # The eight bools of each byte lie in one int64: one look-up a byte.
        table = (every.unsqueeze(1) & _places(packed.device)).bool().view(torch.int64).flatten()
        bits = table.index_select(0, packed.flatten().int()).view(torch.bool)
        opened = bits.view(len(packed), self.bytes * _BITS)[:, : self._count]
        return opened.reshape(len(packed), *_size(self.node))


def _places(device: torch.device) -> Tensor:
    return 2 ** torch.arange(_BITS, dtype=torch.uint8, device=device)


class _WindowPositions:
    """Which position of its window each output of a max pooling took: one byte each."""

    def __init__(self, step: _MaxPool) -> None:
        self._step = step
        self.node, self.read = step.node, step.sources[0]
        self.bytes = math.prod(_size(step.node))

    def pack(self, value: Tensor) -> Tensor:
        step = self._step
        _, found = F.max_pool2d(
            value, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode, True
        )
        _, _, width = _size(step.sources[0])
        rows, columns = step.corners(value.device)
        row = (found // width - rows) // step.dilation[0]
        column = (found % width - columns) // step.dilation[1]
        return (row * step.kernel[1] + column).to(torch.uint8).flatten(1)

    def unpack(self, packed: Tensor) -> Tensor:
        step = self._step
        _, _, width = _size(step.sources[0])
        rows, columns = step.corners(packed.device)
        place = torch.arange(math.prod(step.kernel), device=packed.device)
        down, across = place // step.kernel[1], place % step.kernel[1]
        table = down * (step.dilation[0] * width) + across * step.dilation[1]
        inside = table.index_select(0, packed.flatten().int()).view(len(packed), *_size(self.node))
        return (inside + (rows * width + columns)).flatten(2)


def _has_gate(step: _Step) -> bool:
    return isinstance(step, (_Rectifier, _MaxPool))


def _gate(step: _Step) -> _Gate:
    if isinstance(step, _Rectifier):
        return _ActiveBits(step)
    return _WindowPositions(cast(_MaxPool, step))
