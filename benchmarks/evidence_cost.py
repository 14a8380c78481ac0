"""The evidence pass against a plain forward and backward over the same images.

Plain: cross entropy of each batch, backward to all weights, as an epoch of training does it without
the optimizer. The evidence pass adds a second backward for the maps, and of every layer the
gradient of each image alone. Both go over the same batches on the same threads, in turn.

    python benchmarks/evidence_cost.py [--threads 1] [--batch-size 32] [--batches 2] [--repeats 5]
"""

from __future__ import annotations

import argparse
from typing import Any

import efficientnet_lite0
import small_networks
import torch
import torch.nn.functional as F
from results_file import configuration, print_table, timed, write_results
from torch import nn

from audit.evidence import gather_evidence
from audit.networks import Program, architectures
from audit.networks.torchvision_import import import_torchvision


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torchvision = import_torchvision()
    networks: dict[str, tuple[nn.Module, int]] = {
        "efficientnet_lite0": (architectures.build(efficientnet_lite0.ARCH), 224),
        "resnet18": (torchvision.models.resnet18(), 224),
        "small_resnet": (small_networks.build("resnet"), small_networks.SIZE),
        "small_vgg": (small_networks.build("vgg"), small_networks.SIZE),
    }
    rows = [compare(name, *given, options) for name, given in networks.items()]
    print_table("Evidence pass beside a plain forward and backward", rows)
    summary = {row["network"]: row["ratio"] for row in rows}
    summary["largest_ratio"] = max(row["ratio"] for row in rows)
    config = configuration("cpu", "torchvision", **vars(options))
    print(write_results("evidence_cost", summary=summary, config=config, rows=rows))


def compare(
    name: str, network: nn.Module, size: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the median seconds of both and their ratio."""
    network.eval()
    program = Program.capture(network, (size, size))
    shape = (options.batch_size, 3, size, size)
    batches = [
        (torch.randn(shape), torch.randint(program.classes, (options.batch_size,)))
        for _ in range(options.batches)
    ]

    def plain() -> None:
        for images, labels in batches:
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(images), labels).backward()

    def evidence() -> None:
        gather_evidence(program, batches, list(program.layers), seed=options.seed)

    plain_s, evidence_s = [], []
    for at in range(options.repeats):  # in turn: what else the machine does hits both
        warm_up = int(at == 0)
        plain_s.append(timed(plain, repeats=1, warm_up=warm_up)["median_s"])
        evidence_s.append(timed(evidence, repeats=1, warm_up=warm_up)["median_s"])
    ratios = sorted(two / one for one, two in zip(plain_s, evidence_s, strict=True))
    return {
        "network": name,
        "layers": len(program.layers),
        "input": size,
        "plain_s": round(sorted(plain_s)[len(plain_s) // 2], 3),
        "evidence_s": round(sorted(evidence_s)[len(evidence_s) // 2], 3),
        "ratio": round(ratios[len(ratios) // 2], 2),
        "ratio_lowest": round(ratios[0], 2),
        "ratio_highest": round(ratios[-1], 2),
    }


if __name__ == "__main__":
    main()
