"""A small network as a model file with its card, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from audit.networks import ModelCard, Preprocessing, write_card
from audit.networks.small_vgg import ARCHITECTURE, SmallVGG

__all__ = ["preprocessing", "save_with_card"]


def preprocessing(side: int) -> Preprocessing:
    """Return that of a network that takes (pixels / 255 - 0.5) / 0.25 of square images."""
    return Preprocessing(
        input_size=(side, side),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        interpolation="bilinear",
        crop=1.0,
    )


def save_with_card(
    network: SmallVGG,
    path: Path,
    classes: Sequence[str],
    *,
    widths: Sequence[int],
    convolutions: Sequence[int],
    side: int,
    trained_by: str,
) -> None:
    """Write the weights of a network, and beside them the card that the commands read.

    Args:
        network: Of these widths and convolutions; it takes (pixels / 255 - 0.5) / 0.25.
        path: Of the weights, ends in .safetensors.
        classes: Name of each output.
        widths: As the network was made with.
        convolutions: Likewise.
        side: Height and width of its images.
        trained_by: The script, for the card.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    card = ModelCard(
        arch=ARCHITECTURE,
        arch_args={
            "classes": len(classes),
            "widths": list(widths),
            "convolutions": list(convolutions),
        },
        classes=tuple(classes),
        preprocessing=preprocessing(side),
        provenance={"trained_by": trained_by},
    )
    write_card(card, path.with_suffix(".toml"))
