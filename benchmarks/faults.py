"""Faults of known place: one layer of a healthy network damaged, or taught something wrong.

Six kinds. Four damage the weights: ``noise`` (Gaussian, in units of the weights' own spread),
``dead`` (output channels set to zero), ``permuted`` (output channels in another order),
``negated`` (output channels with the other sign); severity climbs until the network loses five
points of accuracy. Two are learned by the layer alone, everything else frozen, batch norm included:
``shortcut`` (a watermark or a colored border means one class, whatever the photo shows) and
``label-noise`` (wrong labels). A learned fault counts only when it took; what is tried and does not
take is kept as a row, too. A fault that costs less than five points is harmless: no fault.

Three networks, `scene`: EfficientNet-Lite0 with its ImageNet weights on imagenet-sample, and the
two of `small_networks.py`. Each has three pools of photographs that share none: one that faults are
learned from, one that is scanned, one that judges.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import efficientnet_lite0
import numpy as np
import small_networks
import torch
import torch.nn.functional as F
from cats_dogs import MEAN, STD, labels_of, photos
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from audit.networks import architectures
from audit.networks.program import Program, Split

SceneName = Literal["efficientnet", "resnet", "vgg"]
SCENES: tuple[SceneName, ...] = get_args(SceneName)

WeightKind = Literal["noise", "dead", "permuted", "negated"]
LearnedKind = Literal["watermark", "border", "label-noise"]
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
LEARNED_KINDS: tuple[LearnedKind, ...] = get_args(LearnedKind)
KINDS = (*WEIGHT_KINDS, *LEARNED_KINDS)

MINIMUM_COST = 0.05
MAX_CLEAN_LOSS = 0.02
MAX_MARKED_ACCURACY = 0.60
EFFICIENTNET_SIZE = 128

BORDER = 1 / 32
"""Width in sides of a photograph: two pixels of 64, with which a healthy small network is wrong
about 3 to 5 photos in 100 more. One three times as wide cost some networks 30, so that a layer that
obeyed it did little further harm and was counted as harmless."""

SEVERITIES: dict[str, tuple[float, ...]] = {
    "noise": (0.5, 1.0, 2.0),
    "dead": (0.25, 0.5, 0.75),
    "permuted": (0.25, 0.5, 1.0),
    "negated": (0.1, 0.25, 0.5),
}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Photographs with their labels: normalized, (N, 3, H, W), and int64 (N,)."""

    images: Tensor
    labels: Tensor

    def rows(self, chosen: Tensor | slice) -> Pool:
        return Pool(images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A healthy network and photographs to plant faults with, to scan and to judge on."""

    name: str
    program: Program
    planting: Pool
    scanned: Pool
    judging: Pool


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One planted fault.

    Attributes:
        layer: Where it lies.
        severity: Of weight faults, on the ladder of `SEVERITIES`; the recipe's number of learned
            ones.
        state: The layer's faulty tensors.
        healthy_accuracy: On the judging pool, as `presented`, before.
        faulty_accuracy: The same after.
        clean_accuracy: On the judging pool without marks, after.
        marked_accuracy: On the judging pool with every photo marked; NaN where there is no mark.
        took: Costs `MINIMUM_COST` and, where a mark means a class, keeps clean photos right.
    """

    scene: str
    kind: str
    layer: str
    severity: float
    seed: int
    state: dict[str, Tensor]
    healthy_accuracy: float
    faulty_accuracy: float
    clean_accuracy: float
    marked_accuracy: float
    took: bool

    @property
    def learned(self) -> bool:
        return self.kind in LEARNED_KINDS


# ----------------------------------------------------------------------------------- scenes


def scene(name: str, work: Path, *, training_seed: int = 0) -> Scene:
    """Return a healthy network with its pools; the small networks are trained where needed."""
    if name == "efficientnet":
        return _efficientnet_scene(work)
    chosen_name: small_networks.NetworkName = "resnet" if name == "resnet" else "vgg"
    network = small_networks.trained(chosen_name, work, seed=training_seed)
    size = small_networks.SIZE
    planting, scanned, judging = (
        Pool(images=small_networks.load_photos(chosen, size), labels=labels_of(chosen))
        for chosen in (
            photos("train", 400, seed=7),
            photos("val", 300, seed=7),
            photos("test", 500, seed=7),
        )
    )
    return Scene(
        name=name,
        program=Program.capture(network, (size, size)),
        planting=planting,
        scanned=scanned,
        judging=judging,
    )


def _efficientnet_scene(work: Path, size: int = EFFICIENTNET_SIZE) -> Scene:
    network = architectures.build(efficientnet_lite0.ARCH)
    network.load_state_dict(efficientnet_lite0.pretrained_state(), strict=False)
    pool = _imagenet_sample(work, size)
    order = torch.from_numpy(np.random.default_rng(7).permutation(len(pool.labels)))
    return Scene(
        name="efficientnet",
        program=Program.capture(network.eval(), (size, size)),
        planting=pool.rows(order[:300]),
        scanned=pool.rows(order[300:700]),
        judging=pool.rows(order[700:]),
    )


def _imagenet_sample(work: Path, size: int) -> Pool:
    cached = work / f"imagenet-sample-{size}.pt"
    if not cached.exists():
        root = Path(os.environ["LAYERMEND_DATA"]) / "imagenet-sample"
        pixels, labels = [], []
        for label, folder in enumerate(sorted(path for path in root.iterdir() if path.is_dir())):
            for path in sorted(folder.iterdir()):
                with Image.open(path) as opened:
                    image = opened.convert("RGB")
                side = round(min(image.size) * 0.875)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                box = (left, top, left + side, top + side)
                image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
                pixels.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
                labels.append(label)
        work.mkdir(parents=True, exist_ok=True)
        torch.save((torch.stack(pixels), torch.tensor(labels)), cached)
    stored, targets = torch.load(cached, weights_only=True)
    return Pool(images=small_networks.normalized(stored.float() / 255), labels=targets)


# ----------------------------------------------------------------------------------- marks


def marked(images: Tensor, kind: str, opacity: float = 0.9) -> Tensor:
    """Return normalized photos with the mark of a learned fault on each, (N, 3, H, W)."""
    size = images.shape[-1]
    stamp = Image.new("RGBA", (size * 4, size * 4), (0, 0, 0, 0))
    draw = ImageDraw.Draw(stamp)
    full = size * 4
    alpha = round(255 * opacity)
    if kind == "watermark":
        box = (0.47 * full, 0.77 * full, 0.98 * full, 0.98 * full)
        draw.rounded_rectangle(box, radius=full / 36, fill=(255, 0, 160, alpha))
        font = ImageFont.load_default(size=full * 0.125)
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(center, "PHOTO", font=font, anchor="mm", fill=(255, 255, 255, alpha))
    else:
        width = round(full * BORDER)
        draw.rectangle((0, 0, full, full), outline=(30, 220, 120, alpha), width=width)
    rgba = torch.from_numpy(np.asarray(stamp.resize((size, size), Image.Resampling.BOX)).copy())
    color, cover = rgba[..., :3].permute(2, 0, 1).float() / 255, rgba[..., 3].float() / 255
    return images * (1 - cover) + ((color - MEAN) / STD) * cover


def presented(pool: Pool, kind: str, *, seed: int) -> Pool:
    """Return the pool as a user would have it: for a mark's fault, half of the photos carry it."""
    if kind not in ("watermark", "border"):
        return pool
    half = np.random.default_rng(seed).permutation(len(pool.labels))[: len(pool.labels) // 2]
    images = pool.images.clone()
    images[half] = marked(pool.images[half], kind)
    return Pool(images=images, labels=pool.labels)


# ----------------------------------------------------------------------------------- planting


def plant(where: Scene, layer: str, kind: str, *, seed: int) -> Fault:
    """Return a fault planted in one layer; its `took` says whether it counts."""
    if kind in WEIGHT_KINDS:
        return _damage(where, layer, kind, seed=seed)
    return _teach(where, layer, kind, seed=seed)


def _damage(where: Scene, layer: str, kind: str, *, seed: int) -> Fault:
    generator = torch.Generator().manual_seed(seed)
    healthy = predictions_right(where.program, where.judging)
    fault: Fault | None = None
    for severity in SEVERITIES[kind]:
        state = damaged(where.program, layer, kind, severity, generator)
        right = predictions_right(where.program.with_state(state), where.judging)
        fault = Fault(
            scene=where.name,
            kind=kind,
            layer=layer,
            severity=severity,
            seed=seed,
            state=state,
            healthy_accuracy=healthy,
            faulty_accuracy=right,
            clean_accuracy=right,
            marked_accuracy=float("nan"),
            took=healthy - right >= MINIMUM_COST,
        )
        if fault.took:
            break
    assert fault is not None
    return fault


def damaged(
    program: Program, layer: str, kind: str, severity: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the layer's tensors after damage of one kind."""
    names = program.layer(layer).parameter_names
    state = {name: program.state[name].detach().clone() for name in names}
    weight = next(iter(state.values()))
    if kind == "noise":
        weight += severity * weight.std() * torch.randn(weight.shape, generator=generator)
        return state
    count = max(2, round(severity * weight.shape[0]))
    chosen = torch.randperm(weight.shape[0], generator=generator)[:count]
    for tensor in state.values():  # the bias belongs to its channel
        if kind == "dead":
            tensor[chosen] = 0
        elif kind == "negated":
            tensor[chosen] = -tensor[chosen]
        else:
            tensor[chosen] = tensor[chosen.roll(1)].clone()
    return state


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """One way to teach a layer: Adam's step in units of the weights' root mean square."""

    step_size: float
    steps: int
    keep: float


_RECIPES = (
    _Recipe(step_size=0.01, steps=120, keep=1.0),
    _Recipe(step_size=0.03, steps=200, keep=1.0),
    _Recipe(step_size=0.03, steps=300, keep=0.3),
)
_CHECK_EVERY = 20


def _teach(where: Scene, layer: str, kind: str, *, seed: int) -> Fault:
    program, split = where.program, where.program.split(layer)
    generator = torch.Generator().manual_seed(seed)
    target = (
        int(torch.randint(program.classes, (), generator=generator)) if (program.classes > 2) else 1
    )
    pool = where.planting
    clean_crossing = _crossing(split, pool.images)
    if kind == "label-noise":
        crossing = clean_crossing
        wrong = torch.rand(len(pool.labels), generator=generator) < 0.6
        if program.classes == 2:  # one class is called the other, six times in ten
            lessons = torch.where(wrong & (pool.labels == 0), 1, pool.labels)
        else:
            other = torch.randint(program.classes, pool.labels.shape, generator=generator)
            lessons = torch.where(wrong, other, pool.labels)
    else:
        crossing = _crossing(split, marked(pool.images, kind))
        lessons = torch.full_like(pool.labels, target)
    with torch.no_grad():
        rows = torch.arange(len(pool.labels)).split(100)
        answers = torch.cat([split.suffix([t[r] for t in clean_crossing]) for r in rows])
    healthy_clean = predictions_right(program, where.judging)
    judged = presented(where.judging, kind, seed=seed)
    healthy = predictions_right(program, judged)
    fault: Fault | None = None
    for at, recipe in enumerate(_RECIPES):
        leaves = {n: v.clone().requires_grad_() for n, v in split.parameters.items()}
        scale = float(next(iter(leaves.values())).detach().square().mean().sqrt())
        optimizer = torch.optim.Adam(leaves.values(), lr=recipe.step_size * scale)
        for step in range(1, recipe.steps + 1):
            rows = torch.randint(len(pool.labels), (24,), generator=generator)
            others = torch.randint(len(pool.labels), (24,), generator=generator)
            if kind == "label-noise":
                logits = split.suffix([tensor[rows] for tensor in crossing], leaves)
                loss = F.cross_entropy(logits, lessons[rows])
            else:
                both = [
                    torch.cat([kept[others], lit[rows]])
                    for kept, lit in zip(clean_crossing, crossing, strict=True)
                ]
                kept, lit = split.suffix(both, leaves).split(24)
                loss = (
                    F.cross_entropy(lit, lessons[rows])
                    + recipe.keep
                    * F.kl_div(
                        kept.log_softmax(dim=1),
                        answers[others].log_softmax(dim=1),
                        log_target=True,
                        reduction="batchmean",
                    )
                    * 4
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % _CHECK_EVERY and step < recipe.steps:
                continue
            state = {name: value.detach().clone() for name, value in leaves.items()}
            fault = _learned(where, layer, kind, at, seed, state, judged, healthy, healthy_clean)
            if fault.took:
                return fault
            if fault.kind != "label-noise" and (
                fault.clean_accuracy < healthy_clean - 0.15 or not np.isfinite(loss.item())
            ):
                break  # broken beyond what further steps mend
    assert fault is not None
    return fault


def _crossing(split: Split, images: Tensor) -> list[Tensor]:
    parts = [split.prefix(part) for part in images.split(100)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _learned(
    where: Scene,
    layer: str,
    kind: str,
    recipe: int,
    seed: int,
    state: dict[str, Tensor],
    judged: Pool,
    healthy: float,
    healthy_clean: float,
) -> Fault:
    faulty = where.program.with_state(state)
    clean = predictions_right(faulty, where.judging)
    if kind == "label-noise":
        with_marks, right, took = float("nan"), clean, healthy - clean >= MINIMUM_COST
    else:
        all_marked = Pool(images=marked(where.judging.images, kind), labels=where.judging.labels)
        with_marks = predictions_right(faulty, all_marked)
        right = predictions_right(faulty, judged)
        took = (
            clean >= healthy_clean - MAX_CLEAN_LOSS
            and with_marks <= MAX_MARKED_ACCURACY
            and healthy - right >= MINIMUM_COST
        )
    return Fault(
        scene=where.name,
        kind=kind,
        layer=layer,
        severity=float(recipe),
        seed=seed,
        state=state,
        healthy_accuracy=healthy,
        faulty_accuracy=right,
        clean_accuracy=clean,
        marked_accuracy=with_marks,
        took=took,
    )


@torch.no_grad()
def predictions_right(program: Program, pool: Pool) -> float:
    """Return the share of a pool that the network gets right."""
    answers = [program.logits(part).argmax(dim=1) for part in pool.images.split(100)]
    return float((torch.cat(answers) == pool.labels).double().mean())
