"""The network as it is served: what stands before it and behind it in the exported graph.

`--preprocess` puts the scaling of pixels before it (uint8 in) and the softmax behind it
(probabilities out); with `photo` also resize and cut, so that photographs of any size go in.
`--saliency` gives the Grad-CAM of the predicted class as a second output, its gradient written out
by `repair.onnx_gradients`. The module here runs the network's functional graph operation by
operation under its own parameter names, so that the exported initializers keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from audit.errors import ExportError, UsageError
from audit.networks import Network
from audit.networks.layers import Layer
from audit.saliency import layer_map
from repair.onnx_gradients import check_differentiable, output_gradient
from repair.onnx_resizing import check_resizable, resized

__all__ = ["LAYOUTS", "Form", "Layout", "choose_map_layer", "served_program"]

Layout = Literal["nhwc", "nchw", "photo"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
INPUT, LOGITS, PROBABILITIES, MAP = "images", "logits", "probabilities", "map"
BATCH_AXIS, HEIGHT_AXIS, WIDTH_AXIS = "batch", "height", "width"
OPSET = 18

_LAYER_CALLS = {
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.linear.default,
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the exported graph takes and gives.

    Attributes:
        opset: ONNX operator set.
        preprocess: Layout of uint8 pixels that it takes, `photo` for nhwc of any size; normalized
            float images when None.
        map_layer: Layer whose Grad-CAM is the second output; one output when None.
        half: Weights and arithmetic in float16; inputs and outputs keep their types.

    Raises:
        UsageError: An unknown layout.
    """

    opset: int = OPSET
    preprocess: Layout | None = None
    map_layer: str | None = None
    half: bool = False

    def __post_init__(self) -> None:
        if self.preprocess is not None and self.preprocess not in LAYOUTS:
            raise UsageError(
                f"--preprocess is {self.preprocess!r}; expected one of {', '.join(LAYOUTS)}"
            )

    @property
    def free_axes(self) -> tuple[str, ...]:
        """Names of the input's first axes, which may have any size."""
        photo = self.preprocess == "photo"
        return (BATCH_AXIS, HEIGHT_AXIS, WIDTH_AXIS) if photo else (BATCH_AXIS,)

    @property
    def outputs(self) -> tuple[str, ...]:
        scores = LOGITS if self.preprocess is None else PROBABILITIES
        return (scores,) if self.map_layer is None else (scores, MAP)


def choose_map_layer(network: Network, asked: str | None, repaired: str | None) -> str:
    """Return whose map the graph gives: the one asked for, the repaired one, the last convolution.

    Raises:
        ExportError: No layer of the network has maps.
        LayerNotFoundError: There is no such layer.
    """
    if asked is not None:
        return network.layer(asked).name
    if repaired is not None and network.layer(repaired).has_maps:
        return network.layer(repaired).name
    with_maps = [layer.name for layer in network.program.layers if layer.has_maps]
    if not with_maps:
        raise ExportError("--saliency: no layer of this network has maps; leave --saliency out")
    return with_maps[-1]


def served_program(network: Network, form: Form) -> ExportedProgram:
    """Return the exported program of images -> (scores, maps) in this form.

    Raises:
        ExportError: The layer has no maps, or a gradient behind it cannot be written.
        LayerNotFoundError: There is no such layer.
        UsageError: Photographs are prepared in a way that a graph does not know.
    """
    if form.preprocess == "photo":
        check_resizable(network.card.preprocessing)
    program = network.program.to_exported()
    if form.preprocess is None and form.map_layer is None:
        return program
    module = _Served(network, program.run_decompositions({}), form)
    height, width = network.card.preprocessing.input_size
    channels_first = form.preprocess in (None, "nchw")
    shape = (2, 3, height, width) if channels_first else (2, height, width, 3)
    kind = network.program.dtype if form.preprocess is None else torch.uint8
    example = torch.zeros(shape, dtype=kind)  # two images: with one the batch would be fixed at 1
    with torch.no_grad():
        return torch.export.export(
            module,
            (example,),
            dynamic_shapes=({at: Dim(name, min=1) for at, name in enumerate(form.free_axes)},),
        )


class _Served(nn.Module):
    """Runs a functional graph, with what is to be before and behind it."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, network: Network, functional: ExportedProgram, form: Form) -> None:
        super().__init__()
        self._form = form
        self._settings = network.card.preprocessing
        self._nodes = list(functional.graph.nodes)
        self._root = functional.graph_module
        self._images, self._names = self._register_state(functional)
        (output,) = (node for node in self._nodes if node.op == "output")
        self._logits = cast(fx.Node, cast(Any, output.args[0])[0])
        self._layer: Layer | None = None
        if form.map_layer is not None:
            self._layer = network.layer(form.map_layer)
            self._place = self._call_of(self._layer)
            check_differentiable(self._nodes, self._place, self._logits)
        for name, values in (("mean", self._settings.mean), ("std", self._settings.std)):
            self.register_buffer(
                f"pixel_{name}", torch.tensor(values, dtype=network.program.dtype).view(3, 1, 1)
            )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values = self._values(self._normalized(images))
        logits = cast(Tensor, values[self._logits])
        scores = logits if self._form.preprocess is None else logits.softmax(dim=1)
        if self._layer is None:
            return scores
        classes = torch.arange(logits.shape[1], device=logits.device)
        predicted = (classes == logits.argmax(dim=1, keepdim=True)).to(logits.dtype)
        gradients = output_gradient(self._nodes, values, self._place, self._logits, predicted)
        return scores, layer_map(self._layer, values[self._place], gradients)

    def _normalized(self, images: Tensor) -> Tensor:
        if self._form.preprocess is None:
            return images
        if self._form.preprocess != "nchw":
            images = images.permute(0, 3, 1, 2)
        if self._form.preprocess == "photo":
            images = resized(images, self._settings)
        return (images.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std

    def _values(self, images: Tensor) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {self._images: images}
        for node in self._nodes:
            if node in self._names:
                values[node] = self.get_parameter_or_buffer(self._names[node])
            elif node.op == "get_attr":
                values[node] = getattr(self._root, cast(str, node.target))
            elif node.op == "call_function":
                args = fx.map_arg(node.args, lambda n: values[n])
                kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
                values[node] = cast(Any, node.target)(*args, **kwargs)
        return values

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return cast(Tensor, getattr(self.get_submodule(path), leaf))

    def _register_state(self, functional: ExportedProgram) -> tuple[fx.Node, dict[fx.Node, str]]:
        """Take over the state by name; return the images' node, and the others with names."""
        by_name = {node.name: node for node in self._nodes if node.op == "placeholder"}
        names: dict[fx.Node, str] = {}
        images: fx.Node | None = None
        for spec in functional.graph_signature.input_specs:
            node = by_name[cast(Any, spec.arg).name]
            if spec.kind is InputKind.USER_INPUT:
                images = node
            elif node.users:
                name = cast(str, spec.target)
                stored = functional.state_dict.get(name)
                value = functional.constants[name] if stored is None else stored
                self._register(name, cast(Tensor, value), spec.kind)
                names[node] = name
        return cast(fx.Node, images), names

    def _register(self, name: str, value: Tensor, kind: InputKind) -> None:
        *path, leaf = name.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part] or self
        if kind is InputKind.PARAMETER:
            place.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
        else:
            place.register_buffer(leaf, value.detach())

    def _call_of(self, layer: Layer) -> fx.Node:
        """Return the last call of a layer with a map."""
        own = {node for node, name in self._names.items() if name in layer.parameter_names}
        calls = [
            node
            for node in self._nodes
            if node.target in _LAYER_CALLS and _comes_from(cast(fx.Node, node.args[1]), own)
        ]
        if not calls or not layer.has_maps:
            raise ExportError(
                f"{layer.name} has no map (its output is {layer.output_shape}); choose a "
                "convolution with --map-layer"
            )
        return cast(fx.Node, calls[-1])


def _comes_from(node: fx.Node, sources: set[fx.Node]) -> bool:
    return node in sources or any(_comes_from(parent, sources) for parent in node.all_input_nodes)
