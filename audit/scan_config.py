"""What a scan is asked to do: its settings, checked once, and what it is to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audit.errors import UsageError
from audit.map_accuracy import ENERGY_THRESHOLD
from audit.saliency import METHODS
from audit.trials import TrialConfig

__all__ = ["ScanConfig", "ScanRequest"]


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """What decides the numbers of a scan.

    Attributes:
        layers: Glob patterns of the layers to try; all when None.
        method: Saliency of the gallery's maps.
        limit: Scan a stratified sample of so many images.
        trial_images: At most so many images teach the trial repairs.
        judge_images: At most so many others judge them.
        map_threshold: Share of a map's energy that has to lie in the mask for it to be accurate.
        budget_s: At most so many seconds of trials; a trial that is under way is finished.
    """

    layers: str | None = None
    method: str = "gradcam"
    limit: int | None = None
    batch_size: int = 32
    workers: int | None = None
    device: str = "auto"
    seed: int = 0
    trial_images: int = 64
    judge_images: int = 192
    map_threshold: float = ENERGY_THRESHOLD
    budget_s: float = 300.0
    trial: TrialConfig = field(default_factory=TrialConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.budget_s <= 0:
            raise UsageError(f"--budget is {self.budget_s}; expected seconds above 0")
        if not 0 < self.map_threshold <= 1:
            raise UsageError(
                f"--map-threshold is {self.map_threshold}; expected a share above 0 and at most 1"
            )

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> ScanConfig:
        """Return the settings that `dataclasses.asdict` recorded; other entries are left alone."""
        known = {name: recorded[name] for name in cls.__dataclass_fields__ if name in recorded}
        if "trial" in known:
            trial: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in known["trial"].items()
            }
            known["trial"] = TrialConfig(**trial)
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class ScanRequest:
    """What is scanned, from where, and where the run goes.

    Attributes:
        resume: Go on with the newest unfinished scan of this model and these images in `out`, by
            the settings it was started with.
        stated: Settings (fields of `ScanConfig`, and `masks`) that must equal those of a resumed
            scan.
    """

    model: str
    data: Path
    out: Path = Path("runs")
    arch: str | None = None
    classes: Path | None = None
    masks: Path | None = None
    trust_pickle: bool = False
    code: Path | None = None
    resume: bool = False
    stated: frozenset[str] = frozenset()
    command: tuple[str, ...] = ()
