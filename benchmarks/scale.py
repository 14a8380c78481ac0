"""Does a scan's memory grow with the images, and its time faster than they do?

`audit scan` as a user types it, each in a process of its own, on 1,000, 5,000 and 20,000 images
(handwritten digits on noise, 32 pixels, no two alike) with a small VGG trained here. What an image
costs is the slope between two sizes, so that what every scan costs (starting, trials, the proxy's
512 images) does not count; processor time, since the machine is not ours alone.

Then a million rows of images.parquet, with the real schema and paths as long as ImageNet's, are
written and read as a run does, each in a process of its own.

    python benchmarks/scale.py [--work local/scale] [--repeats 3]

Scans that were finished are kept; the same command does the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import run_command
from PIL import Image
from results_file import configuration, print_table, write_results
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audit.environment import peak_memory_mib
from audit.files import write_json
from audit.networks.small_vgg import SmallVGG
from audit.runs import list_runs, start_run
from tests.small_model import save_with_card

SIZES = (1000, 5000, 20000)
CLASSES = tuple(f"digit {value}" for value in range(10))
SIDE = 32
WIDTHS, CONVOLUTIONS = (8, 16), (1, 2)
MILLION = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("local/scale"))
    parser.add_argument("--repeats", type=int, default=3, help="of the two smaller sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", choices=("nothing", "write", "read"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(json.dumps(table(options.table, options.work)))
        return
    model = trained_model(options.work / "digits.safetensors", options.seed)
    scans = []
    for size in SIZES:
        images = drawn_images(options.work / f"images-{size}", size, options.seed)
        for repeat in range(options.repeats if size < SIZES[-1] else 1):
            scans.append(scan(options.work, model, images, size, repeat))
            print(scans[-1])
    report(scans, million_rows(options.work), options)


# -------------------------------------------------------------------- material


def draw(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return digits at random places on noise, uint8 (count, 32, 32, 3), and what they are."""
    ink, labels = load_digits(return_X_y=True)
    chosen = generator.integers(0, len(ink), size=count)
    pixels = generator.integers(0, 110, size=(count, SIDE, SIDE, 3), dtype=np.uint8)
    for image, at in zip(pixels, chosen, strict=True):
        digit = np.kron(ink[at].reshape(8, 8) / 16, np.ones((3, 3)))[..., None]
        y, x = generator.integers(0, SIDE - 24, size=2)
        under = image[y : y + 24, x : x + 24]
        color = generator.integers(170, 255, size=3)
        image[y : y + 24, x : x + 24] = (under + digit * (color - under)).astype(np.uint8)
    return pixels, labels[chosen]


def drawn_images(folder: Path, count: int, seed: int) -> Path:
    """Return a folder of so many images, one sub-folder per class."""
    done = folder.with_suffix(".json")
    if not done.exists():
        pixels, labels = draw(count, np.random.default_rng([seed, count]))
        for name in CLASSES:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            Image.fromarray(image).save(folder / CLASSES[label] / f"{number:06d}.png")
        write_json(done, {"images": count})
    return folder


def trained_model(path: Path, seed: int) -> Path:
    """Return a network that reads most of the digits, with its card."""
    if path.with_suffix(".toml").exists():
        return path
    pixels, labels = draw(8000, np.random.default_rng([seed, 1]))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    targets = torch.from_numpy(labels)
    torch.manual_seed(seed)
    network = SmallVGG(classes=len(CLASSES), widths=WIDTHS, convolutions=CONVOLUTIONS)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(12):
        for rows in torch.randperm(len(images)).split(100):
            loss = torch.nn.functional.cross_entropy(network(images[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_with_card(
        network,
        path,
        CLASSES,
        widths=WIDTHS,
        convolutions=CONVOLUTIONS,
        side=SIDE,
        trained_by="benchmarks/scale.py",
    )
    return path


# -------------------------------------------------------------------- scans


def scan(work: Path, model: Path, images: Path, size: int, repeat: int) -> dict[str, Any]:
    """Return what one scan cost; from an earlier run of this script where it was finished."""
    kept = work / f"scan-{size}-{repeat}.json"
    if not kept.exists():
        out = work / f"runs-{size}-{repeat}"
        finished = run_command(
            ["audit", "scan", model, "--data", images, "--out", out, "--batch-size", 64, "--json"]
        )
        document = finished.json()
        run = Path(document["run"])
        row = {
            "images": size,
            "repeat": repeat,
            "seconds": finished.seconds,
            "processor_seconds": finished.processor_seconds,
            "peak_memory_mib": finished.peak_memory_mib,
            "run_mib": sum(p.stat().st_size for p in run.rglob("*") if p.is_file()) / 2**20,
            "accuracy": document["metrics"]["all"]["accuracy"]["value"],
            **{f"{step}_s": taken_s for step, taken_s in document["timings_s"].items()},
        }
        write_json(kept, row)
    row = json.loads(kept.read_text())
    return dict(row)


# -------------------------------------------------------------------- a million rows


def million_rows(work: Path) -> list[dict[str, Any]]:
    """Return seconds and memory of writing and of reading a million rows."""
    rows = []
    for what in ("nothing", "write", "read"):
        child = subprocess.run(
            [sys.executable, __file__, "--work", str(work), "--table", what],
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append(json.loads(child.stdout.splitlines()[-1]))
    return rows


def table(what: str, work: Path) -> dict[str, Any]:
    """Write or read a million rows of images.parquet in this process; return what it cost."""
    root = work / "million"
    started_s = time.perf_counter()
    size_mib = None
    if what == "write":
        columns = million_columns(np.random.default_rng(0))
        started_s = time.perf_counter()
        run = start_run(root, "million")
        run.write_images(columns)
        size_mib = (run.path / "images.parquet").stat().st_size / 2**20
    elif what == "read":
        assert len(list_runs(root)[0].images) == MILLION
    return {
        "table": what,
        "rows": 0 if what == "nothing" else MILLION,
        "seconds": time.perf_counter() - started_s,
        "file_mib": size_mib,
        "peak_memory_mib": peak_memory_mib(),
    }


def million_columns(generator: np.random.Generator) -> dict[str, Any]:
    """Return the columns of a scan without masks: numbers that do not compress, unlike hashes."""
    labels, predicted = generator.integers(0, 1000, size=(2, MILLION))
    real = generator.random((5, MILLION))
    hashes = generator.bytes(32 * MILLION).hex()
    judged = generator.random(MILLION) < 512 / MILLION  # by the proxy
    return {
        "path": [f"train/n{label:08d}/n{label:08d}_{i}.JPEG" for i, label in enumerate(labels)],
        "label": labels,
        "label_name": [f"class {label}" for label in labels],
        "predicted": predicted,
        "predicted_name": [f"class {label}" for label in predicted],
        "right": labels == predicted,
        "p_true": real[0],
        "p_predicted": real[1],
        "ce": real[2],
        "case": [3 if one else None for one in judged],
        "map_mean": real[3],
        "map_peak_x": np.floor(real[4] * 7) / 7,
        "map_peak_y": np.floor(real[3] * 7) / 7,
        "map_accurate": [False if one else None for one in judged],
        "map_faithfulness": np.where(judged, real[0], np.nan),
        "split": ["train" if i % 5 < 3 else "val" for i in range(MILLION)],
        "sha256": [hashes[64 * i : 64 * i + 64] for i in range(MILLION)],
    }


# -------------------------------------------------------------------- what it comes to


def report(
    scans: Sequence[dict[str, Any]], tables: Sequence[dict[str, Any]], options: argparse.Namespace
) -> None:
    middle = {
        name: [statistics.median(s[name] for s in scans if s["images"] == n) for n in SIZES]
        for name in ("processor_seconds", "seconds", "peak_memory_mib", "run_mib")
    }
    few, some, many = middle["processor_seconds"]
    slopes = (some - few) / (SIZES[1] - SIZES[0]), (many - some) / (SIZES[2] - SIZES[1])
    memory = middle["peak_memory_mib"]
    nothing, written, read = tables
    summary = {
        "memory_ratio": memory[2] / memory[0],
        "time_linearity": slopes[1] / slopes[0],
        "bytes_an_image": (memory[2] - memory[0]) * 2**20 / (SIZES[2] - SIZES[0]),
        "processor_ms_an_image": 1000 * slopes[1],
        "million_write_s": written["seconds"],
        "million_read_s": read["seconds"],
        "million_file_mib": written["file_mib"],
        "million_write_mib": written["peak_memory_mib"] - nothing["peak_memory_mib"],
        "million_read_mib": read["peak_memory_mib"] - nothing["peak_memory_mib"],
    }
    rows = [
        {"images": size, **{name: values[at] for name, values in middle.items()}}
        for at, size in enumerate(SIZES)
    ]
    print_table("Scans, medians", rows)
    print_table("images.parquet, a million rows", tables)
    print(summary)
    config = configuration(
        "cpu", "pyarrow", "pandas", seed=options.seed, repeats=options.repeats, cores=os.cpu_count()
    )
    print(write_results("scale", summary=summary, config=config, rows=[*scans, *tables]))


if __name__ == "__main__":
    main()
