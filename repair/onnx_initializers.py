"""Does only the repaired layer differ between two exports, the original's and the repair's?

Initializers are compared bit by bit. Every one that differs must be accounted for by the tensors
that the repair changed: as they were trained, transposed, or with the batch norm behind the layer
folded in, as the exporter does. The folding is recomputed here in double precision:

    W' = W g,  b' = (b - mean) g + shift,  g = scale / sqrt(variance + eps)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from audit.networks import Network

__all__ = ["InitializerChanges", "changed_initializers"]

FOLDING_TOLERANCE = 1e-5  # of the largest value; folding in single precision shows at 1e-7


@dataclass(frozen=True, kw_only=True)
class InitializerChanges:
    """What differs between the original's initializers and the repair's.

    Attributes:
        total: Initializers of the repaired network's export.
        explained: By initializer, what it is made of and how exactly.
        unexplained: Initializers that differ and that the repaired layer does not account for.
    """

    total: int
    explained: dict[str, str]
    unexplained: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [*self.explained, *self.unexplained]


def changed_initializers(
    before: onnx.ModelProto, after: onnx.ModelProto, network: Network, layer: str
) -> InitializerChanges:
    """Return which initializers differ, and what of the repaired network accounts for each.

    Args:
        before: Export of the original network.
        after: Export of the repaired one, in the same form.
        network: The repaired network.
        layer: Its repaired layer.
    """
    old, new = _initializers(before), _initializers(after)
    known = {_fingerprint(value) for value in old.values()}
    parts = _parts(network, layer)
    explained, unexplained = {}, []
    for name, value in new.items():
        # Equal tensors are stored once: a name may be new where its value is not.
        if _fingerprint(value) in known and (name not in old or _same(old[name], value)):
            continue
        reason = _explanation(value, parts)
        if reason is None:
            unexplained.append(name)
        else:
            explained[name] = reason
    return InitializerChanges(total=len(new), explained=explained, unexplained=tuple(unexplained))


def _parts(network: Network, layer: str) -> dict[str, np.ndarray]:
    """Return, in double precision, all that the repaired layer's tensors become in an export."""
    program, found = network.program, network.layer(layer)
    own = {
        name: program.state[name].detach().cpu().double().numpy() for name in found.parameter_names
    }
    parts = {f"{name}, as trained": value for name, value in own.items()}
    parts |= {
        f"{name}, transposed": np.ascontiguousarray(value.T)
        for name, value in own.items()
        if value.ndim == 2
    }
    norm = program.batch_norm_after(layer)
    weight, bias = own.get(f"{found.name}.weight"), own.get(f"{found.name}.bias", 0.0)
    if norm is None or weight is None:
        return parts
    affine = list(program.norm_parameters_after(layer).items())
    values = [value.cpu().double().numpy() for _, value in affine]
    scale, shift = (*values, 1.0, 0.0)[:2] if len(values) != 1 else (values[0], 0.0)
    mean, variance = (moment.cpu().double().numpy() for moment in (norm.mean, norm.variance))
    gain = scale / np.sqrt(variance + norm.eps)
    folded = "with the batch norm behind it folded in"
    parts[f"{found.name}.weight, {folded}"] = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
    parts[f"bias of {found.name}, {folded}"] = (bias - mean) * gain + shift
    parts[f"gain of the batch norm behind {found.name}"] = gain
    return parts | {f"{name}, as trained": v for (name, _), v in zip(affine, values, strict=True)}


def _explanation(value: np.ndarray, parts: dict[str, np.ndarray]) -> str | None:
    for description, part in parts.items():
        if part.size != value.size:
            continue
        error = float(np.abs(part.reshape(-1) - value.reshape(-1).astype(np.float64)).max())
        if error == 0:
            return description
        if error <= FOLDING_TOLERANCE * float(np.abs(part).max()):
            return f"{description} (largest difference {error:.1e})"
    return None


def _initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _fingerprint(value: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return value.dtype.str, value.shape, value.tobytes()


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return _fingerprint(first) == _fingerprint(second)
