"""A network as a functional graph: run it whole, watch it at every layer, cut it at any layer.

`Program.capture` traces a module with ``torch.export`` in eval mode and functionalizes the result:
in-place operations, module reuse, branches and functional code all become one graph of pure
operations that take their parameters as inputs. Three things follow from that one graph: the
network runs with any parameters without being changed, the output of every layer can be watched in
one pass, and the network splits at any layer into what the layer's parameters cannot influence
(the prefix) and what they can (the layer and the suffix).
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.export.passes import move_to_device_pass

from audit.errors import NetworkError
from audit.networks.frozen_operations import convolution, frozen_batch_norm
from audit.networks.guided_prefix import GuidedPrefix
from audit.networks.layers import Layer, LayerKind, find_layer, with_aliases

__all__ = ["BatchNorm", "Call", "Program", "Split"]

aten = torch.ops.aten

_LAYER_KINDS: dict[Any, LayerKind] = {
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.linear.default: "linear",
}
_POOLS = {aten.max_pool2d.default, aten.avg_pool2d.default}
ALL_LAYERS = "all layers"
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default
_FOLDABLE = {aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default}
_IMAGES = object()  # marks the placeholder of the images among the state names


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """What a batch norm remembers of the outputs of the layer before it, per channel (C,)."""

    mean: Tensor
    variance: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class Call:
    """One use of a layer in a forward pass: outputs = operation(inputs, weight, bias, *settings).

    Attributes:
        inputs: What the layer takes, batch first.
        outputs: What it gives; gradients can be asked for there.
        weight: The weight as the operation takes it, after weight norm where there is one.
        settings: What follows weight and bias: stride, padding, dilation and groups of most.
    """

    layer: str
    operation: Callable[..., Tensor]
    inputs: Tensor
    outputs: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...]


class Program:
    """A classifier as a functional graph, with the state it was captured with.

    Attributes:
        layers: Every layer that can be retrained alone, in the order of computation.
        state: Parameters, buffers and constants by name; never changed in place.
        classes: Number of outputs.
        input_size: Height and width of the images.
        device: Where the state lies and images must lie.
        dtype: Floating-point type of the images.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        functional = _functionalized(exported)
        self._root = functional.graph_module
        self._nodes = list(functional.graph.nodes)
        self._sources, self._images, self._logits = _read_signature(functional)
        self.state = _state_of(functional)
        self.input_size, self.classes = _check_shapes(self._images, self._logits)
        parameters = dict(functional.named_parameters())
        any_state = next(iter(self.state.values()))
        self.device = any_state.device
        self.dtype = cast(torch.dtype, self._images.meta["val"].dtype)
        self._parameter_names = tuple(parameters)
        self._image_dependent = _reachable_from([self._images], self._nodes)
        self._calls: dict[str, list[fx.Node]] = {}
        self.layers = self._find_layers(set(parameters))
        self._splits: dict[str, Split] = {}
        self._compiled: dict[Any, _Compiled] = {}

    @classmethod
    def capture(
        cls, module: nn.Module, input_size: tuple[int, int], *, device: str | torch.device = "cpu"
    ) -> Program:
        """Return the program of a module that maps images (B, 3, H, W) to logits (B, K).

        The module is traced in eval mode; its own modes are restored and its tensors copied.

        Raises:
            NetworkError: The module cannot be traced, or fixes the batch size.
        """
        # Traced where it lies, and moved afterwards: `module.to` would move the caller's own.
        first = next(module.parameters(), torch.empty(0))
        example = torch.zeros(2, 3, *input_size, device=first.device, dtype=first.dtype)
        with _evaluating(module), torch.no_grad(), _quiet_export():
            try:
                exported = torch.export.export(
                    module, (example,), dynamic_shapes=({0: Dim("batch", min=1)},)
                )
            except Exception as error:
                raise NetworkError(
                    f"{type(module).__name__} cannot be traced at input size "
                    f"{input_size[0]}x{input_size[1]} with a free batch size: "
                    f"{_first_line(error)}; make its forward free of data-dependent Python "
                    "branches and of fixed batch sizes"
                ) from error
        return cls.from_exported(exported, device=device)

    @classmethod
    def from_exported(
        cls, exported: ExportedProgram, *, device: str | torch.device = "cpu"
    ) -> Program:
        """Return the program of what ``torch.export`` saved as ``.pt2``.

        Raises:
            NetworkError: It takes or returns anything but one batch, or fixes the batch size.
        """
        return cls(move_to_device_pass(exported, torch.device(device)))

    def __repr__(self) -> str:
        height, width = self.input_size
        return (
            f"Program({len(self.layers)} layers, {self.classes} classes, "
            f"{height}x{width}, {self.device})"
        )

    def layer(self, name: str) -> Layer:
        """Return the layer of that name or alias; raises LayerNotFoundError."""
        return find_layer(self.layers, name, network="this network")

    def logits(self, images: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits (B, K) of normalized images (B, 3, H, W).

        Args:
            images: Floating point, on the program's device.
            state: Entries that replace the program's own; differentiable.
        """
        compiled = self._compile("logits", [self._logits], [self._images])
        return compiled((images,), self.state, state)[0]

    def watch(
        self,
        images: Tensor,
        layers: Sequence[str],
        state: Mapping[str, Tensor] | None = None,
        *,
        guided: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the output of each layer's last call, by layer, and the logits (B, K).

        With gradients enabled every output can be passed to ``torch.autograd.grad``, whether or
        not images and state require gradients.

        Args:
            guided: Rectifiers pass only positive gradients (guided backpropagation).
        """
        names = tuple(self.layer(name).name for name in layers)
        nodes = [self._calls[name][-1] for name in names]
        compiled = self._compile(
            ("watch", names, guided),
            [*nodes, self._logits],
            [self._images],
            tracked=set(nodes),
            rewrites=_GUIDED if guided else None,
        )
        *activations, logits = compiled((images,), self.state, state)
        return dict(zip(names, activations, strict=True)), logits

    def calls(self, images: Tensor, layers: Sequence[str]) -> tuple[list[Call], Tensor]:
        """Return every use of the layers, in the order of computation, and the logits (B, K)."""
        names = tuple(self.layer(name).name for name in layers)
        found = [(name, node) for name in names for node in self._calls[name]]
        wanted: list[fx.Node] = []
        for _, node in found:
            wanted += [cast(fx.Node, arg) for arg in node.args[:2]]
            wanted += [node, *(arg for arg in node.args[2:3] if isinstance(arg, fx.Node))]
        compiled = self._compile(
            ("calls", names),
            [*wanted, self._logits],
            [self._images],
            tracked={node for _, node in found},
        )
        *values, logits = compiled((images,), self.state, None)
        value = dict(zip(wanted, values, strict=True))
        calls = [
            Call(
                layer=name,
                operation=cast(Callable[..., Tensor], node.target),
                inputs=value[cast(fx.Node, node.args[0])].detach(),
                outputs=value[node],
                weight=value[cast(fx.Node, node.args[1])].detach(),
                bias=next(
                    (value[b].detach() for b in node.args[2:3] if isinstance(b, fx.Node)), None
                ),
                settings=tuple(node.args[3:]),
            )
            for name, node in found
        ]
        return calls, logits

    def batch_norm_after(self, layer: str) -> BatchNorm | None:
        """Return the batch norm that takes the layer's output and nothing else does, if any."""
        users = list(self._calls[self.layer(layer).name][-1].users)
        if len(users) != 1 or users[0].target is not _BATCH_NORM:
            return None
        mean, variance = (self._sources.get(cast(fx.Node, arg)) for arg in users[0].args[3:5])
        if not isinstance(mean, str) or not isinstance(variance, str):
            return None
        return BatchNorm(
            mean=self.state[mean],
            variance=self.state[variance],
            eps=float(cast(float, users[0].args[6])),
        )

    def norm_parameters_after(self, layer: str) -> dict[str, Tensor]:
        """Return scale and shift of the batch norm that takes the layer's output and nothing else
        does, by state entry; empty where there is none, or none that has any."""
        users = list(self._calls[self.layer(layer).name][-1].users)
        if len(users) != 1 or users[0].target is not _BATCH_NORM:
            return {}
        names = [self._sources.get(arg) for arg in users[0].args[1:3] if isinstance(arg, fx.Node)]
        return {name: self.state[name].detach() for name in names if isinstance(name, str)}

    def feeding(self, layer: str) -> frozenset[str]:
        """Return the other layers whose output reaches the layer's last call."""
        name = self.layer(layer).name
        before = _ancestors([self._calls[name][-1]], stops=())
        return frozenset(
            other
            for other, calls in self._calls.items()
            if other != name and any(call in before for call in calls)
        )

    def split(self, layer: str) -> Split:
        """Return the network cut at a layer; raises LayerNotFoundError."""
        found = self.layer(layer)
        if found.name not in self._splits:
            self._splits[found.name] = self._split(found)
        return self._splits[found.name]

    def uncut(self) -> Split:
        """Return the whole network as if it were one layer: images cross, everything learns."""
        names = tuple(name for name in self._parameter_names if name in self.state)
        everything = Layer(
            name=ALL_LAYERS,
            kind="network",
            shape=(),
            parameters=sum(self.state[name].numel() for name in names),
            parameter_names=names,
            output_shape=(self.classes,),
            index=0,
        )
        return Split(self, everything, (self._images,))

    def prefixes(
        self, images: Tensor, layers: Sequence[str]
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Yield each layer with the tensors that cross its cut, in one pass over the network.

        Values are computed once, in the order of computation, and dropped as soon as no later
        layer needs them, so that all layers together cost one forward pass.
        """
        splits = [self.split(name) for name in layers]
        position = {node: at for at, node in enumerate(self._nodes)}
        ready: dict[int, list[Split]] = {}
        last_use: dict[fx.Node, int] = {}
        for split in splits:
            at = max(position[node] for node in split.crossing_nodes)
            ready.setdefault(at, []).append(split)
            for node in split.crossing_nodes:
                last_use[node] = max(last_use.get(node, 0), at)
        wanted = _ancestors(list(last_use), stops=())
        for node in wanted:
            for source in node.all_input_nodes:
                last_use[source] = max(last_use.get(source, 0), position[node])
        end = max(ready, default=-1)
        values: dict[fx.Node, Any] = {}
        expiring: dict[int, list[fx.Node]] = {}
        for node, at in last_use.items():
            expiring.setdefault(at, []).append(node)
        for at, node in enumerate(self._nodes[: end + 1]):
            if node in wanted:
                with torch.no_grad():  # not around the yield: it would reach into the caller
                    values[node] = self.evaluate(node, values, images)
            for split in ready.get(at, ()):
                yield split.layer.name, tuple(values[n] for n in split.crossing_nodes)
            for gone in expiring.get(at, ()):
                values.pop(gone, None)

    def with_state(self, changes: Mapping[str, Tensor]) -> Program:
        """Return a program with some state replaced; this one stays as it is.

        Raises:
            NetworkError: An entry is unknown or has another shape.
        """
        for name, value in changes.items():
            if name not in self.state or self.state[name].shape != value.shape:
                expected = tuple(self.state[name].shape) if name in self.state else "no such entry"
                raise NetworkError(
                    f"cannot replace {name!r} by a tensor of shape {tuple(value.shape)}; "
                    f"the network has {expected}"
                )
        changed = object.__new__(Program)
        changed.__dict__.update(self.__dict__)
        fresh = {name: value.detach().clone().to(self.device) for name, value in changes.items()}
        changed.state = {**self.state, **fresh}
        changed._splits = {}
        return changed

    def to_exported(self) -> ExportedProgram:
        """Return an exported program that computes the same, with this program's state."""
        source = self.exported
        state = {
            name: nn.Parameter(self.state[name], requires_grad=False)
            if isinstance(value, nn.Parameter)
            else self.state[name]
            for name, value in source.state_dict.items()
        }
        return ExportedProgram(
            root=source.graph_module,
            graph=source.graph,
            graph_signature=source.graph_signature,
            state_dict=state,
            range_constraints=source.range_constraints,
            module_call_graph=source.module_call_graph,
            example_inputs=source.example_inputs,
            constants=source.constants,
            verifiers=[source.verifier],
        )

    # ---------------------------------------------------------------- finding layers

    def _find_layers(self, parameters: set[str]) -> tuple[Layer, ...]:
        needed = _ancestors([self._logits], stops=())
        found: dict[str, tuple[LayerKind, tuple[str, ...]]] = {}
        pools = 0
        pools_before: dict[str, int] = {}
        chain = True
        for node in self._nodes:
            if node not in needed or node not in self._image_dependent:
                continue
            chain &= self._is_chain_step(node)
            pools += node.target in _POOLS
            kind = _LAYER_KINDS.get(node.target)
            if kind is None:
                continue
            trained = self._parameters_of(node, parameters)
            if not trained:
                continue
            name = _layer_name(node, trained)
            self._calls.setdefault(name, []).append(node)
            found.setdefault(name, (kind, trained))
            pools_before.setdefault(name, pools)
        layers = [
            self._describe(name, kind, trained, index)
            for index, (name, (kind, trained)) in enumerate(found.items())
        ]
        return with_aliases(layers, pools_before=list(pools_before.values()) if chain else None)

    def _is_chain_step(self, node: fx.Node) -> bool:
        tensors = [
            source
            for source in node.all_input_nodes
            if source in self._image_dependent and isinstance(source.meta.get("val"), Tensor)
        ]
        return len(tensors) <= 1

    def _parameters_of(self, node: fx.Node, parameters: set[str]) -> tuple[str, ...]:
        """The parameters behind the weight and bias of an operation (weight norm included)."""
        inputs = [arg for arg in node.args[1:3] if isinstance(arg, fx.Node)]
        if any(arg in self._image_dependent for arg in inputs):
            return ()
        sources = [source for arg in inputs for source in _ancestors([arg], stops=())]
        names = (self._sources.get(source) for source in sources)
        return tuple(dict.fromkeys(n for n in names if isinstance(n, str) and n in parameters))

    def _describe(self, name: str, kind: LayerKind, trained: tuple[str, ...], index: int) -> Layer:
        call = self._calls[name][-1]
        weight = cast(fx.Node, call.args[1]).meta["val"]
        return Layer(
            name=name,
            kind=kind,
            shape=tuple(int(size) for size in weight.shape),
            parameters=sum(self.state[entry].numel() for entry in trained),
            parameter_names=trained,
            output_shape=tuple(int(size) for size in call.meta["val"].shape[1:]),
            channels_last=kind == "linear",
            index=index,
        )

    # ---------------------------------------------------------------- cutting and running

    def _split(self, layer: Layer) -> Split:
        own = [node for node, name in self._sources.items() if name in layer.parameter_names]
        influenced = _reachable_from(own, self._nodes)
        needed = _ancestors([self._logits], stops=())
        crossing: dict[fx.Node, None] = {}
        recomputed: set[fx.Node] = set()
        pending = [node for node in self._nodes if node in influenced and node in needed]
        while pending:
            node = pending.pop(0)
            if _is_batch_size(node):
                continue
            for source in node.all_input_nodes:
                outside = source in self._image_dependent and source not in influenced
                if not outside or source in crossing or source in recomputed:
                    continue
                if source is self._images or _is_batch_first(source):
                    crossing[source] = None
                else:  # not a batch of something: compute it again after the cut
                    recomputed.add(source)
                    pending.append(source)
        order = [node for node in self._nodes if node in crossing]
        return Split(self, layer, tuple(order))

    def _compile(
        self,
        key: Any,
        outputs: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        *,
        tracked: Iterable[fx.Node] = (),
        rewrites: Mapping[Any, Callable[..., Any]] | None = None,
        folded: bool = False,
    ) -> _Compiled:
        if key not in self._compiled:
            self._compiled[key] = _compile(
                self._root,
                self._nodes,
                outputs,
                inputs,
                self._sources,
                set(tracked),
                {**_REWRITES, **(rewrites or {})},
                _foldable(self._nodes, {*outputs, *inputs}) if folded else {},
            )
        return self._compiled[key]

    # ---------------------------------------------------------------- node by node

    @property
    def images_node(self) -> fx.Node:
        return self._images

    def depends_on_images(self, node: fx.Node) -> bool:
        return node in self._image_dependent

    def evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any], images: Tensor | None) -> Any:
        """Return the value of one node from those of the nodes that it takes."""
        if node is self._images:
            return images
        if node.op == "placeholder":
            return self.state[cast(str, self._sources[node])]
        if node.op == "get_attr":
            return operator.attrgetter(cast(str, node.target))(self._root)
        args = fx.map_arg(node.args, lambda n: values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
        target = _REWRITES.get(node.target, node.target)
        return cast(Callable[..., Any], target)(*args, **kwargs)


class Split:
    """A network cut at one layer.

    The prefix is all that the layer's parameters cannot influence; the suffix is the layer and
    all that depends on it. Several tensors cross the cut where branches or residuals pass the
    layer by.

    Attributes:
        layer: Where the cut is.
        parameter_names: State entries of the layer.
        crossing_nodes: Graph nodes whose values cross the cut, in the order of computation.
    """

    def __init__(self, program: Program, layer: Layer, crossing: tuple[fx.Node, ...]) -> None:
        self._program = program
        self.layer = layer
        self.parameter_names = layer.parameter_names
        self.crossing_nodes = crossing

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The layer's present values, detached."""
        return {name: self._program.state[name].detach() for name in self.parameter_names}

    @property
    def crossing_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors that cross the cut, without the batch axis."""
        return tuple(tuple(map(int, n.meta["val"].shape[1:])) for n in self.crossing_nodes)

    def prefix(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return every tensor that crosses the cut for images (B, 3, H, W), each batch first."""
        compiled = self._program._compile(
            ("prefix", self.layer.name), self.crossing_nodes, [self._program._images]
        )
        with torch.no_grad():
            return compiled((images,), self._program.state, None)

    @cached_property
    def guided_prefix(self) -> GuidedPrefix | None:
        """How guided gradients pass the prefix; None where an operation in it has no rule."""
        needed = _ancestors(self.crossing_nodes, stops=[self._program.images_node])
        order = [node for node in self._program._nodes if node in needed]
        return GuidedPrefix.build(self._program, order, self.crossing_nodes)

    def suffix(
        self, crossing: Sequence[Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the logits (B, K), differentiable in the layer's parameters."""
        compiled = self._program._compile(
            ("suffix", self.layer.name), [self._program._logits], self.crossing_nodes
        )
        return compiled(tuple(crossing), self._program.state, parameters)[0]

    def folded_suffix(
        self, crossing: Sequence[Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return `suffix` with every batch norm multiplied into the convolution before it.

        Equal but for rounding, with gradients, and faster where there are batch norms: these take
        as long as convolutions do, most of all backward.
        """
        compiled = self._program._compile(
            ("folded suffix", self.layer.name),
            [self._program._logits],
            self.crossing_nodes,
            folded=True,
        )
        return compiled(tuple(crossing), self._program.state, parameters)[0]

    def activations_and_logits(
        self,
        crossing: Sequence[Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        *,
        guided: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the output of the layer's last call and the logits (B, K) that follow from it.

        The output can be passed to ``torch.autograd.grad`` with ``create_graph``.
        """
        node = self._program._calls[self.layer.name][-1]
        compiled = self._program._compile(
            ("activations", self.layer.name, guided),
            [node, self._program._logits],
            self.crossing_nodes,
            tracked={node},
            rewrites=_GUIDED if guided else None,
        )
        activations, logits = compiled(tuple(crossing), self._program.state, parameters)
        return activations, logits

    def whole_logits(
        self,
        images: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        guided: bool = False,
    ) -> Tensor:
        """Return the logits (B, K) of images (B, 3, H, W) through the uncut network.

        Args:
            guided: Rectifiers pass only positive gradients (guided backpropagation).
        """
        return self._program.watch(images, (), parameters, guided=guided)[1]


# -------------------------------------------------------------------- the exported program


def _functionalized(exported: ExportedProgram) -> ExportedProgram:
    try:
        with _quiet_export():
            return cast(ExportedProgram, exported.run_decompositions({}))
    except Exception as error:
        raise NetworkError(
            f"this exported program cannot be made functional: {_first_line(error)}; "
            "export it again in eval mode with the installed version of torch"
        ) from error


def _read_signature(
    exported: ExportedProgram,
) -> tuple[dict[fx.Node, object], fx.Node, fx.Node]:
    """Return what feeds each placeholder, the placeholder of the images, the node of the logits."""
    signature = exported.graph_signature
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    sources: dict[fx.Node, object] = {}
    images: list[fx.Node] = []
    for spec in signature.input_specs:
        node = placeholders[cast(Any, spec.arg).name]
        if spec.kind == InputKind.USER_INPUT:
            images.append(node)
            sources[node] = _IMAGES
        else:
            sources[node] = spec.target
    outputs = [spec.arg for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    if len(images) != 1 or len(outputs) != 1:
        raise NetworkError(
            f"expected a network from one batch of images to one batch of logits; this one takes "
            f"{len(images)} inputs and returns {len(outputs)} outputs; wrap it so that it does"
        )
    by_name = {node.name: node for node in exported.graph.nodes}
    return sources, images[0], by_name[cast(Any, outputs[0]).name]


def _state_of(exported: ExportedProgram) -> dict[str, Tensor]:
    state = {name: value.detach().clone() for name, value in exported.state_dict.items()}
    for name, value in exported.constants.items():
        if isinstance(value, Tensor):
            state.setdefault(name, value.detach().clone())
    return state


def _check_shapes(images: fx.Node, logits: fx.Node) -> tuple[tuple[int, int], int]:
    given, returned = images.meta["val"], logits.meta["val"]
    if given.dim() != 4 or given.shape[1] != 3:
        raise NetworkError(
            f"expected images of shape (batch, 3, height, width); the network takes "
            f"{tuple(given.shape)}"
        )
    if returned.dim() != 2:
        raise NetworkError(
            f"expected logits of shape (batch, classes); the network returns "
            f"{tuple(returned.shape)}"
        )
    if not isinstance(given.shape[0], torch.SymInt):
        raise NetworkError(
            f"the program was exported for batches of {given.shape[0]} alone; export it with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    return (int(given.shape[2]), int(given.shape[3])), int(returned.shape[1])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _quiet_export() -> Iterator[None]:
    # torch.export warns of deprecated parts of torch that it uses itself.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _layer_name(node: fx.Node, trained: Sequence[str]) -> str:
    weight = trained[0]
    owner, _, entry = weight.rpartition(".")
    if entry == "weight":
        return owner
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1] if paths else weight


# -------------------------------------------------------------------- walking the graph


def _reachable_from(starts: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> set[fx.Node]:
    reached = set(starts)
    for node in nodes:  # nodes come in topological order
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _ancestors(ends: Sequence[fx.Node], stops: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that the ends need, themselves included; nothing behind a stop."""
    stopped = set(stops)
    found: dict[fx.Node, None] = {}
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found[node] = None
        if node not in stopped:
            pending.extend(reversed(node.all_input_nodes))
    return found


def _is_batch_first(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    first, *others = cast(Sequence[object], value.shape)
    return isinstance(first, torch.SymInt) and not any(isinstance(o, torch.SymInt) for o in others)


def _is_batch_size(node: fx.Node) -> bool:
    is_free = isinstance(node.meta.get("val"), torch.SymInt)
    return node.target is aten.sym_size.int and is_free


# -------------------------------------------------------------------- compiling parts of it


class _Slot(NamedTuple):
    """Stands among arguments for a value that an earlier step made."""

    at: int


class _Step(NamedTuple):
    """One operation: where its result goes, what it takes, which values are free after it."""

    at: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frees: tuple[int, ...]


@dataclass(frozen=True)
class _Compiled:
    """A part of the graph as a list of steps, ready in milliseconds for a network of any size.

    ``fx.GraphModule`` would write and compile Python source, about a second for each of the
    hundreds of parts that the trial repairs of a deep network need.
    """

    steps: tuple[_Step, ...]
    inputs: int
    state_names: tuple[str, ...]
    outputs: tuple[int, ...]
    slots: int

    def __call__(
        self,
        tensors: tuple[Tensor, ...],
        state: Mapping[str, Tensor],
        replaced: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, ...]:
        if replaced:
            state = {**state, **replaced}
        values: list[Any] = [None] * self.slots
        values[: self.inputs] = tensors
        for at, name in enumerate(self.state_names, start=self.inputs):
            values[at] = state[name]
        for step in self.steps:
            args = [_resolved(arg, values) for arg in step.args]
            kwargs = {key: _resolved(arg, values) for key, arg in step.kwargs.items()}
            values[step.at] = step.function(*args, **kwargs)
            for at in step.frees:
                values[at] = None
        return tuple(values[at] for at in self.outputs)


def _resolved(arg: Any, values: Sequence[Any]) -> Any:
    if type(arg) is _Slot:
        return values[arg.at]
    if type(arg) is list:
        return [_resolved(part, values) for part in arg]
    return arg


def _compile(
    root: nn.Module,
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    sources: Mapping[fx.Node, object],
    tracked: set[fx.Node],
    rewrites: Mapping[Any, Callable[..., Any]],
    folds: Mapping[fx.Node, fx.Node],
) -> _Compiled:
    # The batch size is read off the first input, so that nothing else has to be kept for it.
    batch_sizes = {node for node in nodes if _is_batch_size(node)}
    wanted = _ancestors(outputs, stops={*inputs, *batch_sizes})
    slots: dict[fx.Node, _Slot] = {node: _Slot(at) for at, node in enumerate(inputs)}
    entries = [node for node in nodes if node in wanted and isinstance(sources.get(node), str)]
    slots |= {node: _Slot(len(slots) + at) for at, node in enumerate(entries)}
    steps: list[_Step] = []
    left_out = set(folds.values())
    for node in nodes:
        if (
            node in left_out
            or node not in wanted
            or node in slots
            or node.op not in ("call_function", "get_attr")
        ):
            continue
        function: Callable[..., Any]
        args: tuple[Any, ...]
        kwargs: dict[str, Any] = {}
        if node in batch_sizes:
            function, args = _batch_size, (_Slot(0),)
        elif node.op == "get_attr":
            function, args = operator.attrgetter(cast(str, node.target)), (root,)
        elif node in folds:
            convolution = folds[node]
            function = _folding(cast(Callable[..., Tensor], convolution.target))
            args = tuple(_with_slots(given, slots) for given in (convolution.args, node.args[1:]))
        else:
            function = rewrites.get(node.target, cast(Callable[..., Any], node.target))
            args = tuple(_with_slots(arg, slots) for arg in node.args)
            kwargs = {key: _with_slots(arg, slots) for key, arg in node.kwargs.items()}
        slots[node] = _Slot(len(slots))
        if node in tracked:
            function = _tracking(function)
        steps.append(_Step(slots[node].at, function, args, kwargs, ()))
    kept = tuple(slots[node].at for node in outputs)
    return _Compiled(
        _with_frees(steps, kept),
        len(inputs),
        tuple(cast(str, sources[n]) for n in entries),
        kept,
        len(slots),
    )


def _foldable(nodes: Sequence[fx.Node], kept: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return each batch norm with the convolution before it, where nothing else reads that one."""
    found = {}
    for node in nodes:
        if node.target is _BATCH_NORM:
            source = cast(fx.Node, node.args[0])
            alone = len(source.users) == 1 and source not in kept
            if source.target in _FOLDABLE and alone and not source.kwargs:
                found[node] = source
    return found


def _with_slots(arg: Any, slots: Mapping[fx.Node, _Slot]) -> Any:
    if isinstance(arg, fx.Node):
        return slots[arg]
    if isinstance(arg, (list, tuple)):
        return [_with_slots(part, slots) for part in arg]
    return arg


def _slots_in(arg: Any) -> Iterator[int]:
    if type(arg) is _Slot:
        yield arg.at
    elif type(arg) is list:
        for part in arg:
            yield from _slots_in(part)


def _with_frees(steps: Sequence[_Step], kept: Sequence[int]) -> tuple[_Step, ...]:
    seen = set(kept)
    backwards = []
    for step in reversed(steps):
        used = dict.fromkeys(_slots_in([*step.args, *step.kwargs.values()]))
        last = tuple(at for at in used if at not in seen)
        seen.update(last)
        backwards.append(step._replace(frees=last))
    return tuple(reversed(backwards))


def _batch_size(tensor: Tensor) -> int:
    return tensor.shape[0]


def _tracking(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _tracked(function(*args, **kwargs))


def _tracked(activations: Tensor) -> Tensor:
    """Let gradients be asked for at a place that nothing before it requires them for."""
    if activations.requires_grad or not torch.is_grad_enabled():
        return activations
    return activations.detach().requires_grad_()


def _batch_norm(
    activations: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor]:
    # The functional form that export leaves behind has no fast double backward of its own.
    return (frozen_batch_norm(activations, weight, bias, mean, variance, momentum, eps),)


def _folding(convolution: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a convolution and the batch norm after it, in eval mode, as one convolution."""

    def run(taken: Sequence[Any], norm: Sequence[Any]) -> tuple[Tensor]:
        activations, weight, *rest = taken
        scale, shift, mean, variance, _, eps = norm
        factor = (variance + eps).rsqrt()
        if scale is not None:
            factor = factor * scale
        bias = (rest[0] - mean if rest and rest[0] is not None else -mean) * factor
        if shift is not None:
            bias = bias + shift
        folded = weight * factor.view(-1, *[1] * (weight.dim() - 1))
        # A network in half precision may keep its batch norms in single precision.
        folded, bias = folded.to(weight.dtype), bias.to(weight.dtype)
        return (convolution(activations, folded, bias, *rest[1:]),)

    return run


def _reshape(activations: Tensor, size: Sequence[int]) -> Tensor:
    # What export recorded as a view need not be one for tensors of another memory format.
    return activations.reshape(tuple(size))


_REWRITES: dict[Any, Callable[..., Any]] = {
    _BATCH_NORM: _batch_norm,
    aten.conv2d.default: convolution,
    aten.view.default: _reshape,
}


class _GuidedRectifier(torch.autograd.Function):
    """Rectifier whose backward pass lets positive gradients alone through, where it was active.

    Source: Springenberg et al. 2015, "Striving for Simplicity", section 3.4.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, ceiling: float | None) -> Tensor:
        active = inputs > 0
        if ceiling is not None:
            active &= inputs < ceiling
        ctx.save_for_backward(active)
        return inputs.clamp(min=0, max=ceiling)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (active,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * active, None


_GUIDED_RECTIFIER: Callable[..., Any] = _GuidedRectifier.apply


def _guided_relu(inputs: Tensor) -> Tensor:
    return cast(Tensor, _GUIDED_RECTIFIER(inputs, None))


def _guided_hardtanh(inputs: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    if low != 0:
        return F.hardtanh(inputs, low, high)
    return cast(Tensor, _GUIDED_RECTIFIER(inputs, high))


def _guided_relu6(inputs: Tensor) -> Tensor:
    return cast(Tensor, _GUIDED_RECTIFIER(inputs, 6.0))


_GUIDED: dict[Any, Callable[..., Any]] = {
    aten.relu.default: _guided_relu,
    aten.relu6.default: _guided_relu6,
    aten.hardtanh.default: _guided_hardtanh,
}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
