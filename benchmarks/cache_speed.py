"""What the frozen-prefix cache saves: one training step of a repair, with it and without it.

Two repairs: `block5_conv3` of VGG-16, and a 1x1 head (256 filters, section 4.1) on
EfficientNet-Lite0, each with the losses `trust` (Eq. 7) and `ce` (its control), in batches of 32 as
`repair layer` takes them. Three ways to take the same steps from the same start:

    cached     layermend: what enters the layer was computed once; a step runs layer and suffix
    frozen     plain PyTorch: the whole network forward, gradients for the layer alone
    all        plain PyTorch: the whole network forward and backward, only the layer is stepped

The speedup of the summary is `frozen` over `cached` with `trust`, in wall-clock time; the trained
weights have to be equal. The processor's seconds stand beside it: on a busy machine they say more.

    python benchmarks/cache_speed.py [--threads N] [--batch-size 32] [--steps 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from cats_dogs import with_head
from efficientnet_lite0 import pretrained_state
from results_file import configuration, print_table, write_results
from torch import Tensor, nn

from audit.networks import Program
from audit.networks.torchvision_import import import_torchvision
from audit.saliency import grad_cam, target_scores
from repair.config import RepairConfig
from repair.training import loss_terms

Gradients = Literal["frozen", "all"]
Weights = dict[str, Tensor]


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
    for make in (vgg16_case, transfer_case):
        for loss in ("trust", "ce"):
            torch.manual_seed(options.seed)
            rows.append(compare(make(), loss, options))
    summary = {
        f"{row['case']}_speedup{suffix}": row[f"{slow}_s"] / row["cached_s"]
        for row in rows
        for slow, suffix in (("frozen", ""), ("all", "_all_gradients"))
        if row["loss"] == "trust"
    }
    for row in rows:
        if row["loss"] == "ce":
            summary[f"{row['case']}_speedup_ce"] = row["frozen_s"] / row["cached_s"]
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


def compare(case: Case, loss: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step each way, and how far the trained weights are apart."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch_size, 3, *case.input_size)
    batches = [
        (
            torch.randn(shape, generator=generator),
            torch.randint(case.classes, shape[:1], generator=generator),
        )
        for _ in range(options.steps)
    ]
    start = {
        name: value.detach().clone()
        for name, value in case.network.get_submodule(case.module).named_parameters()
    }
    config = RepairConfig(loss=loss, learning_rate=options.lr, batch_size=options.batch_size)
    cached, cached_steps = train_cached(case, batches, config)
    frozen, frozen_steps = train_plainly(case, batches, config, start, gradients="frozen")
    _, all_steps = train_plainly(case, batches, config, start, gradients="all")
    steps = {"cached": cached_steps, "frozen": frozen_steps, "all": all_steps}
    return {
        "case": case.name,
        "loss": loss,
        **{f"{way}_s": statistics.median(step.wall_s for step in steps[way]) for way in steps},
        "processor_speedup": statistics.median(step.processor_s for step in frozen_steps)
        / statistics.median(step.processor_s for step in cached_steps),
        "max_weight_difference": max(
            float((cached[name] - frozen[name]).abs().max()) for name in start
        ),
        "largest_change": max(float((frozen[name] - start[name]).abs().max()) for name in start),
        "steps": {way: [asdict(step) for step in taken] for way, taken in steps.items()},
    }


def train_cached(
    case: Case, batches: list[tuple[Tensor, Tensor]], config: RepairConfig
) -> tuple[Weights, list[StepTime]]:
    """Take the steps as `repair layer` takes them; filling the cache is not part of a step."""
    split = Program.capture(case.network, case.input_size).split(case.layer)
    leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=config.learning_rate, momentum=0.9)
    cache = [(split.prefix(images), labels) for images, labels in batches]

    def step(crossing: tuple[Tensor, ...], labels: Tensor, *, update: bool = True) -> None:
        loss = loss_terms(split, crossing, labels, leaves, config, config.loss).loss.mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.grad = gradient
        if update:
            optimizer.step()

    step(*cache[0], update=False)  # warm-up
    seconds = _timed_steps(step, cache)
    prefix = f"{case.module}."
    return {name.removeprefix(prefix): leaf.detach() for name, leaf in leaves.items()}, seconds


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
        seconds = _timed_steps(step, batches)
    finally:
        handle.remove()
    return {n: p.detach().clone() for n, p in module.named_parameters()}, seconds


def _timed_steps(
    step: Callable[..., None], batches: Iterable[tuple[Any, Tensor]]
) -> list[StepTime]:
    taken = []
    for inputs, labels in batches:
        wall_s, processor_s = time.perf_counter(), time.process_time()
        step(inputs, labels)
        taken.append(
            StepTime(
                wall_s=time.perf_counter() - wall_s, processor_s=time.process_time() - processor_s
            )
        )
    return taken


if __name__ == "__main__":
    main()
