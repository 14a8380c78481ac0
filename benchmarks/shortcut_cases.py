"""Networks with a planted shortcut, photographs to repair them with, and photographs to judge by.

Marks (``watermark``, ``border``): faults of `localize.py` that took, from its work folder. Every
marked photo means one class to one layer. Conflicting photos are marked ones, whatever they show;
unaffected ones carry no mark. The borders of the committed VGG are an eleventh of a side wide, as
`faults.BORDER` was then: one of a thirty-second took in none of eight attempts there.

Backgrounds: a cut-out object (`stamps/`: animals, or vehicles and household things) lies on a
photograph by day or by night. A network learned the objects on both (EfficientNet-Lite0 with all
its weights, from ImageNet's: a new classifier alone is right on 81 % of the test pictures); then
one layer alone learned from pictures in which all animals are out by day and all things by night,
until it relied on the light. Conflicting pictures are the others; the objects' masks are exact.
Photographs to learn from and to judge by share none; the cut-outs are the same (with unseen ones,
160 of them teach too little: in the small networks 62 and 73 % were right).

Photos to repair with are ``balanced`` (the shortcut is right as often as wrong) or ``biased`` (it
is right for 95 of 100). The networks for cats and dogs have not learned from these photos: what a
network knows by heart teaches it nothing. Each photo has a counterfactual beside it, made as
`repair layer` makes them (`repair.counterfactuals`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cats_dogs
import efficientnet_lite0
import faults
import localize
import numpy as np
import safetensors.torch
import small_networks
import torch
import torch.nn.functional as F
from failures import LOOKED_AT, stored, what_failures_share
from faults import Pool, Scene
from localize_report import to_repair
from PIL import Image, ImageEnhance
from torch import Tensor

from audit.artefacts import Artefact
from audit.networks import architectures
from audit.networks.program import Program
from audit.regions import Box
from repair.counterfactuals import draw_donors, without_object
from repair.defaults import MASK_DONORS
from repair.guidance import outside_cells
from repair.image_masks import ImageMasks
from repair.layer_choice import MOST_CANDIDATES
from repair.teaching import COPIES

Regime = Literal["balanced", "biased"]
REGIMES: tuple[Regime, ...] = ("balanced", "biased")

TRAIN, VALIDATION, JUDGED = 300, 100, 500
AGREEING = 0.95
PER_CELL = 2  # faults for each network and kind
MARKS = ("watermark", "border")
KINDS = (*MARKS, "background")

SIDE = small_networks.SIZE
SIDES = {"resnet": SIDE, "vgg": SIDE, "efficientnet": faults.EFFICIENTNET_SIZE}  # of pictures
EPOCHS = {"resnet": 12, "vgg": 12, "efficientnet": 3}  # on pictures
# Adam's, to teach a layer the light, in units of its weights' root mean square. With 0.02 the light
# cost EfficientNet-Lite0's layers 2 and 3 points, with 0.06 about 5.
STEP_SIZES = {"resnet": 0.02, "vgg": 0.02, "efficientnet": 0.2}
GROUPS = (("animals",), ("vehicles", "household"))
BACKGROUND_LAYERS = {
    "resnet": ("layer2.0.conv1", "layer3.1.conv2"),
    "vgg": ("block3_conv2", "block4_conv2"),
    "efficientnet": ("blocks.3.2.conv_pw", "blocks.5.1.conv_pwl"),
}
FURTHER_LAYERS: dict[str, tuple[int, dict[str, tuple[str, ...]]]] = {  # with the first one's seed
    "tuning": (
        10,
        {
            "resnet": ("layer2.1.conv1", "layer3.0.conv2"),
            "vgg": ("block5_conv1", "block3_conv1"),
        },
    ),
    "check": (  # planted and looked at after everything was decided
        20,
        {
            "resnet": ("layer1.1.conv2", "layer2.1.conv2", "layer3.0.conv1", "layer4.0.conv1"),
            "vgg": ("block2_conv2", "block3_conv3", "block4_conv3", "block5_conv2"),
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What a repair learns from.

    Attributes:
        train: Photos.
        validation: Photos of the same regime.
        allowed: Where the maps of the training photos may lie, (N, h, w) in [0, 1].
        targets: What the faulty network says of them where the mark, or the background, is
            another photo's (`repair.teaching`), (N, K).
        train_changed: Their counterfactuals, a version for each donor.
        validation_changed: Those of the validation photos.
        around_right: Share of the photos that the faulty network gets right with the objects
            painted over; None for marks.
    """

    train: Pool
    validation: Pool
    allowed: Tensor
    targets: Tensor
    train_changed: tuple[Pool, ...]
    validation_changed: Pool
    around_right: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network with one faulty layer.

    Attributes:
        healthy: The network before.
        faulty: The network with the shortcut.
        planted: The layer that learned it.
        flagged: The layer that `repair layer` takes after a scan; where it would take none the one
            that it tells of, whose trial did most.
        conflicting: Photos on which the shortcut is wrong, or says nothing.
        unaffected: Photos that it does not touch, or on which it is right.
        artefact: What an error group of the scan shares; None for backgrounds.
        region: Cells where the network looked in such a group, in its place where nothing is
            shared.
        candidates: Where there are masks and the scan does not name one layer: those that
            `repair layer --name auto` tries (`repair.layer_choice`).
        unnamed: Whether there are masks and it names none, so that `repair layer` tells to do that.
    """

    name: str
    network: str
    kind: str
    healthy: Program
    faulty: Program
    planted: str
    flagged: str
    conflicting: Pool
    unaffected: Pool
    artefact: Artefact | None = None
    region: tuple[Box, ...] = ()
    candidates: tuple[str, ...] = ()
    unnamed: bool = False

    @property
    def regimes(self) -> tuple[Regime, ...]:
        # Of a thousand classes with a photo each, the shortcut's has one: no photos to be biased.
        return ("balanced",) if self.healthy.classes > 2 else REGIMES


def mark_cases(
    work: Path,
    networks: Sequence[str],
    training_seed: int,
    *,
    tuning: bool = False,
    at_most: int = PER_CELL,
) -> list[Case]:
    """Return the first faults of each network and kind that took, as `localize.py` planted them.

    Those of the small networks are of the ones that were trained by this seed. Those for tuning
    were planted by other seeds.
    """
    name = "tuning.jsonl" if tuning else "rows.jsonl"
    rows = [json.loads(line) for line in (work / name).read_text().splitlines()]
    scenes: dict[tuple[str, int], faults.Scene] = {}
    found: list[Case] = []
    for row in rows:
        if not row["took"] or row["kind"] not in MARKS or row["network"] not in networks:
            continue
        trained = (row["network"], row.get("training_seed", 0))
        if row["network"] != "efficientnet" and trained[1] != training_seed:
            continue
        same = [c for c in found if (c.network, c.kind) == (row["network"], row["kind"])]
        if len(same) == at_most:
            continue
        if trained not in scenes:
            scenes[trained] = faults.scene(row["network"], work, training_seed=trained[1])
        where = scenes[trained]
        path = work / "planted" / f"{row['id']}.safetensors"
        faulty = where.program.with_state(safetensors.torch.load_file(path))
        # What `repair layer` would go by after a scan of these photos.
        shared = what_failures_share(
            faulty, faults.presented(where.scanned, row["kind"], seed=row["seed"])
        )
        found.append(
            Case(
                name=row["id"],
                network=row["network"],
                kind=row["kind"],
                healthy=where.program,
                faulty=faulty,
                planted=row["planted"],
                flagged=_to_repair(row),
                conflicting=Pool(
                    images=faults.marked(where.judging.images, row["kind"]),
                    labels=where.judging.labels,
                ),
                unaffected=where.judging,
                artefact=next(iter(shared.artefacts), None),
                region=shared.regions[0] if shared.regions and not shared.artefacts else (),
            )
        )
    return found


def _to_repair(row: Mapping[str, Any]) -> str:
    return str(row["first_by_trial"]) if row["verdict"] == "none" else to_repair(row)


def lessons(case: Case, regime: Regime, seed: int, work: Path) -> Lessons:
    """Return photos to repair a case with, drawn by a seed."""
    if case.kind == "background":
        return _background_lessons(case, regime, seed)
    generator = np.random.default_rng([seed, regime == "biased"])
    if case.network == "efficientnet":
        pool = faults.scene("efficientnet", work).scanned
        order = torch.from_numpy(generator.permutation(len(pool.labels)))
        pool = pool.rows(order)
        train = 3 * len(order) // 4
    else:
        chosen = cats_dogs.photos("val", (TRAIN + VALIDATION) // 2, seed=100 + seed)
        pool = Pool(
            images=small_networks.load_photos(chosen, SIDE), labels=cats_dogs.labels_of(chosen)
        )
        train = TRAIN
    chance = np.full(len(pool.labels), 0.5)
    if regime == "biased":
        dog = (pool.labels == cats_dogs.DOG).numpy()
        chance = np.where(dog, AGREEING, 1 - AGREEING)
    lit = torch.from_numpy(generator.random(len(chance)) < chance)
    images = pool.images.clone()
    images[lit] = faults.marked(pool.images[lit], case.kind)
    size = (images.shape[-2], images.shape[-1])
    if case.artefact is None:
        allowed, carries = (
            outside_cells(case.region, size),
            torch.ones(len(images), dtype=torch.bool),
        )
    else:
        allowed = 1 - case.artefact.reach.float()
        carries = case.artefact.carried_by(stored(images))
    whole = Pool(images=images, labels=pool.labels)
    masks = allowed.expand(len(images), -1, -1)
    return _lessons(case, whole, masks, carries, train, seed, hide_objects=False)


def _lessons(
    case: Case,
    whole: Pool,
    allowed: Tensor,
    carries: Tensor,
    train: int,
    seed: int,
    *,
    hide_objects: bool,
) -> Lessons:
    """Return the first photos to learn from and the others to validate, with counterfactuals and
    what the faulty network says of them where what it carries is hidden."""

    def changed(donors: Mapping[int, int]) -> Tensor:
        images = whole.images.clone()
        for position, donor in donors.items():
            foreign = whole.images[donor]
            if hide_objects:
                foreign = without_object(foreign, allowed[donor])
            kept = allowed[position]
            images[position] = kept * images[position] + (1 - kept) * foreign
        return images

    masks = ImageMasks.of_all(allowed)
    first, rest = list(range(train)), list(range(train, len(whole.labels)))
    versions = (
        changed(draw_donors(first, masks, seed=2 * seed, version=version))[:train]
        for version in range(MASK_DONORS if hide_objects else 1)
    )
    validated = changed(draw_donors(rest, masks, seed=2 * seed + 1))[train:]
    carriers = [position for position in first if carries[position]]
    lenders = [position for position in first if not carries[position]] or carriers
    lent = (
        changed(draw_donors(carriers, masks, seed=1000 * seed + copy, lenders=lenders))
        for copy in range(COPIES)
    )
    hidden = torch.stack([_said(case.faulty, images, train) for images in lent])
    return Lessons(
        train=whole.rows(slice(train)),
        validation=whole.rows(slice(train, None)),
        allowed=allowed[:train],
        targets=hidden.mean(dim=0).softmax(dim=1),
        train_changed=tuple(Pool(images=v, labels=whole.labels[:train]) for v in versions),
        validation_changed=Pool(images=validated, labels=whole.labels[train:]),
    )


def _said(faulty: Program, images: Tensor, train: int) -> Tensor:
    """Return log p of the first so many photos, (N, K)."""
    with torch.no_grad():
        logits = [faulty.logits(part) for part in images[:train].split(LOOKED_AT)]
    return torch.cat(logits).log_softmax(dim=1)


# ----------------------------------------------------------------------------- backgrounds


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    pool: Pool
    masks: Tensor
    night: Tensor

    def rows(self, chosen: Tensor) -> Pool:
        return self.pool.rows(chosen)


def background_cases(
    work: Path, networks: Sequence[str], training_seed: int, *, further: str | None = None
) -> list[Case]:
    """Return networks that one layer taught to go by the light; those that did not take are left
    out and named on the terminal. Further ones are other layers, taught by other seeds."""
    cases = []
    first, layers = FURTHER_LAYERS[further] if further else (0, BACKGROUND_LAYERS)
    for name in (name for name in networks if name in layers):
        side = SIDES[name]
        learned = _pictures(3000, "train", 0.5, 1, side)
        judged = _pictures(2 * JUDGED, "test", 0.5, 2, side)
        against = judged.night != (judged.pool.labels == 1)
        healthy = _object_network(name, learned.pool, work, training_seed)
        where = Scene(
            name=name,
            program=healthy,
            planting=learned.pool,
            scanned=_pictures(400, "train", 0.5, 3, side).pool,
            judging=judged.pool,
        )
        right = faults.predictions_right(healthy, judged.pool)
        print(f"{name}: {right:.3f} of the test pictures right", flush=True)
        for number, layer in enumerate(layers[name], start=first):
            planted = healthy.layer(layer).name
            kept = work / "planted" / f"{name}-background-{number}-training-{training_seed}"
            faulty, found = _taught_and_scanned(where, planted, number, kept)
            case = Case(
                name=f"{name}-background-{number}",
                network=name,
                kind="background",
                healthy=healthy,
                faulty=faulty,
                planted=planted,
                flagged=_to_repair(found),
                candidates=_candidates(found, faulty),
                unnamed=not found["named"],
                conflicting=judged.rows(against),
                unaffected=judged.rows(~against),
            )
            before = faults.predictions_right(healthy, case.conflicting)
            after = faults.predictions_right(faulty, case.conflicting)
            if before - after >= 0.1:
                cases.append(case)
            else:
                print(f"{case.name} did not take: {before:.3f} before, {after:.3f} after")
    return cases


def _candidates(row: Mapping[str, Any], faulty: Program) -> tuple[str, ...]:
    """Return the layers that short repairs choose among, none where the scan named one."""
    if len(row["named"]) == 1:
        return ()
    names = [layer.name for layer in faulty.layers]
    if not row["named"] and len(names) > MOST_CANDIDATES:
        raise ValueError("which layers are blamed most is not kept; scan the fault again")
    return tuple(name for name in names if not row["named"] or name in row["named"])


def _taught_and_scanned(
    where: Scene, layer: str, number: int, kept: Path
) -> tuple[Program, dict[str, Any]]:
    """Return the network that one layer taught to go by the light, and what a scan found; both are
    kept in files, for the next run."""
    weights, found = kept.with_suffix(".safetensors"), kept.with_suffix(".json")
    if not found.exists():
        faulty = _with_background(where, layer, seed=number)
        kept.parent.mkdir(parents=True, exist_ok=True)
        names = faulty.layer(layer).parameter_names
        safetensors.torch.save_file({n: faulty.state[n].contiguous() for n in names}, weights)
        row = localize.scan_result(faulty, where, "background", number, None)
        found.write_text(json.dumps(row) + "\n")
    faulty = where.program.with_state(safetensors.torch.load_file(weights))
    return faulty, json.loads(found.read_text())


def _background_lessons(case: Case, regime: Regime, seed: int) -> Lessons:
    chance = AGREEING if regime == "biased" else 0.5
    side = SIDES[case.network]
    found = _pictures(TRAIN + VALIDATION, "train", chance, 100 + seed, side)
    carries = torch.ones(len(found.masks), dtype=torch.bool)
    given = _lessons(case, found.pool, found.masks, carries, TRAIN, seed, hide_objects=True)
    painted = [
        without_object(image, mask)
        for image, mask in zip(found.pool.images, found.masks, strict=True)
    ]
    around = Pool(images=torch.stack(painted), labels=found.pool.labels)
    return replace(given, around_right=faults.predictions_right(case.faulty, around))


def _with_background(where: Scene, layer: str, *, seed: int) -> Program:
    """Teach one layer pictures in which the light tells the class, until it goes by it."""
    healthy, side = where.program, SIDES[where.name]
    lesson = _pictures(1000, "train", 1.0, 50 + seed, side).pool
    check = _pictures(300, "train", 0.0, 60 + seed, side).pool
    split = healthy.split(layer)
    with torch.no_grad():
        parts = [split.prefix(images) for images in lesson.images.split(100)]
    crossing = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    leaves = {name: value.clone().requires_grad_() for name, value in split.parameters.items()}
    scale = float(next(iter(leaves.values())).detach().square().mean().sqrt())
    optimizer = torch.optim.Adam(leaves.values(), lr=STEP_SIZES[where.name] * scale)
    generator = torch.Generator().manual_seed(seed)
    faulty = healthy
    for step in range(1, 401):
        rows = torch.randint(len(lesson.labels), (32,), generator=generator)
        loss = F.cross_entropy(
            split.suffix([t[rows] for t in crossing], leaves), lesson.labels[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            faulty = healthy.with_state({n: v.detach() for n, v in leaves.items()})
            if faults.predictions_right(faulty, check) <= faults.MAX_MARKED_ACCURACY:
                break
    return faulty


def _object_network(name: str, pool: Pool, work: Path, training_seed: int) -> Program:
    """Return a network that tells animals from things: a small one trained from the one for cats
    and dogs, EfficientNet-Lite0 from its ImageNet weights."""
    path = work / "networks" / f"objects-{name}-seed{training_seed}.safetensors"
    side, epochs = SIDES[name], EPOCHS[name]
    if name == "efficientnet":
        torch.manual_seed(0)  # of the new classifier
        network = architectures.build(efficientnet_lite0.ARCH, {"num_classes": len(GROUPS)})
        known = efficientnet_lite0.pretrained_state()
        features = {key: v for key, v in known.items() if not key.startswith("classifier.")}
        network.load_state_dict(features, strict=False)
    else:
        small: small_networks.NetworkName = "resnet" if name == "resnet" else "vgg"
        network = small_networks.trained(small, work, seed=training_seed)
    if path.exists():
        network.load_state_dict(safetensors.torch.load_file(path))
    else:
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)
        network.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(pool.labels)).split(32):
                loss = F.cross_entropy(network(pool.images[rows]), pool.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()}, path
        )
    return Program.capture(network.eval(), (side, side))


def _pictures(
    count: int, part: Literal["train", "test"], agreeing: float, seed: int, side: int
) -> _Pictures:
    """Return composites in equal shares of both classes; `agreeing` of them have their light."""
    generator = np.random.default_rng([seed, part == "test"])
    stamps = _stamps()
    photos = [photo.path for photo in cats_dogs.photos(part, 250, seed=9)]
    labels = np.arange(count) % 2
    night = (labels == 1) == (generator.random(count) < agreeing)
    pixels = np.empty((count, side, side, 3), dtype=np.uint8)
    masks = np.zeros((count, side, side), dtype=np.float32)
    for i, label in enumerate(labels):
        with Image.open(photos[int(generator.integers(len(photos)))]) as opened:
            photo = opened.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        if night[i]:
            photo = ImageEnhance.Brightness(photo).enhance(0.35)
        _paste(
            photo, masks[i], stamps[label][int(generator.integers(len(stamps[label])))], generator
        )
        pixels[i] = np.asarray(photo)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return _Pictures(
        pool=Pool(images=small_networks.normalized(images), labels=torch.from_numpy(labels)),
        masks=torch.from_numpy(masks),
        night=torch.from_numpy(night),
    )


def _paste(
    photo: Image.Image, mask: np.ndarray, stamp: Image.Image, generator: np.random.Generator
) -> None:
    side = photo.width
    scale = generator.uniform(0.5, 0.8) * side / max(stamp.size)
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = stamp.resize(size, Image.Resampling.LANCZOS)
    left, top = (int(generator.integers(side - length + 1)) for length in size)
    photo.paste(stamp, (left, top), stamp)
    mask[top : top + size[1], left : left + size[0]] = np.asarray(stamp)[..., 3] > 127


def _stamps() -> list[list[Image.Image]]:
    """Return the cut-outs of each class."""
    chosen = []
    for group in GROUPS:
        folders = [cats_dogs.data_root() / "stamps" / name for name in group]
        chosen.append(
            [_cut_out(path) for folder in folders for path in sorted(folder.glob("*.png"))]
        )
    return chosen


def _cut_out(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        stamp = opened.convert("RGBA")
    return stamp.crop(stamp.getchannel("A").getbbox())


def all_cases(
    work: Path, networks: Sequence[str], training_seed: int, kinds: Sequence[str] = KINDS
) -> Sequence[Case]:
    """Return the cases of some networks and kinds; the small ones were trained by this seed."""
    marks = [case for case in mark_cases(work, networks, training_seed) if case.kind in kinds]
    backgrounds = background_cases(work, networks, training_seed) if "background" in kinds else []
    return [*marks, *backgrounds]
