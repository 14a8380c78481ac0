"""What every layer's full repair of a planted fault achieves, and trials made the naive way.

A full repair trains one layer alone on the photographs that the fault was learned from, rightly
labeled, half of them marked where the fault is a mark; its accuracy is that on the judging pool.
Naive trials run the whole network for every step of every layer and drop none.
"""

from __future__ import annotations

import faults
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audit.networks.program import Program
from audit.trials import TrialConfig

STEPS, BATCH, STEP_SIZE = 100, 48, 0.01


def accuracies(program: Program, where: faults.Scene, kind: str, *, seed: int) -> dict[str, float]:
    """Return the accuracy after each layer's full repair, by name, and before any as ``""``."""
    lessons = faults.presented(where.planting, kind, seed=seed + 1)
    judged = faults.presented(where.judging, kind, seed=seed)
    found = {"": faults.predictions_right(program, judged)}
    both = torch.cat([lessons.images, judged.images])
    cut = len(lessons.labels)
    for name, crossing in program.prefixes(both, [layer.name for layer in program.layers]):
        split = program.split(name)
        leaves = {key: value.clone().requires_grad_() for key, value in split.parameters.items()}
        scale = float(next(iter(leaves.values())).detach().square().mean().sqrt())
        optimizer = torch.optim.Adam(leaves.values(), lr=STEP_SIZE * scale)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            rows = torch.randint(cut, (BATCH,), generator=generator)
            logits = split.suffix([tensor[rows] for tensor in crossing], leaves)
            optimizer.zero_grad()
            F.cross_entropy(logits, lessons.labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            parts = torch.arange(cut, len(both)).split(100)
            said = [split.suffix([t[p] for t in crossing], leaves).argmax(dim=1) for p in parts]
        found[name] = float((torch.cat(said) == judged.labels).double().mean())
    return found


def naive_trials(
    program: Program,
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    config: TrialConfig,
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return each layer's held-out cross entropies after every round, (rounds, N), when all
    layers take all steps, each from the first layer on."""
    halves = np.random.default_rng(seed).permutation(len(held_out_labels)) % 2
    found = {}
    for layer in program.layers:
        split = program.split(layer.name)
        start = split.parameters
        scale = float(next(iter(start.values())).square().mean().sqrt())
        after: dict[float, list[np.ndarray]] = {}
        for size in config.step_sizes:
            leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
            optimizer = torch.optim.Adam(leaves.values(), lr=size * scale)
            after[size] = []
            for step in range(1, config.rounds[-1] + 1):
                optimizer.zero_grad()
                for part in torch.arange(len(labels)).split(config.batch_size):
                    logits = split.suffix(split.prefix(images[part]), leaves)
                    loss = F.cross_entropy(logits, labels[part], reduction="sum") / len(labels)
                    loss.backward()
                optimizer.step()
                if step in config.rounds:
                    changed = program.with_state(leaves)
                    after[size].append(_entropies(changed, held_out_images, held_out_labels))
        chosen = [
            min(after, key=lambda size: float(after[size][0][halves != half].sum()))
            for half in (0, 1)
        ]
        first, second = (np.stack(after[size]) for size in chosen)
        found[layer.name] = np.where(halves == 0, first, second)
    return found


@torch.no_grad()
def _entropies(program: Program, images: Tensor, labels: Tensor) -> np.ndarray:
    logits = torch.cat([program.logits(part) for part in images.split(64)])
    return F.cross_entropy(logits.double(), labels, reduction="none").numpy()
