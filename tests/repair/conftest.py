"""A tiny classifier with one damaged layer, its images, and a run folder that scanned them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from audit.images import ImageFolder, load_pixels, open_image_folder
from audit.networks import ModelCard, Network, open_network, write_card
from audit.networks.small_vgg import ARCHITECTURE, SmallVGG
from audit.runs import RepairFolder, Run, open_repair, open_run, start_run
from repair.cache import CacheKind, CrossingTensors, cross_tensors
from repair.config import RepairConfig
from repair.decision import Predictions
from repair.export import Exported, ExportRequest, export_network
from repair.layer import RepairRequest, repair_layer
from tests.small_model import preprocessing

CLASSES = ("disk", "square", "stripes")
DAMAGED = "block2_conv1"
SIDE = 24
CONFIG = RepairConfig(epochs=4, learning_rate=0.02, controls=("ce",))
WIDTHS, CONVOLUTIONS = (6, 8, 10), (1, 1, 2)
Crossed = Callable[..., CrossingTensors]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of bright shapes on noise, sixty images each, 24 pixels wide."""
    root = tmp_path_factory.mktemp("photos")
    draw_photos(root, 60, seed=0)
    return root


def draw_photos(root: Path, per_class: int, *, seed: int) -> None:
    generator = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            x, y = generator.integers(8, SIDE - 8, size=2)
            shape = {
                "disk": (across - x) ** 2 + (down - y) ** 2 < 36,
                "square": (abs(across - x) < 6) & (abs(down - y) < 6),
                "stripes": (abs(across - x) < 7) & ((down + y) % 4 < 2),
            }[name]
            pixels = generator.integers(0, 120, size=(SIDE, SIDE, 3))
            pixels[shape] = generator.integers(150, 255, size=3)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03d}.png")


@pytest.fixture(scope="session")
def card() -> ModelCard:
    return ModelCard(
        arch=ARCHITECTURE,
        arch_args={"classes": 3, "widths": list(WIDTHS), "convolutions": list(CONVOLUTIONS)},
        classes=CLASSES,
        preprocessing=preprocessing(SIDE),
        provenance={"trained_by": "tests/repair/conftest.py"},
    )


@pytest.fixture(scope="session")
def model_file(photos: Path, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that learned the shapes, with noise in one of its layers afterwards."""
    folder = open_image_folder(photos, CLASSES)
    batch = load_pixels(folder, folder.positions("train"), card.preprocessing)
    # In double precision, so that it is the same network on every machine.
    images = (batch.pixels.double() / 255 - 0.5) / 0.25
    labels = torch.tensor([folder.records[i].label for i in batch.indices.tolist()])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallVGG(classes=3, widths=WIDTHS, convolutions=CONVOLUTIONS).double()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(60):
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weight = network.float().get_submodule(DAMAGED).weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(19))
        with torch.no_grad():
            weight += weight.std() * noise
    path = tmp_path_factory.mktemp("model") / "shapes.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    write_card(card, path.with_suffix(".toml"))
    return path


@pytest.fixture(scope="session")
def network(model_file: Path) -> Network:
    return open_network(str(model_file))


@pytest.fixture(scope="session")
def folder(photos: Path) -> ImageFolder:
    return open_image_folder(photos, CLASSES)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    photos: Path,
    model_file: Path,
    network: Network,
    folder: ImageFolder,
) -> tuple[Run, RepairFolder]:
    """One finished repair that several tests look at and none changes."""
    run = write_run(tmp_path_factory.mktemp("runs"), photos, model_file, network, folder)
    return run, repair_layer(run, CONFIG, RepairRequest(command=("repair", "layer")))


@pytest.fixture
def finished_copy(finished: tuple[Run, RepairFolder], tmp_path: Path) -> tuple[Run, RepairFolder]:
    """The same, to be changed at will."""
    run, repair = finished
    copy = tmp_path / "copy" / run.name
    shutil.copytree(run.path, copy)
    return open_run(copy), open_repair(copy / "repairs" / repair.name)


@pytest.fixture(scope="session")
def served(
    finished: tuple[Run, RepairFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RepairFolder, Exported]:
    """The repair exported with preprocessing and saliency in the graph; nobody changes it."""
    request = ExportRequest(preprocess="nhwc", saliency=True)
    return export_copy(finished, tmp_path_factory.mktemp("served"), request)


PhotoModel = tuple[RepairFolder, Exported]


@pytest.fixture(scope="session")
def photo_model(
    finished: tuple[Run, RepairFolder], tmp_path_factory: pytest.TempPathFactory
) -> PhotoModel:
    """The repair exported to take photographs of any size; nobody changes it."""
    request = ExportRequest(preprocess="photo")
    return export_copy(finished, tmp_path_factory.mktemp("photo_model"), request)


def export_copy(
    finished: tuple[Run, RepairFolder], root: Path, request: ExportRequest
) -> tuple[RepairFolder, Exported]:
    run, repair = finished
    copy = root / run.name
    shutil.copytree(run.path, copy)
    return open_repair(copy / "repairs" / repair.name), export_network(open_run(copy), request)


@pytest.fixture
def make_run(
    tmp_path: Path, photos: Path, model_file: Path, network: Network, folder: ImageFolder
) -> Callable[..., Run]:
    """Return a function that writes a complete run of the damaged network."""

    def make(verdict: str = "localized") -> Run:
        return write_run(tmp_path / "runs", photos, model_file, network, folder, verdict)

    return make


def write_run(
    root: Path,
    photos: Path,
    model_file: Path,
    network: Network,
    folder: ImageFolder,
    verdict: str = "localized",
) -> Run:
    run = start_run(
        root,
        "shapes",
        {
            "command": ["audit", "scan", str(model_file)],
            "model": {
                "source": str(model_file),
                "arch": network.card.arch,
                "sha256": network.sha256,
                "classes": list(CLASSES),
            },
            "data": {
                "root": str(photos),
                "fingerprint": folder.fingerprint,
                "split_source": folder.split_source,
            },
            "seed": 0,
        },
    )
    predictions = whole_network_predictions(network, folder, range(len(folder.records)))
    run.write_images(
        [
            {
                "path": record.path,
                "label": record.label,
                "label_name": record.class_name,
                "predicted": int(predictions.predicted[i]),
                "predicted_name": CLASSES[predictions.predicted[i]],
                "right": bool(predictions.right[i]),
                "p_true": float(predictions.p_true[i]),
                "ce": float(predictions.cross_entropies[i]),
                "split": record.split,
                "sha256": record.sha256,
            }
            for i, record in enumerate(folder.records)
        ]
    )
    layers = [DAMAGED] if verdict == "localized" else []
    run.write_verdict({"verdict": verdict, "layers": layers, "reasons": []})
    run.finish()
    return run


@pytest.fixture
def crossed(network: Network, folder: ImageFolder) -> Crossed:
    """Return what makes of a split what crosses the cut of the damaged layer."""

    def cross(split: str, kind: CacheKind = "memory") -> CrossingTensors:
        return cross_tensors(
            network,
            network.program.split(DAMAGED),
            folder,
            folder.positions(split),  # type: ignore[arg-type]
            budget_bytes=0,
            kind=kind,
        )

    return cross


def whole_network_predictions(
    network: Network, folder: ImageFolder, indices: range | tuple[int, ...]
) -> Predictions:
    """What the uncut network says, without anything from the repair package's own path."""
    batch = load_pixels(folder, indices, network.card.preprocessing)
    with torch.no_grad():
        logits = network.program.logits(network.normalize(batch.pixels))
    labels = torch.tensor([folder.records[i].label for i in batch.indices.tolist()])
    entropies = nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
    return Predictions(
        labels=labels.numpy(),
        predicted=logits.argmax(1).numpy(),
        p_true=np.exp(-entropies),
        cross_entropies=entropies,
    )
