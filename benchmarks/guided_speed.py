"""What a training step on Guided Grad-CAM can save, the layer before the cut being frozen.

Guided gradients need the whole network backward, in every step. Three ways to take the same step
(loss `trust`, batches of 32), at several layers of three networks:

    torch     the whole network forward, and backward with a graph; derivatives are torch's own,
              which compute gradients of frozen weights that nobody asks for
    frozen    the same, frozen convolutions and batch norms having derivatives of their own
    gates     layermend: the frozen part's gates (where rectifiers were active, what poolings took)
              were kept; what follows the cut runs forward, and all runs backward

`gradcam` stands beside them: the same step on Grad-CAM, which needs nothing before the cut. The
summary's speedups are by the processor's seconds, `torch` over `gates` and `torch` over `frozen`;
a busy machine does not change those much. Gradients of all three ways are compared in double
precision. `gate_kib` is what the gates of one image take, `image_kib` what the image itself does.

    python benchmarks/guided_speed.py [--threads 1] [--batch-size 32] [--steps 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import efficientnet_lite0
import small_networks
import torch
import torch.nn.functional as F
from results_file import configuration, print_table, write_results
from torch import Tensor, nn

import audit.networks.program
from audit.networks import Program, Split, architectures
from audit.networks.torchvision_import import import_torchvision
from repair.cache import CrossingBatch
from repair.config import RepairConfig
from repair.training import loss_terms

WAYS = ("torch", "frozen", "gates", "gradcam")
EXACT_IMAGES = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, its input side, and the layers to repair, from late to early."""

    name: str
    network: nn.Module
    size: int
    layers: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows = [compare(case, layer, options) for case in cases() for layer in case.layers]
    print_table("processor's seconds a step", rows)
    summary = {
        f"{row['network']}_{row['layer'].replace('.', '_')}{suffix}": round(row[ratio], 2)
        for row in rows
        for suffix, ratio in (("", "speedup"), ("_frozen", "speedup_frozen"))
    }
    summary["lowest_speedup"] = round(min(row["speedup"] for row in rows), 2)
    summary["max_gradient_difference"] = max(row["gradient_difference"] for row in rows)
    config = configuration("cpu", "timm", **vars(options))
    print(write_results("guided_speed", summary=summary, config=config, rows=rows))


def cases() -> list[Case]:
    """Return the networks, with random weights: time does not depend on them."""
    return [
        Case(
            name="small_vgg",
            network=small_networks.build("vgg"),
            size=small_networks.SIZE,
            layers=("block5_conv3", "block3_conv3", "block1_conv2"),
        ),
        Case(
            name="efficientnet_lite0",
            network=architectures.build(efficientnet_lite0.ARCH),
            size=96,
            layers=("conv_head", "blocks.3.2.conv_pw", "blocks.1.1.conv_pw"),
        ),
        Case(
            name="resnet18",
            network=import_torchvision().models.resnet18(weights=None),
            size=96,
            layers=("layer4.1.conv2", "layer3.0.conv2", "layer1.1.conv2"),
        ),
    ]


def compare(case: Case, layer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step each way, and how far their gradients are apart."""
    taken = {way: _seconds(case, layer, way, options) for way in WAYS}
    gradients = {way: _exact_gradients(case, layer, way) for way in WAYS[:3]}
    largest = float(gradients["torch"].abs().max())
    prefix = _split(case, layer, "gates").guided_prefix
    row: dict[str, Any] = {"network": case.name, "layer": layer}
    row |= {f"{way}_s": statistics.median(step[1] for step in taken[way]) for way in WAYS}
    row["speedup"] = row["torch_s"] / row["gates_s"]
    row["speedup_frozen"] = row["torch_s"] / row["frozen_s"]
    row["wall_speedup"] = statistics.median(s[0] for s in taken["torch"]) / statistics.median(
        s[0] for s in taken["gates"]
    )
    row["gradient_difference"] = max(
        float((gradients[way] - gradients["torch"]).abs().max()) / largest for way in WAYS[1:3]
    )
    row["gate_kib"] = round((prefix.bytes if prefix else 0) / 2**10, 1)
    row["image_kib"] = round(4 * 3 * case.size**2 / 2**10, 1)
    return row


def _seconds(
    case: Case, layer: str, way: str, options: argparse.Namespace
) -> list[tuple[float, float]]:
    """Return wall and processor's seconds of each step, after a warm-up."""
    split = _split(case, layer, way)
    batch = _batch(split, case.size, options.batch_size, torch.float32)
    taken = []
    with _derivatives(way):
        for number in range(options.steps + 1):
            wall_s, processor_s = time.perf_counter(), time.process_time()
            _step(split, batch, way)
            if number:
                taken.append((time.perf_counter() - wall_s, time.process_time() - processor_s))
    return taken


def _exact_gradients(case: Case, layer: str, way: str) -> Tensor:
    split = _split(case, layer, way, torch.float64)
    with _derivatives(way):
        return _step(split, _batch(split, case.size, EXACT_IMAGES, torch.float64), way)


_PROGRAMS: dict[tuple[str, bool, torch.dtype], Program] = {}


def _split(case: Case, layer: str, way: str, dtype: torch.dtype = torch.float32) -> Split:
    # Captured twice: what was compiled with torch's own derivatives must not serve the others.
    key = (case.name, way == "torch", dtype)
    if key not in _PROGRAMS:
        network = deepcopy(case.network).to(dtype).eval()
        _PROGRAMS[key] = Program.capture(network, (case.size, case.size))
    return _PROGRAMS[key].split(layer)


def _batch(split: Split, size: int, count: int, dtype: torch.dtype) -> CrossingBatch:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=draw, dtype=torch.float64).to(dtype)
    prefix = split.guided_prefix
    return CrossingBatch(
        crossing=split.prefix(images),
        labels=torch.arange(count) % 2,
        positions=torch.arange(count),
        images=images,
        gates=None if prefix is None else prefix.gates(images),
    )


def _step(split: Split, batch: CrossingBatch, way: str) -> Tensor:
    """Return the gradients of a step's loss, all in one row."""
    config = RepairConfig(
        loss="trust", saliency="gradcam" if way == "gradcam" else "guided-gradcam"
    )
    if way != "gates":
        batch = CrossingBatch(
            crossing=batch.crossing,
            labels=batch.labels,
            positions=batch.positions,
            images=batch.images,
        )
    leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
    terms = loss_terms(split, batch, leaves, config, config.loss)
    found = torch.autograd.grad(terms.loss.mean(), list(leaves.values()))
    return torch.cat([gradient.flatten() for gradient in found])


def _derivatives(way: str) -> Any:
    return _torchs_own() if way == "torch" else nullcontext()


@contextmanager
def _torchs_own() -> Iterator[None]:
    """Let frozen operations be differentiated by torch, as any others."""

    def batch_norm(
        activations: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor]:
        return (F.batch_norm(activations, mean, variance, weight, bias, False, momentum, eps),)

    program: Any = audit.networks.program
    own = {
        program.aten.conv2d.default: program.aten.conv2d.default,
        program._BATCH_NORM: batch_norm,
    }
    with mock.patch.dict(program._REWRITES, own):
        yield


if __name__ == "__main__":
    main()
