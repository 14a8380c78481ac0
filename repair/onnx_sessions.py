"""onnxruntime's sessions for a model file: on the CPU without and with graph optimizations, and on
CUDA where there is a device that it can use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["OpenedSession", "cuda_state", "open_session", "open_sessions"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Without TF32, whose ten bits of mantissa would use up the tolerance.
_PROVIDERS: dict[str, list[Any]] = {CPU: [CPU], CUDA: [(CUDA, {"use_tf32": "0"}), CPU]}
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class OpenedSession:
    """A session and where it runs, which need not be where it was asked to."""

    session: Any
    provider: str
    optimized: bool

    @property
    def name(self) -> str:
        return f"{self.provider}, optimizations {'on' if self.optimized else 'off'}"

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = self.session.run(list(outputs), dict(inputs))
        return found


def open_session(
    model: Path | bytes, *, provider: str = CPU, optimized: bool = True, threads: int = 0
) -> OpenedSession:
    """Return a session for a file or its bytes; its `provider` says where it runs in truth."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    options.intra_op_num_threads = threads
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=_PROVIDERS[provider])
    return OpenedSession(session=session, provider=session.get_providers()[0], optimized=optimized)


def open_sessions(path: Path) -> Iterator[OpenedSession]:
    """Yield the sessions that a file is proven in."""
    yield open_session(path, optimized=False)
    yield open_session(path, optimized=True)
    if cuda_device():
        session = open_session(path, provider=CUDA)
        if session.provider == CUDA:  # else it fell back to what is proven already
            yield session


def cuda_device() -> bool:
    """Say whether this machine has a CUDA device, whatever PyTorch was built for."""
    return torch.cuda.is_available() or _DRIVER.exists()


def cuda_state(providers: Sequence[str]) -> str:
    """Return in words whether CUDA took part."""
    if CUDA in providers:
        return "proven on CUDA too"
    if cuda_device():
        return "there is a CUDA device, but onnxruntime could not use it"
    return "no CUDA device here"
