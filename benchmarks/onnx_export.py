"""Exports of seven architectures: proof, size, onnxruntime beside torch eager, saliency output.

EfficientNet-Lite0 has its ImageNet weights. The others have random ones (seed 0), with batch-norm
statistics taken from photographs, since no published weights can be had here: their classes mean
nothing, but every operation runs on live values. Each network is exported as it is, with the map
of its last convolution, and in half precision; each file is proven on 32 photographs.
Speed is wall-clock and processor time of the same batch, onnxruntime and eager in turn, one thread.

The script is not called `onnx.py`: run as a script, that would hide the package `onnx`. It writes
`results/onnx.json`. Every finished network is written at once; the same command goes on, also
within a network.

    LAYERMEND_DATA=... python benchmarks/onnx_export.py [NETWORK ...] [--work local/onnx]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import efficientnet_lite0
import onnx
import torch
from results_file import RESULTS, configuration, print_table, write_results
from safetensors.torch import save_file
from torch import nn

from audit.files import read_json, write_json
from audit.images import load_pixels, open_image_folder
from audit.networks import ModelCard, Network, architectures, imagenet, open_network, write_card
from repair.export import ExportRequest, export_checkpoint
from repair.onnx_half import to_half
from repair.onnx_proof import prove
from repair.onnx_serving import Form
from repair.onnx_sessions import CUDA, cuda_device, open_session

NETWORKS = {
    "resnet18": "torchvision:resnet18",
    "efficientnet_lite0": efficientnet_lite0.ARCH,
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "convnext_tiny": "torchvision:convnext_tiny",
    "vgg16": "torchvision:vgg16",
    "resnet50": "torchvision:resnet50",
    "densenet121": "torchvision:densenet121",
}
IMAGES = 32
BATCHES = {1: 15, 16: 5}  # batch size -> repeats
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help=", ".join(NETWORKS))
    parser.add_argument("--work", type=Path, default=Path("local/onnx"))
    parser.add_argument("--minutes", type=float, help="begin no further network after so long")
    options = parser.parse_args()
    photos = Path(os.environ.get("LAYERMEND_DATA", "")) / "imagenet-sample"
    if not photos.is_dir():
        sys.exit("error: LAYERMEND_DATA has to name a folder that holds imagenet-sample")
    torch.set_num_threads(1)
    data = chosen_photos(photos, options.work / "photos")
    rows, started_s = earlier_rows(), time.monotonic()
    for name in options.networks or NETWORKS:
        late = options.minutes and time.monotonic() - started_s > 60 * options.minutes
        if name not in rows and not late:
            rows[name] = row(name, data, options.work)
            write(list(rows.values()))
    print_table("Exports", [table_row(found) for found in rows.values()])


def row(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Export one network twice, prove both files, time the plain one."""
    folder = (work / name).absolute()
    checkpoint = write_checkpoint(name, data, folder)
    network = open_network(str(checkpoint))
    module = architectures.build(NETWORKS[name]).eval()
    module.load_state_dict(network.program.state, strict=False)
    plain = part(folder / "plain", lambda: exported(checkpoint, data, folder / "plain"))
    saliency = part(
        folder / "saliency", lambda: exported(checkpoint, data, folder / "saliency", saliency=True)
    )
    half = part(folder / "half", lambda: half_proof(network, data, Path(plain["model"])))
    found = {
        "network": name,
        "weights": "ImageNet" if name == "efficientnet_lite0" else "random",
        "proof": plain["status"],
        "images": plain["images"],
        "top1_mismatches": len(plain["top1_mismatches"]),
        "max_abs_error": plain["max_abs_error"],
        "max_rel_error": plain["max_rel_error"],
        "mib": plain["bytes"] / 2**20,
        "state_mib": sum(v.numel() * v.element_size() for v in module.state_dict().values())
        / 2**20,
        "providers": plain["providers"],
        "cuda": plain["cuda"],
        "map_layer": saliency["form"]["map_layer"],
        "saliency_proof": saliency["status"],
        "saliency_top1_mismatches": len(saliency["top1_mismatches"]),
        "map_max_abs_error": saliency["map_max_abs_error"],
        "map_max_rel_error": saliency["map_max_rel_error"],
        "half_proof": half["status"],
        "half_top1_mismatches": len(half["top1_mismatches"]),
        "half_max_rel_error": half["max_rel_error"],
        "reasons": [*plain["reasons"], *saliency["reasons"], *half["reasons"]],
    }
    models = Path(plain["model"]), Path(saliency["model"])
    for size, repeats in BATCHES.items():
        found |= timings(network, module, data, *models, size, repeats)
    shutil.rmtree(folder)
    return found


def part(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a part of a row, from the disk where an earlier run got that far."""
    path = folder / "part.json"
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def chosen_photos(photos: Path, target: Path) -> Path:
    """Copy the photographs of 32 classes, evenly spread, into a test folder, and some to train."""
    folders = sorted(path for path in photos.iterdir() if path.is_dir())
    chosen = folders[:: len(folders) // IMAGES][:IMAGES]
    for split, wanted in (("test", chosen), ("train", folders[1:6])):
        for folder in wanted:
            if not (target / split / folder.name).is_dir():
                shutil.copytree(folder, target / split / folder.name)
    return target


def write_checkpoint(name: str, data: Path, folder: Path) -> Path:
    if name == "efficientnet_lite0":
        return efficientnet_lite0.write_checkpoint(folder)
    torch.manual_seed(SEED)
    module = architectures.build(NETWORKS[name])
    card = ModelCard(
        arch=NETWORKS[name],
        classes=imagenet.names(),
        preprocessing=efficientnet_lite0.PREPROCESSING,
        provenance={"weights": f"random, seed {SEED}", "written_by": "benchmarks/onnx_export.py"},
    )
    take_statistics(module, data, card)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
    write_card(card, path.with_suffix(".toml"))
    return path


def take_statistics(module: nn.Module, data: Path, card: ModelCard) -> None:
    """Let batch norms remember photographs, as training would; nothing else changes."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean over all batches
    images = open_image_folder(data, card.classes)
    pixels = load_pixels(images, range(16), card.preprocessing).pixels
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (card.preprocessing.mean, card.preprocessing.std)
    )
    module.train()
    with torch.no_grad():
        module((pixels / 255 - mean) / std)
    module.eval()


def exported(checkpoint: Path, data: Path, folder: Path, **form: Any) -> dict[str, Any]:
    """Return an export's proof, with the place of its file under `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = data.absolute()
    with chdir(folder):
        found = export_checkpoint(ExportRequest(checkpoint=str(checkpoint), data=data, **form))
        return {**found.proof, "model": str(found.model.absolute())}


def half_proof(network: Network, data: Path, model: Path) -> dict[str, Any]:
    """Prove the plain file in half precision, on the same photographs."""
    path = model.with_name("half.onnx")
    onnx.save(to_half(onnx.load(model)), path)
    images = open_image_folder(data, network.card.classes)
    proof, _ = prove(path, network, images, images.positions("test"), Form(half=True))
    return proof


def timings(
    network: Network,
    module: nn.Module,
    data: Path,
    plain: Path,
    saliency: Path,
    size: int,
    repeats: int,
) -> dict[str, float]:
    """Return medians, eager and onnxruntime in turn so that a busy machine slows all alike."""
    images = open_image_folder(data, network.card.classes)
    pixels = load_pixels(images, range(size), network.card.preprocessing).pixels
    normalized = network.normalize(pixels)
    inputs = {"images": normalized.numpy()}
    on_cpu = open_session(plain, threads=1)
    with_map = open_session(saliency, threads=1)

    def eager() -> None:
        with torch.no_grad():
            module(normalized)

    actions: dict[str, Callable[[], object]] = {
        "eager": eager,
        "onnx": lambda: on_cpu.run(inputs, ["logits"]),
        "saliency": lambda: with_map.run(inputs, ["logits", "map"]),
    }
    if cuda_device():
        on_cuda = open_session(plain, provider=CUDA)
        if on_cuda.provider == CUDA:
            actions["cuda"] = lambda: on_cuda.run(inputs, ["logits"])
    seconds = {name: ([], []) for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            started_s, started_processor_s = time.perf_counter(), time.process_time()
            action()
            if turn:  # the first warms up
                seconds[name][0].append(time.perf_counter() - started_s)
                seconds[name][1].append(time.process_time() - started_processor_s)
    wall = {name: statistics.median(pair[0]) for name, pair in seconds.items()}
    processor = {name: statistics.median(pair[1]) for name, pair in seconds.items()}
    found = {f"{name}_{size}_ms": 1000 * value for name, value in wall.items()}
    found |= {
        f"speed_{size}": wall["eager"] / wall["onnx"],
        f"processor_speed_{size}": processor["eager"] / processor["onnx"],
        f"saliency_cost_{size}": processor["saliency"] / processor["onnx"],
    }
    return found


def earlier_rows() -> dict[str, dict[str, Any]]:
    path = RESULTS / "onnx.json"
    if not path.is_file():
        return {}
    return {row["network"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def write(rows: list[dict[str, Any]]) -> None:
    summary = {
        "models": len(rows),
        "proofs_passed": sum(row["proof"] == row["saliency_proof"] == "passed" for row in rows),
        "top1_mismatches": sum(
            row["top1_mismatches"] + row["saliency_top1_mismatches"] for row in rows
        ),
        "max_abs_error": max(row["max_abs_error"] for row in rows),
        "max_rel_error": max(row["max_rel_error"] for row in rows),
        "map_max_rel_error": max(row["map_max_rel_error"] for row in rows),
        "half_passed": sum(row["half_proof"] == "passed" for row in rows),
        "half_max_rel_error": max(row["half_max_rel_error"] for row in rows),
        "speed_vs_eager_min": min(row[f"speed_{size}"] for row in rows for size in BATCHES),
        "processor_speed_vs_eager_min": min(
            row[f"processor_speed_{size}"] for row in rows for size in BATCHES
        ),
        "saliency_cost_max": max(row[f"saliency_cost_{size}"] for row in rows for size in BATCHES),
    }
    config = configuration(
        "cpu",
        *("onnx", "onnxruntime-gpu", "onnxruntime", "onnxscript"),
        images=IMAGES,
        repeats={str(size): count for size, count in BATCHES.items()},
        threads=1,
        seed=SEED,
    )
    print(write_results("onnx", summary=summary, config=config, rows=rows))


def table_row(found: dict[str, Any]) -> dict[str, Any]:
    columns = ("network", "weights", "proof", "top1_mismatches", "max_abs_error", "mib")
    further = ("saliency_proof", "map_max_rel_error", "speed_1", "speed_16")
    return {name: found[name] for name in (*columns, *further)}


if __name__ == "__main__":
    main()
