"""Where memory runs out, a scan begins its step anew with half the batch: same answer, and said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from torch import Tensor

from audit.batches import NoMemoryError
from audit.evidence import Gathering
from audit.networks.program import Program
from audit.scan import ScanConfig, ScanRequest, scan_model

if TYPE_CHECKING:
    from tests.shapes import Shapes

TOLD = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
CONFIG = ScanConfig(limit=40, layers="block2*", batch_size=16)


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    gather, watch = Gathering.add, Program.watch

    def add(self: Gathering, images: Tensor, *others: Any, **more: Any) -> Any:
        found = gather(self, images, *others, **more)  # fails late, when sums have changed
        if len(images) > most:
            raise RuntimeError(TOLD)
        return found

    def limited_watch(self: Program, images: Tensor, *others: Any) -> Any:
        if len(images) > most:
            raise RuntimeError(TOLD)
        return watch(self, images, *others)

    monkeypatch.setattr(Gathering, "add", add)
    monkeypatch.setattr(Program, "watch", limited_watch)


def test_a_scan_in_smaller_batches_comes_to_the_same(
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = ScanRequest(model=str(shapes.damaged), data=shapes.photos, out=tmp_path)
    whole = scan_model(request, CONFIG)
    limited(monkeypatch, most=5)
    parts = scan_model(request, CONFIG)
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert told == [
        f"out of memory with {size} images at a time; going on with {size // 2}" for size in (16, 8)
    ]
    assert parts.images["path"].tolist() == whole.images["path"].tolist()
    assert parts.images["predicted"].tolist() == whole.images["predicted"].tolist()
    for name in ("ce", "map_mean", "p_true"):
        np.testing.assert_allclose(parts.images[name], whole.images[name], rtol=1e-4, atol=1e-6)
    for name in ("gradient_norm", "gradient_snr", "penalty", "trial_gain"):
        np.testing.assert_allclose(parts.layers[name], whole.layers[name], rtol=1e-3, atol=1e-4)
    assert parts.verdict["layers"] == whole.verdict["layers"]


def test_a_scan_for_which_one_image_is_too_much_fails_in_one_line(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, most=0)
    request = ScanRequest(model=str(shapes.damaged), data=shapes.photos, out=tmp_path)
    with pytest.raises(NoMemoryError):
        scan_model(request, CONFIG)
    (left,) = tmp_path.iterdir()
    assert '"status": "failed"' in (left / "run.json").read_text()
