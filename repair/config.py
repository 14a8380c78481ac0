"""What a repair is asked to do: its settings, checked once, and their form in repair.json.

No torch here: the command line reads choices and defaults from this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from audit.errors import UsageError
from repair.controls import DEFAULT_CONTROLS, ordered_controls
from repair.losses import LOSSES, Loss, Penalty, Scale

Optimizer = Literal["sgd", "adamw"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

Schedule = Literal["constant", "cosine", "linear", "step"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

Keep = Literal["best", "last"]
KEEPS: tuple[Keep, ...] = get_args(Keep)

Saliency = Literal["gradcam", "guided-gradcam", "gradients"]
SALIENCIES: tuple[Saliency, ...] = get_args(Saliency)

AUTO: Literal["auto"] = (
    "auto"  # for --loss: `repair.defaults` decides; --lr: `repair.rates`; --temperature: its module
)

_RENAMED = {"balance": "lambda", "learning_rate": "lr"}  # field -> name in repair.json and options


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """The settings that decide the numbers of a repair.

    Attributes:
        loss: A name from `LOSSES`.
        saliency: The method whose maps the loss penalizes. `gradients` is for `rrr` alone: by the
            image, as in its source, where it otherwise takes those by the layer's output.
        scale: How cross entropy and saliency are kept in bounds, see `Penalty`.
        balance: The lambda of Eq. 7.
        weight: Of what the losses `energy` and `rrr` add to the cross entropy.
        temperature: What the loss divides logits by; `auto` for the one at which the network is
            neither too sure nor too little on the validation images (`repair.temperature`).
        r1: Whether R1 takes part.
        r2: Whether R2 takes part.
        learning_rate: Of the optimizer, at the start; `auto` for the one of several that does best
            in a few epochs (`repair.rates`), for the repair and for every control its own.
        schedule: How it goes on by epoch: `constant`, `cosine` or `linear` to zero, or `step`, a
            tenth after each third of the epochs.
        epochs: Passes over the training images.
        batch_size: Images per step.
        optimizer: `sgd` (momentum 0.9) or `adamw`.
        keep: Which epoch's weights are written: the `best` by validation cross entropy, or the
            `last`. Where the validation images share the training images' shortcut, the best by
            them is one that relies on it.
        patience: Epochs without a lower validation cross entropy after which training stops; 0
            for never.
        counterfactuals: Whether what lies outside an image's mask, or in an error group's artefact
            or region, is taken from another image before it is learned from
            (`repair.counterfactuals`).
        donors: How many others, drawn at random, lend it to an image, epoch by epoch in turn.
        distill: Share of the network's own answers in what is learned from, where what misleads it
            is hidden (`repair.teaching`); the rest is the label.
        balance_classes: Whether images weigh by the inverse of their class's frequency.
        with_norm: Whether scale and shift of the batch norm that follows the layer learn too.
        amp: Whether steps are taken in mixed precision (bfloat16).
        channels_last: Whether what enters the layer is laid out channels last.
        seed: Of the order of the images and of every bootstrap.
        seeds: How many seeds, from `seed` on, the repair and the controls on its layer are trained
            by. The first one's weights are written; all of them say what the penalty does.
        controls: What the repair is compared with at equal compute, names from
            `repair.controls.CONTROLS` in their order.

    Raises:
        UsageError: A value outside its range; the message names the option.
    """

    loss: str = "trust"
    saliency: Saliency = "gradcam"
    scale: Scale = "bounded"
    balance: float = 0.9
    weight: float = 1.0
    temperature: float | Literal["auto"] = 1.0
    r1: bool = True
    r2: bool = True
    learning_rate: float | Literal["auto"] = 0.01
    epochs: int = 10
    batch_size: int = 32
    optimizer: Optimizer = "sgd"
    schedule: Schedule = "constant"
    keep: Keep = "best"
    patience: int = 0
    counterfactuals: bool = False
    donors: int = 1
    distill: float = 0.0
    balance_classes: bool = False
    with_norm: bool = False
    amp: bool = False
    channels_last: bool = False
    seed: int = 0
    seeds: int = 1
    controls: tuple[str, ...] = DEFAULT_CONTROLS

    def __post_init__(self) -> None:
        _check_choice("--loss", self.loss, tuple(LOSSES))
        _check_choice("--saliency", self.saliency, SALIENCIES)
        _check_choice("--optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("--schedule", self.schedule, SCHEDULES)
        if self.saliency == "gradients" and self.loss not in ("rrr", "ce"):
            raise UsageError(f"--saliency gradients goes with --loss rrr, not with {self.loss}")
        if self.saliency == "guided-gradcam" and self.loss == "rrr":
            raise UsageError("--loss rrr looks at gradients; give --saliency gradients or gradcam")
        object.__setattr__(self, "controls", ordered_controls(self.controls))
        try:
            self.penalty  # noqa: B018 - made for its checks
        except ValueError as error:
            raise UsageError(str(error)) from error
        rate = self.learning_rate
        if rate != AUTO and not 0 < float(rate) < float("inf"):
            raise UsageError(f"--lr is {rate:g}; expected a number above 0, or auto")
        heat = self.temperature
        if heat != AUTO and not 0 < float(heat) < float("inf"):
            raise UsageError(f"--temperature is {heat:g}; expected a number above 0, or auto")
        if not 0.0 <= self.distill <= 1.0:
            raise UsageError(f"--distill is {self.distill:g}; expected a number from 0 to 1")
        if self.donors < 1:
            raise UsageError(f"--donors is {self.donors}; expected at least 1")
        if self.epochs < 1:
            raise UsageError(f"--epochs is {self.epochs}; expected at least 1")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}; expected at least 1")
        _check_choice("--keep", self.keep, KEEPS)
        if self.patience and self.keep == "last":
            raise UsageError("--patience waits for a better epoch, so --keep last excludes it")
        if self.patience < 0:
            raise UsageError(f"--patience is {self.patience}; expected 0 (never stop) or more")
        if self.seeds < 1:
            raise UsageError(f"--seeds is {self.seeds}; expected at least 1")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed is {self.seed}; expected 0 to {2**31 - 1}")

    @property
    def rate(self) -> float:
        """The learning rate.

        Raises:
            ValueError: It is still to be chosen, see `repair.rates`.
        """
        return float(self.learning_rate)

    @property
    def divisor(self) -> float:
        """What the loss divides logits by.

        Raises:
            ValueError: It is still to be fitted, see `repair.temperature`.
        """
        return float(self.temperature)

    @property
    def further_seeds(self) -> range:
        return range(self.seed + 1, self.seed + self.seeds)

    @property
    def penalty(self) -> Penalty:
        return Penalty(
            balance=self.balance, scale=self.scale, weight=self.weight, r1=self.r1, r2=self.r2
        )

    @property
    def loss_function(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def beside(self) -> dict[str, Literal["images", "gates"]]:
        """What a step needs beside what crosses the cut, by split; empty for most losses."""
        looks_at = self.loss_function.looks_at
        if looks_at == "gradients" and self.saliency == "gradients":
            return {"train": "images"}
        if looks_at == "maps" and self.saliency == "guided-gradcam":
            return {"train": "gates"}
        return {}

    @property
    def looks_at_pixels(self) -> bool:
        """Whether what the loss looks at has the size of the image."""
        return bool(self.beside)

    @property
    def needs_maps(self) -> bool:
        """Whether the layer must have a spatial output."""
        return self.loss_function.looks_at is not None and self.saliency != "gradients"

    @property
    def has_control(self) -> bool:
        """Whether plain cross entropy is trained beside it; it is its own control."""
        return "ce" in self.controls and self.loss != "ce"

    def disagreement(self, asked: RepairConfig, stated: Iterable[str]) -> str | None:
        """Return which of the stated settings is another one here, such as `epochs 4, not 10`."""
        for name in sorted(stated):
            here, there = getattr(self, name), getattr(asked, name)
            if here != there:
                return f"{name.replace('_', ' ')} {_shown(here)}, not {_shown(there)}"
        return None

    def as_dict(self) -> dict[str, Any]:
        values = {**vars(self), "controls": list(self.controls)}
        return {_RENAMED.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> RepairConfig:
        """Return the settings that `as_dict` recorded; entries of other kinds are left alone.

        `controls` was once true (plain cross entropy) or false (none).
        """
        if isinstance(recorded.get("controls"), bool):
            recorded = {**recorded, "controls": ("ce",) if recorded["controls"] else ()}
        names = {name: _RENAMED.get(name, name) for name in cls.__dataclass_fields__}
        return cls(**{name: recorded[key] for name, key in names.items() if key in recorded})


def _shown(setting: object) -> str:
    return (",".join(setting) or "none") if isinstance(setting, tuple) else str(setting)


def _check_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise UsageError(f"{option} is {given!r}; expected one of {', '.join(choices)}")
