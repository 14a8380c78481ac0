"""On a GPU: does a scan or a repair keep at least 70 % of the speed of plain PyTorch?

    maps       Grad-CAM of every layer, against a plain forward and backward over the same images
    evidence   the scan's evidence pass, which is allowed three times as long (`evidence_cost.py`),
               against the same
    repair     a step on the last convolution, from the cache, by `trust` with Grad-CAM and with
               Guided Grad-CAM, against a plain training step of the whole network

each in images a second, in single precision and, for the repair, in mixed precision (bfloat16) on
both sides, with the most device memory that it took. Networks have random weights: time does not
depend on them. Then accuracy: a head for cats and dogs trained by the same settings with and
without mixed precision, on test photographs (LAYERMEND_DATA; left out where it is not set).

The figures are for CUDA. `--device cpu` tries the script and writes no results file.

    LAYERMEND_DATA=... python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --networks small_vgg --batch-size 4 --steps 2 --photos 8
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cats_dogs
import efficientnet_lite0
import small_networks
import torch
import torch.nn.functional as F
from results_file import configuration, print_table, write_results
from torch import Tensor, nn

from audit.environment import choose_device
from audit.errors import UsageError
from audit.evidence import gather_evidence
from audit.images import Split, open_image_folder
from audit.networks import Program, architectures, open_network
from audit.saliency import layer_maps
from repair.cache import CrossingBatch, cross_tensors
from repair.config import RepairConfig, Saliency
from repair.new_head import head_split, with_new_head
from repair.sources import positions
from repair.training import loss_terms
from repair.transfer import transfer

TARGET = 0.7
NETWORKS: dict[str, tuple[str, int]] = {
    "vgg16": ("torchvision:vgg16", 224),
    "resnet50": ("torchvision:resnet50", 224),
    "efficientnet_lite0": (efficientnet_lite0.ARCH, 224),
    "small_vgg": ("", small_networks.SIZE),
}
SALIENCIES: tuple[Saliency, ...] = ("gradcam", "guided-gradcam")
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Step = Callable[[int], None]
Way = Literal["plain", "ours"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--networks", choices=list(NETWORKS), nargs="+", default=list(NETWORKS)[:3])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--photos", type=int, default=1000, help="of each split, for the accuracy")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("local/gpu"))
    options = parser.parse_args()
    try:
        choose_device(options.device)
    except UsageError:
        raise SystemExit(
            "error: torch finds no CUDA device here; --device cpu tries the script without one"
        ) from None
    torch.manual_seed(options.seed)
    rows = []
    for name in options.networks:
        rows += _throughput(name, options)
    print_table("Images a second beside plain PyTorch", rows)
    accuracies = _accuracies(options) if os.environ.get("LAYERMEND_DATA") else []
    if accuracies:
        print_table("A head for cats and dogs, with and without mixed precision", accuracies)
    if options.device == "cpu":
        print("a try on the CPU: no results file is written")
        return
    summary = {f"{row['network']}_{row['what']}": row["ratio"] for row in rows}
    summary["lowest_ratio"] = min(row["ratio"] for row in rows if row["what"] != "evidence")
    summary["target"] = TARGET
    for row in accuracies:
        summary[f"accuracy_{row['precision']}"] = row["accuracy"]
    config = configuration("cuda", **{**vars(options), "work": None})
    print(write_results("gpu", summary=summary, config=config, rows=[*rows, *accuracies]))


# ------------------------------------------------------------------------------ speed


def _throughput(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each comparison on one network."""
    arch, size = NETWORKS[name]
    module = architectures.build(arch) if arch else small_networks.build("vgg")
    module = module.eval().to(options.device)
    program = Program.capture(module, (size, size), device=options.device)
    batches = [_draw(program, options.batch_size, size, options.device) for _ in range(2)]
    rows = []

    def compare(what: str, plain: Step, ours: Step) -> None:
        rows.append({"network": name, "what": what, **_ratio(plain, ours, options)})

    def forward_and_backward(number: int) -> None:
        images, labels = batches[number % 2]
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module(images), labels).backward()

    def maps(number: int) -> None:
        layer_maps(program, *batches[number % 2])

    def evidence(number: int) -> None:
        if number == 0:  # one pass over as many batches as there are steps
            passed = [batches[at % 2] for at in range(options.steps)]
            gather_evidence(program, passed, list(program.layers), seed=0)

    compare("maps", forward_and_backward, maps)
    compare("evidence", forward_and_backward, evidence)
    for amp in (False, True):
        plain = _training_step(module, batches, amp=amp)
        for saliency in SALIENCIES:
            ours = _repair_step(program, batches, saliency, amp=amp)
            compare(f"repair_{saliency.replace('-', '_')}{'_amp' if amp else ''}", plain, ours)
    return rows


def _draw(program: Program, count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, size, size, device=device)
    return images, torch.randint(program.classes, (count,), device=device)


def _training_step(module: nn.Module, batches: list[tuple[Tensor, Tensor]], *, amp: bool) -> Step:
    """Return a step of plain training of the whole network."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)

    def step(number: int) -> None:
        images, labels = batches[number % 2]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _repair_step(
    program: Program, batches: list[tuple[Tensor, Tensor]], saliency: Saliency, *, amp: bool
) -> Step:
    """Return a step of a repair of the last convolution, what enters it being at hand."""
    split = program.split("last_conv")
    prefix = split.guided_prefix
    crossing = [
        CrossingBatch(
            crossing=split.prefix(images),
            labels=labels,
            positions=torch.arange(len(labels)),
            images=images,
            gates=None if prefix is None else prefix.gates(images),
        )
        for images, labels in batches
    ]
    config = RepairConfig(loss="trust", saliency=saliency, amp=amp)
    leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=1e-4, momentum=0.9)

    def step(number: int) -> None:
        batch = crossing[number % 2]
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=amp):
            terms = loss_terms(split, batch, leaves, config, config.loss)
        gradients = torch.autograd.grad(terms.loss.mean(), list(leaves.values()))
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()

    return step


def _ratio(plain: Step, ours: Step, options: argparse.Namespace) -> dict[str, Any]:
    """Return images a second of both, taken in turn, how they compare, and their memory."""
    ways: Mapping[Way, Step] = {"plain": plain, "ours": ours}
    speed: dict[Way, list[float]] = {"plain": [], "ours": []}
    memory: dict[Way, float | None] = {}
    for repeat in range(options.repeats):
        for way, step in ways.items():
            if repeat == 0:
                step(0)  # warm-up
                _reset_memory(options.device)
            _finish(options.device)
            started_s = time.perf_counter()
            for number in range(options.steps):
                step(number)
            _finish(options.device)
            seconds = time.perf_counter() - started_s
            speed[way].append(options.steps * options.batch_size / seconds)
            if repeat == 0:
                memory[way] = _peak_memory_mib(options.device)
    ratios = [two / one for one, two in zip(speed["plain"], speed["ours"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "plain_images_s": round(statistics.median(speed["plain"]), 1),
        "images_s": round(statistics.median(speed["ours"]), 1),
        "ratio": round(ratio, 3),
        "ratio_lowest": round(min(ratios), 3),
        "ratio_highest": round(max(ratios), 3),
        "reached": "yes" if ratio >= TARGET else "no",
        "plain_mib": memory["plain"],
        "mib": memory["ours"],
    }


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_memory(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak_memory_mib(device: str) -> float | None:
    """Return the most device memory since the last reset; a CPU does not say."""
    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if device == "cuda" else None


# ------------------------------------------------------------------------------ accuracy


def _accuracies(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the test accuracy of one head, trained in single and in mixed precision."""
    options.work.mkdir(parents=True, exist_ok=True)
    size = cats_dogs.INPUT_SIZE
    checkpoint = efficientnet_lite0.write_checkpoint(
        options.work, replace(efficientnet_lite0.PREPROCESSING, input_size=size, crop=1.0)
    )
    network = open_network(str(checkpoint), device=options.device)
    start = with_new_head(network, cats_dogs.CLASSES, seed=options.seed)
    folder = open_image_folder(cats_dogs.data_root() / "cats-dogs", cats_dogs.CLASSES)
    split, _ = head_split(start)
    chosen = {}
    for name in SPLITS:
        found = torch.tensor(positions(folder, name))
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(options.seed))
        chosen[name] = found[order][: options.photos].tolist()
    crossing = {
        name: cross_tensors(start, split, folder, chosen[name], budget_bytes=2**33)
        for name in SPLITS
    }
    rows = []
    for amp in (False, True):
        config = RepairConfig(
            loss="trust", amp=amp, epochs=options.epochs, seed=options.seed, controls=()
        )
        found_head = transfer(start, crossing, config)
        metrics = found_head.test.metrics(cats_dogs.CLASSES, seed=0)
        rows.append(
            {
                "precision": "bfloat16" if amp else "float32",
                "photos": len(chosen["train"]),
                "tested": metrics["n"],
                "accuracy": round(metrics["accuracy"]["value"], 4),
                "accuracy_low": round(metrics["accuracy"]["low"], 4),
                "accuracy_high": round(metrics["accuracy"]["high"], 4),
                "cross_entropy": round(metrics["cross_entropy"]["value"], 4),
                "seconds": round(found_head.trained.seconds, 2),
            }
        )
    return rows


if __name__ == "__main__":
    main()
