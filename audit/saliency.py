"""Saliency maps: where in the image a network finds its evidence for a class.

Grad-CAM (Selvaraju et al. 2017, and Eq. 2-3 of Halliwell and Lecue 2020), HiResCAM (Draelos and
Carin 2020), LayerCAM (Jiang et al. 2021), gradients (Simonyan et al. 2013), guided backpropagation
(Springenberg et al. 2015) and Guided Grad-CAM. One implementation serves looking and training:
`layer_maps` gives the maps of every layer after one forward and one backward pass,
`trainable_maps` the Grad-CAM of one layer with the graph that training needs. Both run on
`audit.networks.Program`, whose graph has no in-place operations and no hooks to leave behind.

Guided backpropagation fails published sanity checks (Adebayo et al. 2018): look at it, but never
score a layer by it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.networks.layers import Layer
from audit.networks.program import Program, Split

__all__ = [
    "INPUT",
    "METHODS",
    "Method",
    "grad_cam",
    "guided_grad_cam",
    "guided_gradients",
    "hires_cam",
    "layer_cam",
    "layer_map",
    "layer_maps",
    "normalize_maps",
    "resize_maps",
    "target_scores",
    "trainable_gradients",
    "trainable_guided_maps",
    "trainable_maps",
]

Method = Literal["gradcam", "guided-gradcam", "hirescam", "layercam", "gradients"]
METHODS: tuple[Method, ...] = get_args(Method)

INPUT = "input"
"""The key of maps that belong to the image and not to a layer (method ``gradients``)."""


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return Grad-CAM: channels weighted by their mean gradient, summed and rectified.

    L = ReLU(sum_k alpha_k A_k), alpha_k = mean over w, h of dy/dA_k    Source: Eq. 2-3

    Args:
        activations: Output of a layer, (B, C, H, W).
        gradients: Gradient of the class score by it, (B, C, H, W).

    Returns:
        Maps >= 0, (B, H, W), in units of the class score.
    """
    weights = gradients.mean(dim=(2, 3))  # (B, C, H, W) -> (B, C)
    return torch.einsum("bc,bchw->bhw", weights, activations).relu()


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return HiResCAM: L = ReLU(sum_k dy/dA_k * A_k). Shapes as in `grad_cam`.

    Source: Draelos and Carin 2020, "Use HiResCAM instead of Grad-CAM", Eq. 6, rectified.
    """
    return (activations * gradients).sum(dim=1).relu()


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return LayerCAM: L = ReLU(sum_k ReLU(dy/dA_k) * A_k). Shapes as in `grad_cam`.

    Source: Jiang et al. 2021, "LayerCAM", Eq. 6-7.
    """
    return (activations * gradients.relu()).sum(dim=1).relu()


_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": grad_cam,
    "hirescam": hires_cam,
    "layercam": layer_cam,
}


def layer_maps(
    program: Program,
    images: Tensor,
    targets: Tensor,
    *,
    layers: Sequence[str] | None = None,
    method: Method = "gradcam",
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the maps of many layers after one forward and one backward pass.

    Args:
        images: Normalized, (B, 3, H, W).
        targets: The class that is explained, per image, int64 (B,).
        layers: Names or aliases; every layer with spatial output when None.
        method: One of `METHODS`. Guided Grad-CAM takes a second pass; its maps have the size of
            the image and sum the absolute attributions of the three color channels.
        state: Entries that replace the program's own state.

    Returns:
        By layer, raw maps >= 0, (B, h, w), detached, in the layer's own resolution. The method
        ``gradients`` has one map a image, under the key ``input``.
    """
    if method == "gradients":
        by_image = _input_gradients(program, images, targets, state, guided=False)
        return {INPUT: by_image.abs().amax(dim=1)}
    names = [
        layer.name
        for layer in (program.layers if layers is None else map(program.layer, layers))
        if layer.has_maps or layers is not None
    ]
    with torch.enable_grad():
        activations, logits = program.watch(images, names, state)
        gradients = torch.autograd.grad(
            target_scores(logits, targets),
            list(activations.values()),
            allow_unused=True,
            materialize_grads=True,
        )
    formula: Method = "gradcam" if method == "guided-gradcam" else method
    maps = {
        name: layer_map(program.layer(name), activations[name].detach(), gradient, formula)
        for name, gradient in zip(names, gradients, strict=True)
    }
    if method != "guided-gradcam":
        return maps
    guided = _input_gradients(program, images, targets, state, guided=True)
    return {name: guided_grad_cam(cam, guided).abs().sum(dim=1) for name, cam in maps.items()}


def layer_map(
    layer: Layer, activations: Tensor, gradients: Tensor, method: Method = "gradcam"
) -> Tensor:
    """Return the maps (B, h, w) of one layer from its output and the score's gradient by it.

    Args:
        activations: As the layer returns them, channels first or last.
        gradients: Of the same shape.
        method: One that has a formula of its own: gradcam, hirescam or layercam.
    """
    if activations.dim() != 4:
        raise ValueError(
            f"maps need a layer output of shape (batch, channels, height, width); "
            f"that of {layer.name!r} is {tuple(activations.shape)}"
        )
    axis = -1 if layer.channels_last else 1
    return _FORMULAS[method](activations.movedim(axis, 1), gradients.movedim(axis, 1))


def trainable_maps(
    split: Split,
    crossing: Sequence[Tensor],
    parameters: Mapping[str, Tensor] | None,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the Grad-CAM of the split's layer and the logits, differentiable in the parameters.

    Args:
        crossing: What crosses the cut, from ``split.prefix`` or a cache of it.
        parameters: The layer's values, requiring gradients; its present ones when None.
        targets: The class that is explained, per image, int64 (B,).

    Returns:
        Raw maps >= 0, (B, h, w), and logits, (B, K), both with their graph.
    """
    activations, logits = split.activations_and_logits(crossing, parameters)
    (gradients,) = torch.autograd.grad(
        target_scores(logits, targets), activations, create_graph=True
    )
    return layer_map(split.layer, activations, gradients), logits


def trainable_guided_maps(
    split: Split,
    images: Tensor | None,
    crossing: Sequence[Tensor],
    parameters: Mapping[str, Tensor] | None,
    targets: Tensor,
    *,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Guided Grad-CAM, in the size of the image, and the logits, both with their graph.

    The Grad-CAM and the logits need what crosses the cut alone. The guided gradients run through
    the whole network, forward and backward, unless the prefix's gates are given: then forward
    through what follows the cut, and backward through all.

    Args:
        images: What `crossing` came from, normalized, (B, 3, H, W); not used where gates are given.
        crossing: As for `trainable_maps`.
        parameters: As for `trainable_maps`.
        targets: As for `trainable_maps`.
        gates: Of the same images, from ``split.guided_prefix``, uint8 (B, bytes).

    Returns:
        Raw maps >= 0, (B, H, W), the absolute attributions summed over the color channels, and
        logits, (B, K).
    """
    maps, logits = trainable_maps(split, crossing, parameters, targets)
    if gates is not None and split.guided_prefix is not None:
        leaves = [tensor.detach().requires_grad_() for tensor in crossing]
        _, guided_logits = split.activations_and_logits(leaves, parameters, guided=True)
        by_crossing = torch.autograd.grad(
            target_scores(guided_logits, targets),
            leaves,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        guided = split.guided_prefix.pull_back(by_crossing, gates)
    elif images is not None:
        leaf = images.detach().requires_grad_()
        guided_logits = split.whole_logits(leaf, parameters, guided=True)
        scores = target_scores(guided_logits, targets)
        (guided,) = torch.autograd.grad(scores, leaf, create_graph=True)
    else:
        raise ValueError("guided maps need the images, or the gates of the split's guided prefix")
    return guided_grad_cam(maps, guided).abs().sum(dim=1), logits


def trainable_gradients(
    split: Split,
    crossing: Sequence[Tensor],
    parameters: Mapping[str, Tensor] | None,
    images: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return where the layer's output, or the image, decides, and the logits, with their graph.

    G = sum over channels of (d/dA sum over k of log p_k)^2       Source: Ross et al. 2017, Eq. 1,
                            where A is the image; here the layer's output unless images are given

    Args:
        crossing: As for `trainable_maps`; not used where images are given.
        parameters: As for `trainable_maps`.
        images: What `crossing` came from, normalized, (B, 3, H, W); the whole network is run.

    Returns:
        G >= 0, (B, h, w) in the size of A, and logits, (B, K).
    """
    if images is None:
        place, logits = split.activations_and_logits(crossing, parameters)
        axis = -1 if split.layer.channels_last else 1
    else:
        place, axis = images.detach().requires_grad_(), 1
        logits = split.whole_logits(place, parameters)
    log_probabilities = logits.log_softmax(dim=1)
    (gradients,) = torch.autograd.grad(log_probabilities.sum(), place, create_graph=True)
    return gradients.square().sum(dim=axis), logits


def guided_gradients(
    program: Program,
    images: Tensor,
    targets: Tensor,
    state: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return guided backpropagation: the class score's gradient by the image, (B, 3, H, W),
    with every rectifier passing positive gradients only.

    Source: Springenberg et al. 2015, section 3.4.
    """
    return _input_gradients(program, images, targets, state, guided=True)


def guided_grad_cam(maps: Tensor, guided: Tensor) -> Tensor:
    """Return Guided Grad-CAM (B, 3, H, W): maps (B, h, w) enlarged, times guided gradients.

    Source: Selvaraju et al. 2017, section 3.2.
    """
    return resize_maps(maps, (guided.shape[2], guided.shape[3])).unsqueeze(1) * guided


def normalize_maps(maps: Tensor) -> Tensor:
    """Return each map (..., h, w) divided by its maximum: in [0, 1], all-zero maps stay zero."""
    peak = maps.amax(dim=(-2, -1), keepdim=True)
    safe = torch.where(peak > 0, peak, torch.ones_like(peak))
    return maps / safe


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (B, h, w) enlarged bilinearly to (B, *size)."""
    return F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear").squeeze(1)


def target_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over images of each one's logit of its target class, a scalar.

    Images do not influence each other in eval mode, so its gradient holds every image's own.
    """
    return logits.gather(1, targets.unsqueeze(1)).sum()


def _input_gradients(
    program: Program,
    images: Tensor,
    targets: Tensor,
    state: Mapping[str, Tensor] | None,
    *,
    guided: bool,
) -> Tensor:
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        _, logits = program.watch(leaf, (), state, guided=guided)
        return torch.autograd.grad(target_scores(logits, targets), leaf)[0]
