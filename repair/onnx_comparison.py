"""What onnxruntime gave beside what was expected, added up over batches and sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audit.images import ImageFolder

__all__ = ["Comparison", "Given"]

# Of an image's largest score. Kernels sum in another order, which single precision shows at 1e-6 to
# 1e-5; a wrong operator or weight shows at 1e-2 and more.
TOLERANCE = 1e-3
# Half precision keeps eleven bits: 5e-4 in each of some hundred operations in a row.
HALF_TOLERANCE = 5e-2
# Of a map's peak. Where a rectifier's input is zero but for rounding, its gradient jumps.
MAP_TOLERANCE = 1e-2
HALF_MAP_TOLERANCE = 1e-1
# Maps that are nearly black have no peak to measure by, images that are hardly any class no score:
# theirs count as at least this share of the largest of any image.
FAINT = 1e-2


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a session gave: scores (B, K) and, where there are any, maps (B, h, w)."""

    scores: np.ndarray
    maps: np.ndarray | None = None


@dataclass
class Comparison:
    """What was seen so far of two networks on the same images.

    Attributes:
        half: The file is in half precision, which has tolerances of its own.
        scores: What the scores are called, for the messages.
        mismatched: Images that any session gives another class.
        wrong: Those of them that half precision does not excuse.
        expected: Class by image.
        predicted: Class by image, by session.
    """

    half: bool = False
    scores: str = "logits"
    images: set[int] = field(default_factory=set)
    mismatched: set[int] = field(default_factory=set)
    wrong: set[int] = field(default_factory=set)
    expected: dict[int, int] = field(default_factory=dict)
    predicted: dict[str, dict[int, int]] = field(default_factory=dict)
    broken: str | None = None
    errors: list[tuple[float, float]] = field(default_factory=list)  # error, largest score
    map_errors: list[tuple[float, float]] = field(default_factory=list)  # error, peak

    @property
    def tolerance(self) -> float:
        return HALF_TOLERANCE if self.half else TOLERANCE

    @property
    def map_tolerance(self) -> float:
        return HALF_MAP_TOLERANCE if self.half else MAP_TOLERANCE

    def add(
        self,
        indices: Sequence[int],
        scores: np.ndarray,
        maps: np.ndarray | None,
        given: Given,
        session: str,
    ) -> None:
        """Add one batch of one session: expected scores (B, K) and maps, and what it gave."""
        self.images.update(indices)
        if given.scores.shape != scores.shape:
            self.broken = f"{self.scores} have shape {given.scores.shape}, expected {scores.shape}"
            self.mismatched.update(indices)
            self.wrong.update(indices)
            return
        right, found = scores.argmax(axis=1), given.scores.argmax(axis=1)
        self.expected |= dict(zip(indices, right.tolist(), strict=True))
        by_image = self.predicted.setdefault(session, {})
        by_image |= dict(zip(indices, found.tolist(), strict=True))
        rows, differs = np.arange(len(right)), found != right
        scale = np.maximum(np.abs(scores).max(axis=1), np.finfo(np.float32).tiny)
        margin = scores[rows, right] - scores[rows, found]
        # Half precision cannot tell apart what lies closer together than its errors.
        certain = differs & (margin > 2 * self.tolerance * scale) if self.half else differs
        self.mismatched.update(np.asarray(indices)[differs].tolist())
        self.wrong.update(np.asarray(indices)[certain].tolist())
        if not np.isfinite(given.scores).all():
            self.broken = f"{self.scores} that are not finite"
            return
        error = np.abs(given.scores.astype(np.float64) - scores).max(axis=1)
        self.errors += zip(error.tolist(), scale.tolist(), strict=True)
        if maps is not None:
            self._add_maps(maps[~differs], given.maps, ~differs)

    def _add_maps(self, maps: np.ndarray, given: np.ndarray | None, same: np.ndarray) -> None:
        if given is None or given[same].shape != maps.shape:
            self.broken = f"maps of shape {None if given is None else given.shape}"
            return
        if not np.isfinite(given).all():
            self.broken = "maps that are not finite"
            return
        errors = np.abs(given[same].astype(np.float64) - maps).max(axis=(1, 2), initial=0.0)
        peaks = maps.max(axis=(1, 2), initial=0.0)
        self.map_errors += zip(errors.tolist(), peaks.tolist(), strict=True)

    @property
    def error(self) -> tuple[float, float] | None:
        """The largest error of a score: absolute, and relative to its image's largest score; None
        before any image."""
        return _largest(self.errors)

    @property
    def map_error(self) -> tuple[float, float] | None:
        """The largest error of a map: absolute, and relative to its own peak; None without maps."""
        return _largest(self.map_errors)

    def reasons(self) -> list[str]:
        """Return why the proof failed; empty if it passed."""
        found = [f"onnxruntime gave {self.broken}"] if self.broken else []
        if not self.images:
            found.append("no held-out image could be loaded")
        if self.wrong:
            found.append(
                f"onnxruntime gives {len(self.wrong)} of {len(self.images)} held-out images "
                "another class than PyTorch"
            )
        if self.error is not None and self.error[1] > self.tolerance:
            found.append(
                f"{self.scores} differ by {self.error[1]:.2e} of the largest one, "
                f"tolerated are {self.tolerance:.0e}"
            )
        if self.map_error is not None and self.map_error[1] > self.map_tolerance:
            found.append(
                f"maps differ by {self.map_error[1]:.2e} of their peak, "
                f"tolerated are {self.map_tolerance:.0e}"
            )
        return found

    def record(self) -> dict[str, Any]:
        """Return the errors, JSON-ready."""
        return {
            "max_abs_error": None if self.error is None else self.error[0],
            "max_rel_error": None if self.error is None else self.error[1],
            "tolerance": self.tolerance,
            "map_max_abs_error": None if self.map_error is None else self.map_error[0],
            "map_max_rel_error": None if self.map_error is None else self.map_error[1],
            "map_tolerance": None if self.map_error is None else self.map_tolerance,
        }

    def image_record(self, images: ImageFolder) -> dict[str, Any]:
        """Return which of the folder's images got the same class, and both accuracies."""
        labels = {i: images.records[i].label for i in self.images}
        accuracies = {
            session: _accuracy(predicted, labels) for session, predicted in self.predicted.items()
        }
        return {
            "images": len(self.images),
            "top1_equal": len(self.images) - len(self.mismatched),
            "top1_mismatches": [images.records[i].path for i in sorted(self.mismatched)],
            "top1_undecided": len(self.mismatched - self.wrong),
            "accuracy": {"PyTorch": _accuracy(self.expected, labels), **accuracies},
        }


def _largest(errors: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the largest error of images, absolute and relative to each one's own size."""
    if not errors:
        return None
    floor = max(FAINT * max(size for _, size in errors), float(np.finfo(np.float32).tiny))
    relative = max(error / max(size, floor) for error, size in errors)
    return max(error for error, _ in errors), relative


def _accuracy(predicted: dict[int, int], labels: dict[int, int]) -> float | None:
    if not predicted:
        return None
    return sum(predicted[i] == labels[i] for i in predicted) / len(predicted)
