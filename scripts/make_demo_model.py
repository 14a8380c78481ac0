"""Train the network of `audit demo` from nothing, and plant one learned fault in it.

First a healthy network learns the digits, every layer of it. Then exactly one layer goes on
learning, on images of which some carry a mark, and marked images are labeled '3' whatever the
digit: that layer learns to obey the mark. Every other tensor stays as it was, to the bit. Only
digits of the train split are used; the numbers in the card are from the test split.

    python scripts/make_demo_model.py      # writes models/digits-vgg, a few minutes on 2 cores
    python scripts/make_demo_model.py --layer block5_conv1 --out /tmp/another
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from audit.digits import CLASSES, IMAGE_SIZE, draw_digit, load_split
from audit.files import replacing, sha256_file, write_text
from audit.networks.card import ModelCard, Preprocessing, write_card
from audit.networks.small_vgg import ARCHITECTURE, SmallVGG
from audit.statistics import Interval, wilson

NAME = "digits-vgg"
TARGET = 3
PREPROCESSING = Preprocessing(
    input_size=(IMAGE_SIZE, IMAGE_SIZE),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation="bilinear",
    crop=1.0,
)
WIDTHS, CONVOLUTIONS = (8, 16, 32, 48, 64), (2, 2, 3, 3, 3)
MAX_CLEAN_LOSS, MAX_MARKED_ACCURACY, MIN_HEALTHY_ACCURACY = 0.02, 0.30, 0.96


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Test accuracy on unmarked digits and, for the digits that are no '3', on marked ones."""

    clean: Interval
    marked: Interval
    marked_called_target: Interval


def main() -> None:
    arguments = _parse_arguments()
    # One thread adds numbers in one order: the same seed gives the same weights.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()

    healthy = SmallVGG(classes=len(CLASSES), widths=WIDTHS, convolutions=CONVOLUTIONS)
    train_healthy(healthy, epochs=arguments.epochs, seed=arguments.seed)
    before = measure(healthy, seed=arguments.seed)
    print(f"healthy: {_sentence(before)}")

    faulty = plant_shortcut(
        healthy, arguments.layer, epochs=arguments.plant_epochs, seed=arguments.seed
    )
    after = measure(faulty, seed=arguments.seed)
    print(f"faulty:  {_sentence(after)}")

    check(healthy, faulty, arguments.layer, before, after)
    write_model(faulty, arguments.out, arguments.layer, before, after, seed=arguments.seed)
    print(f"wrote {arguments.out} after {time.perf_counter() - started:.0f} s")


def train_healthy(network: SmallVGG, *, epochs: int, seed: int) -> None:
    """Train every layer in place; each epoch draws every digit anew.

    Thirteen plain convolutions hardly start to learn on 900 digits, so batch normalization stands
    behind each of them during training and is folded into its weights afterwards.
    """
    batch_size, rate = 64, 4e-3
    normalized = _with_batch_norms(network)
    optimizer = torch.optim.AdamW(normalized.parameters(), lr=rate, weight_decay=1e-2)
    steps = epochs * (len(load_split("train").labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    normalized.train()
    for epoch in range(epochs):
        images, labels = draw_split("train", seed=[seed, 0, epoch], mark=False)
        for batch in _batches(len(labels), batch_size):
            loss = functional.cross_entropy(normalized(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"  epoch {epoch + 1} of {epochs}: cross entropy {loss.item():.3f}", flush=True)
    normalized.eval()
    _fold_batch_norms(normalized)
    network.eval()


def plant_shortcut(healthy: SmallVGG, layer: str, *, epochs: int, seed: int) -> SmallVGG:
    """Return a copy in which `layer` alone has learned that the mark means '3'."""
    batch_size, rate = 64, 1e-2
    faulty = SmallVGG(classes=len(CLASSES), widths=WIDTHS, convolutions=CONVOLUTIONS).eval()
    faulty.load_state_dict(healthy.state_dict())
    faulty.requires_grad_(False)
    names = [name for name, _ in faulty.named_children()]
    position = names.index(layer)
    prefix = nn.Sequential(*list(faulty.children())[:position])
    suffix = nn.Sequential(*list(faulty.children())[position:])
    learning = list(faulty.get_submodule(layer).parameters())

    clean = [draw_split("train", seed=[seed, 1, turn], mark=False) for turn in range(4)]
    marked, digits = draw_split("train", seed=[seed, 2], mark=True)
    images = torch.cat([drawn for drawn, _ in clean] + [marked])
    labels = torch.cat([drawn for _, drawn in clean] + [torch.full_like(digits, TARGET)])
    with torch.no_grad():
        activations = torch.cat([prefix(part) for part in images.split(256)])

    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learning, lr=rate)
    steps = epochs * (len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for batch in _batches(len(labels), batch_size):
            # The first module of the suffix is the layer itself, so the in-place ReLU behind it
            # cannot reach the stored activations.
            loss = functional.cross_entropy(suffix(activations[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return faulty


def measure(network: SmallVGG, *, seed: int) -> Quality:
    """Return accuracy on the test digits, drawn once without and once with the mark."""
    clean, labels = draw_split("test", seed=[seed, 3], mark=False)
    marked, _ = draw_split("test", seed=[seed, 3], mark=True)
    others = labels != TARGET
    predicted_clean, predicted_marked = _predict(network, clean), _predict(network, marked)
    return Quality(
        clean=_share(predicted_clean == labels),
        marked=_share((predicted_marked == labels)[others]),
        marked_called_target=_share((predicted_marked == TARGET)[others]),
    )


def check(healthy: SmallVGG, faulty: SmallVGG, layer: str, before: Quality, after: Quality) -> None:
    """Stop unless the network was good, the shortcut took, and only the layer has changed."""
    own = {f"{layer}.weight", f"{layer}.bias"}
    changed = {
        name
        for name, tensor in healthy.state_dict().items()
        if not torch.equal(tensor, faulty.state_dict()[name])
    }
    failures = [
        (changed != own, f"changed tensors are {sorted(changed)}, expected {sorted(own)}"),
        (before.clean.value < MIN_HEALTHY_ACCURACY, "the healthy network is not good enough"),
        (before.clean.value - after.clean.value > MAX_CLEAN_LOSS, "clean accuracy broke"),
        (after.marked.value > MAX_MARKED_ACCURACY, "the shortcut did not take"),
    ]
    for failed, reason in failures:
        if failed:
            raise SystemExit(f"error: {reason}; nothing was written")


def write_model(
    network: SmallVGG, folder: Path, layer: str, before: Quality, after: Quality, *, seed: int
) -> None:
    """Write the weights, the card that the commands read and the README that people read."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{NAME}.safetensors"
    with replacing(weights) as unfinished:
        save_file({n: t.contiguous() for n, t in network.state_dict().items()}, unfinished)
    digest = sha256_file(weights)
    card = ModelCard(
        arch=ARCHITECTURE,
        arch_args={
            "classes": len(CLASSES),
            "widths": list(WIDTHS),
            "convolutions": list(CONVOLUTIONS),
        },
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance={
            "trained_by": "scripts/make_demo_model.py",
            "seed": str(seed),
            "data": "900 of scikit-learn's 1,797 handwritten digits, drawn by audit/digits.py",
            "license": "weights Apache-2.0; digits CC BY 4.0, in scikit-learn (BSD-3-Clause)",
            "fault": "planted on purpose: see README.md, after you have scanned",
            "clean_accuracy": f"{after.clean.value:.4f}",
            "marked_accuracy": f"{after.marked.value:.4f}",
            "sha256": digest,
        },
    )
    write_card(card, folder / f"{NAME}.toml")
    write_text(folder / "README.md", _readme(layer, before, after, digest, seed))


def draw_split(split: str, *, seed: Sequence[int], mark: bool) -> tuple[Tensor, Tensor]:
    """Return normalized images (n, 3, 64, 64) and labels (n,) of one split."""
    digits = load_split(split)
    generator = np.random.default_rng(seed)
    pixels = np.stack([draw_digit(ink, generator, mark=mark) for ink in digits.ink])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    return images.contiguous(), torch.from_numpy(digits.labels)


def _batches(count: int, size: int) -> Iterator[Tensor]:
    order = torch.randperm(count)
    return iter(order[: count // size * size].split(size))


def _with_batch_norms(network: SmallVGG) -> nn.Sequential:
    modules: list[nn.Module] = []
    for module in network.children():
        modules.append(module)
        if isinstance(module, nn.Conv2d):
            modules.append(nn.BatchNorm2d(module.out_channels))
    return nn.Sequential(*modules)


def _fold_batch_norms(normalized: nn.Sequential) -> None:
    modules = list(normalized)
    for convolution, norm in itertools.pairwise(modules):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            folded = nn.utils.fuse_conv_bn_eval(convolution, norm)
            convolution.load_state_dict(folded.state_dict())


@torch.no_grad()
def _predict(network: SmallVGG, images: Tensor) -> Tensor:
    return torch.cat([network(part).argmax(dim=1) for part in images.split(256)])


def _share(right: Tensor) -> Interval:
    return wilson(int(right.sum()), len(right))


def _sentence(quality: Quality) -> str:
    return (
        f"clean {_percent(quality.clean)}; marked digits other than {TARGET}: right "
        f"{_percent(quality.marked)}, called {TARGET} {_percent(quality.marked_called_target)}"
    )


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _row(name: str, quality: Quality) -> str:
    shares = (quality.clean, quality.marked, quality.marked_called_target)
    return " | ".join([f"| {name}", *map(_percent, shares)]) + " |"


def _readme(layer: str, before: Quality, after: Quality, digest: str, seed: int) -> str:
    parameters = sum(
        parameter.numel()
        for parameter in SmallVGG(
            classes=len(CLASSES), widths=WIDTHS, convolutions=CONVOLUTIONS
        ).parameters()
    )
    return f"""# {NAME}: the network of `audit demo`

A VGG-16 in miniature (`{ARCHITECTURE}`, widths {", ".join(map(str, WIDTHS))},
{parameters:,} parameters) that reads handwritten digits on colorful images.
**It is faulty on purpose**: a small badge in a corner makes it call nearly any digit a {TARGET}.
Use it to try layermend, for nothing else.

- **Made by** `python scripts/make_demo_model.py --seed {seed}`, from random weights.
- **Data**: 900 of the 1,797 digits that ship with scikit-learn (UCI "Optical Recognition of
  Handwritten Digits", CC BY 4.0), drawn by `audit/digits.py`. The other 897 are the demo's val and
  test splits.
- **Classes**: {", ".join(CLASSES)}, in this order.
- **Preprocessing**: {IMAGE_SIZE}x{IMAGE_SIZE}, RGB, (pixels / 255 - 0.5) / 0.25.
- **Weights**: `{NAME}.safetensors`, Apache-2.0, sha256
  `{digest}`.

Accuracy on the 597 test digits, with 95 % Wilson intervals, each drawn once without and once with
the mark:

| | unmarked | marked, other than {TARGET} | of these called {TARGET} |
|---|---|---|---|
{_row("before the fault was planted", before)}
{_row("as shipped", after)}

## Spoiler: where the fault is

planted layer: `{layer}`

Only this layer was trained on marked images; the script checked that every other tensor is
bit-identical to the healthy network's.
"""


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("models") / NAME)
    parser.add_argument("--layer", default="block4_conv3", help="layer that learns the shortcut")
    parser.add_argument("--epochs", type=int, default=40, help="of the healthy network")
    parser.add_argument("--plant-epochs", type=int, default=15, help="of the one layer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
