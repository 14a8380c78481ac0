"""A network as the rest of layermend knows it: its program, its card and its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from audit.networks.card import ModelCard
from audit.networks.layers import Layer
from audit.networks.program import Program


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier that can be run, watched and cut, with what is known about it.

    Attributes:
        program: The graph and its state.
        card: Architecture, classes (one per output, in order), preprocessing and provenance.
        source: What it was opened from, as the user wrote it.
        sha256: Fingerprint of the file, or of the state where there is no file.
    """

    program: Program
    card: ModelCard
    source: str
    sha256: str

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return (pixels / 255 - mean) / std on the program's device, in its dtype.

        Args:
            pixels: RGB, (B, 3, H, W), uint8 in [0, 255].
        """
        device, dtype = self.program.device, self.program.dtype
        settings = self.card.preprocessing
        mean = torch.tensor(settings.mean, device=device, dtype=dtype).view(3, 1, 1)
        std = torch.tensor(settings.std, device=device, dtype=dtype).view(3, 1, 1)
        return (pixels.to(device=device, non_blocking=True).to(dtype) / 255 - mean) / std

    def layer(self, name: str) -> Layer:
        """Return the layer of that module path or alias.

        Raises:
            LayerNotFoundError: there is none; the message has the closest names.
        """
        return self.program.layer(name)

    def with_state(self, changes: Mapping[str, Tensor]) -> Network:
        """Return a network with these tensors in place of its own; this one stays as it is."""
        program = self.program.with_state(changes)
        return replace(self, program=program, sha256=sha256_state(program.state))


def sha256_state(state: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of a state: names, types, shapes and bytes, in the order of names."""
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
