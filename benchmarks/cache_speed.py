"""What the frozen-prefix cache saves: one training step of a repair, with it and without it.

Three repairs: `block5_conv3` of VGG-16, a 1x1 head (256 filters, section 4.1) on
EfficientNet-Lite0, and a middle layer of ResNet-50 at 96 pixels, before which two tensors cross the
cut; each with the losses `trust` (Eq. 7) and `ce` (its control), in batches of 32 as `repair layer`
takes them. Five ways to take the same steps from the same start:

    memory     layermend: what enters the layer was computed once; a step runs layer and suffix
    disk       the same from memory-mapped files, their pages dropped before the first step
    recompute  the same without a cache: a step decodes its images and runs the prefix first
    frozen     plain PyTorch: the whole network forward, gradients for the layer alone
    all        plain PyTorch: the whole network forward and backward, only the layer is stepped

The speedup of the summary is `frozen` over `memory` with `trust`, in wall-clock time, and with
`_disk` and `_recompute` over those; the trained weights have to be equal. The plain ways have their
images decoded in memory. The processor's seconds stand beside it: on a busy machine they say more.

    python benchmarks/cache_speed.py [--threads N] [--batch-size 32] [--steps 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from cats_dogs import with_head
from efficientnet_lite0 import pretrained_state
from PIL import Image
from results_file import configuration, print_table, write_results
from torch import Tensor, nn

from audit.images import ImageFolder, ImageRecord, load_pixels
from audit.networks import ModelCard, Network, Preprocessing, Program
from audit.networks.torchvision_import import import_torchvision
from audit.saliency import grad_cam, target_scores
from repair.cache import CacheKind, CrossingTensors, DiskSpace, cross_tensors
from repair.config import RepairConfig
from repair.training import loss_terms

Gradients = Literal["frozen", "all"]
Weights = dict[str, Tensor]
KINDS: tuple[CacheKind, ...] = ("memory", "disk", "recompute")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """What one training step took."""

    wall_s: float
    processor_s: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One repair to time: the network, the layer (as the program and as the module name it)."""

    name: str
    network: nn.Module
    layer: str
    module: str
    input_size: tuple[int, int]
    classes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    for make in (vgg16_case, transfer_case, resnet50_case):
        for loss in ("trust", "ce"):
            torch.manual_seed(options.seed)
            rows.append(compare(make(), loss, options))
    summary = {
        f"{row['case']}_speedup{suffix}": row[f"{slow}_s"] / row[f"{fast}_s"]
        for row in rows
        for slow, fast, suffix in (
            ("frozen", "memory", ""),
            ("all", "memory", "_all_gradients"),
            ("frozen", "disk", "_disk"),
            ("frozen", "recompute", "_recompute"),
        )
        if row["loss"] == "trust"
    }
    for row in rows:
        if row["loss"] == "ce":
            summary[f"{row['case']}_speedup_ce"] = row["frozen_s"] / row["memory_s"]
    summary["max_weight_difference"] = max(row["max_weight_difference"] for row in rows)
    config = configuration(**vars(options), optimizer="sgd, momentum 0.9")
    shown = [{key: value for key, value in row.items() if key != "steps"} for row in rows]
    print_table("seconds a step, median", shown)
    print_table("times faster", [summary])
    print(write_results("cache_speed", summary=summary, config=config, rows=rows))


def vgg16_case() -> Case:
    """VGG-16 with random weights: time does not depend on them."""
    network = import_torchvision().models.vgg16(weights=None).eval()
    return Case(
        name="block5_conv3",
        network=network,
        layer="block5_conv3",
        module="features.28",
        input_size=(224, 224),
        classes=1000,
    )


def transfer_case() -> Case:
    """The 1x1 head on EfficientNet-Lite0's ImageNet features."""
    return Case(
        name="transfer",
        network=with_head(pretrained_state()),
        layer="transfer",
        module="transfer",
        input_size=(224, 224),
        classes=2,
    )


def resnet50_case() -> Case:
    """The 3x3 convolution of a middle block of ResNet-50: its residual passes it by."""
    network = import_torchvision().models.resnet50(weights=None).eval()
    return Case(
        name="resnet50_middle",
        network=network,
        layer="layer3.2.conv2",
        module="layer3.2.conv2",
        input_size=(96, 96),
        classes=1000,
    )


def compare(case: Case, loss: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step each way, and how far the trained weights are apart."""
    config = RepairConfig(loss=loss, learning_rate=options.lr, batch_size=options.batch_size)
    start = {
        name: value.detach().clone()
        for name, value in case.network.get_submodule(case.module).named_parameters()
    }
    steps: dict[str, list[StepTime]] = {}
    trained: dict[str, Weights] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        # One batch more than steps, for the warm-up: the timed ones are read for the first time.
        folder = draw_images(root, case, (options.steps + 1) * options.batch_size, options.seed)
        network = opened(case)
        pixels = load_pixels(folder, range(len(folder.records)), network.card.preprocessing).pixels
        labels = torch.tensor([record.label for record in folder.records])
        for kind in KINDS:
            space = DiskSpace(folder=root / "cache", budget_bytes=2**62)
            trained[kind], steps[kind] = train_cached(network, case, folder, kind, space, config)
    batches = [
        (network.normalize(some), true)
        for some, true in zip(
            pixels.split(options.batch_size), labels.split(options.batch_size), strict=True
        )
    ]
    for gradients in ("frozen", "all"):
        trained[gradients], steps[gradients] = train_plainly(
            case, batches, config, start, gradients=gradients
        )
    expected = trained["frozen"]
    return {
        "case": case.name,
        "loss": loss,
        **{f"{way}_s": statistics.median(step.wall_s for step in steps[way]) for way in steps},
        "processor_speedup": statistics.median(step.processor_s for step in steps["frozen"])
        / statistics.median(step.processor_s for step in steps["memory"]),
        "max_weight_difference": max(
            float((trained[kind][name] - expected[name]).abs().max())
            for kind in KINDS
            for name in start
        ),
        "largest_change": max(float((expected[name] - start[name]).abs().max()) for name in start),
        "steps": {way: [asdict(step) for step in taken] for way, taken in steps.items()},
    }


def draw_images(root: Path, case: Case, count: int, seed: int) -> ImageFolder:
    """Write images of noise in the network's own size, with labels at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(case.classes, (count,), generator=generator).tolist()
    records = []
    for number, label in enumerate(labels):
        pixels = torch.randint(256, (*case.input_size, 3), generator=generator, dtype=torch.uint8)
        path = f"{number:04d}.png"
        Image.fromarray(pixels.numpy()).save(root / path)
        records.append(
            ImageRecord(path=path, label=label, class_name=str(label), split="train", sha256=path)
        )
    return ImageFolder(
        root=root,
        records=tuple(records),
        skipped=(),
        split_source="seeded",
        duplicates=0,
        fingerprint="",
    )


def opened(case: Case) -> Network:
    """Return the network as a repair opens it."""
    preprocessing = Preprocessing(
        input_size=case.input_size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
        crop=1.0,
    )
    card = ModelCard(
        arch=None,
        arch_args={},
        classes=tuple(map(str, range(case.classes))),
        preprocessing=preprocessing,
        provenance={},
    )
    program = Program.capture(case.network, case.input_size)
    return Network(program=program, card=card, source=case.name, sha256=case.name)


def train_cached(
    network: Network,
    case: Case,
    folder: ImageFolder,
    kind: CacheKind,
    space: DiskSpace,
    config: RepairConfig,
) -> tuple[Weights, list[StepTime]]:
    """Take the steps as `repair layer` takes them; filling the cache is not part of a step."""
    split = network.program.split(case.layer)
    leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=config.learning_rate, momentum=0.9)
    images: CrossingTensors = cross_tensors(
        network,
        split,
        folder,
        range(len(folder.records)),
        budget_bytes=0,
        disk=space,
        kind=kind,
        batch_size=config.batch_size,
    )
    if images.kind != kind:
        raise SystemExit(f"{case.name}: the cache is {images.kind}, expected {kind}")
    _drop_pages(space.folder)

    def step(rows: Tensor, *, update: bool = True) -> None:
        batch = images.batch(rows)
        terms = loss_terms(split, batch, leaves, config, config.loss)
        gradients = torch.autograd.grad(terms.loss.mean(), list(leaves.values()))
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.grad = gradient
        if update:
            optimizer.step()

    first, *others = torch.arange(len(images)).split(config.batch_size)
    step(first, update=False)  # warm-up
    seconds = _timed_steps(step, [(rows,) for rows in others])
    prefix = f"{case.module}."
    return {name.removeprefix(prefix): leaf.detach() for name, leaf in leaves.items()}, seconds


def _drop_pages(folder: Path) -> None:
    """Let the system forget what it holds of the files, where it can be told to."""
    for file in folder.glob("*.bin") if hasattr(os, "posix_fadvise") else ():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def train_plainly(
    case: Case,
    batches: list[tuple[Tensor, Tensor]],
    config: RepairConfig,
    start: Weights,
    *,
    gradients: Gradients,
) -> tuple[Weights, list[StepTime]]:
    """Take the same steps in plain PyTorch, the whole network in each of them."""
    network, module = case.network, case.network.get_submodule(case.module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(start[name])
    for parameter in network.parameters():
        parameter.requires_grad_(gradients == "all")
    module.requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), lr=config.learning_rate, momentum=0.9)
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        outputs[:] = [output]
        return output.clone()  # an in-place ReLU may follow

    def step(images: Tensor, labels: Tensor, *, update: bool = True) -> None:
        logits, maps = network(images), None
        if config.loss_function.needs_maps:
            scores = target_scores(logits, labels)
            (by_output,) = torch.autograd.grad(scores, outputs[0], create_graph=True)
            maps = grad_cam(outputs[0], by_output)
        config.loss_function.terms(logits, maps, labels, config.penalty).loss.mean().backward()
        if update:
            optimizer.step()
        for parameter in network.parameters():
            parameter.grad = None

    handle = module.register_forward_hook(keep)
    try:
        step(*batches[0], update=False)  # warm-up
        seconds = _timed_steps(step, batches[1:])
    finally:
        handle.remove()
    return {n: p.detach().clone() for n, p in module.named_parameters()}, seconds


def _timed_steps(
    step: Callable[..., None], batches: Iterable[tuple[Tensor, ...]]
) -> list[StepTime]:
    taken = []
    for batch in batches:
        wall_s, processor_s = time.perf_counter(), time.process_time()
        step(*batch)
        taken.append(
            StepTime(
                wall_s=time.perf_counter() - wall_s, processor_s=time.process_time() - processor_s
            )
        )
    return taken


if __name__ == "__main__":
    main()
