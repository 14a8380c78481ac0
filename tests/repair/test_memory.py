"""Where memory runs out, a repair learns from parts of its batches and ends with the same weights.

Allocations are made to fail at the boundary, with the allocator's own words, above a number of
images; the reference is the same training without failures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from audit.networks import Network, Split
from repair import training
from repair.cache import CrossingTensors
from repair.config import RepairConfig
from repair.training import predict, train_layer

from .conftest import DAMAGED

TOLD = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
CONFIG = RepairConfig(epochs=2, learning_rate=0.01, batch_size=32)
SETTINGS: dict[str, dict[str, Any]] = {
    "the loss": {"loss": "trust"},
    "plain cross entropy": {"loss": "ce"},
    "shuffled maps": {"loss": "trust", "shuffled": True},
    "weighed classes": {"loss": "trust", "class_weights": torch.tensor([0.2, 1.0, 3.0])},
}


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the loss of more than so many images fail; return the numbers that were tried."""
    real, tried = training.loss_terms, list[int]()

    def loss_terms(split: Any, batch: Any, *others: Any, **more: Any) -> Any:
        tried.append(len(batch.labels))
        if len(batch.labels) > most:
            raise RuntimeError(TOLD)
        return real(split, batch, *others, **more)

    monkeypatch.setattr(training, "loss_terms", loss_terms)
    return tried


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_in_parts_trains_the_same_weights(
    network: Network,
    crossed: Callable[[str], CrossingTensors],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    split = network.program.split(DAMAGED)
    train, val = crossed("train"), crossed("val")
    whole = train_layer(split, train, val, CONFIG, **SETTINGS[name])
    tried = limited(monkeypatch, most=12)
    parts = train_layer(split, train, val, CONFIG, **SETTINGS[name])
    failed = [images for images in tried if images > 12]
    # One failure of each size is lesson enough; shuffled maps bring as many images again along.
    assert failed == ([32, 32, 16] if name == "shuffled maps" else [32, 16])
    assert "out of memory with 32 images at a time" in capsys.readouterr().err
    for entry, value in whole.parameters.items():
        start = split.parameters[entry]
        assert not torch.equal(start, value)
        torch.testing.assert_close(parts.parameters[entry], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(whole.history, parts.history, strict=True):
        told = {key: one[key] for key in one if isinstance(one[key], float) and key != "seconds"}
        assert {key: other[key] for key in told} == pytest.approx(told, rel=1e-4)


def test_the_prefix_and_the_judging_shrink_too(
    network: Network,
    crossed: Callable[[str], CrossingTensors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = network.program.split(DAMAGED)
    expected = crossed("val")
    said, positions = predict(split, expected)
    prefix, suffix = Split.prefix, Split.suffix

    def failing(real: Any, most: int) -> Any:
        def run(self: Split, tensors: Any, *others: Any) -> Any:
            images = len(tensors) if isinstance(tensors, torch.Tensor) else len(tensors[0])
            if images > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(self, tensors, *others)

        return run

    monkeypatch.setattr(Split, "prefix", failing(prefix, 5))
    monkeypatch.setattr(Split, "suffix", failing(suffix, 7))
    found = crossed("val")
    rows = torch.arange(len(expected))
    for one, other in zip(expected.batch(rows).crossing, found.batch(rows).crossing, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    again, same = predict(split, found)
    assert positions.tolist() == same.tolist()
    assert again.cross_entropies == pytest.approx(said.cross_entropies, rel=1e-4, abs=1e-5)
