"""`audit scan` of EfficientNet-Lite0 on 1,000 ImageNet photographs, one per class.

Class folders carry synset ids and the model's card class names: the scan has to match all of them.
Its accuracy stands beside that of timm's plain module on the same files, decoded by Pillow and
cropped by torchvision, and beside the 88.3 % that these weights were once measured at.

    LAYERMEND_DATA=... python benchmarks/imagenet_sample.py [--work local/imagenet]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import efficientnet_lite0
import pyarrow.parquet
import torch
from commands import run_command
from PIL import Image
from results_file import configuration, print_table, write_results

from audit.networks import architectures
from audit.networks.torchvision_import import import_torchvision

REFERENCE = 0.883


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("local/imagenet"))
    parser.add_argument("--layers", default="conv_head", help="layers to try; accuracy needs none")
    options = parser.parse_args()
    photos = Path(os.environ.get("LAYERMEND_DATA", "")) / "imagenet-sample"
    if not photos.is_dir():
        sys.exit("error: LAYERMEND_DATA has to name a folder that holds imagenet-sample")

    checkpoint = efficientnet_lite0.write_checkpoint(options.work)
    scan = run_command(
        [
            *("audit", "scan", checkpoint, "--data", photos, "--out", options.work / "runs"),
            *("--layers", options.layers, "--json"),
        ]
    )
    document = scan.json()
    images = pyarrow.parquet.read_table(
        Path(document["run"]) / "images.parquet", columns=["path", "label_name", "right"]
    ).to_pandas()
    accuracy = document["metrics"]["all"]["accuracy"]
    folders = {Path(path).parts[-2] for path in images["path"]}
    summary = {
        "accuracy": accuracy["value"],
        "accuracy_low": accuracy["low"],
        "accuracy_high": accuracy["high"],
        "plain_timm_accuracy": plain_accuracy(photos),
        "reference_accuracy": REFERENCE,
        "images": len(images),
        "classes_matched": images["label_name"].nunique(),
        "class_folders": len(folders),
        "seconds": scan.seconds,
        "peak_memory_mib": scan.peak_memory_mib,
    }
    config = configuration("cpu", "pillow", layers=options.layers, checkpoint=checkpoint.name)
    print_table("EfficientNet-Lite0 on imagenet-sample", [summary])
    print(write_results("imagenet_sample", summary=summary, config=config, rows=[]))


def plain_accuracy(photos: Path) -> float:
    """Return the top-1 of timm's own module, without any part of layermend's scan."""
    transforms = import_torchvision().transforms
    network = architectures.build(efficientnet_lite0.ARCH)
    network.load_state_dict(efficientnet_lite0.pretrained_state(), strict=False)
    network.eval()
    prepare = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    folders = sorted(path for path in photos.iterdir() if path.is_dir())  # sorted synset ids
    right = total = 0
    for label, folder in enumerate(folders):
        for path in sorted(folder.iterdir()):
            pixels = prepare(Image.open(path).convert("RGB"))
            with torch.no_grad():
                logits = network(((pixels.float() - 127) / 128).unsqueeze(0))
            right += int(logits.argmax() == label)
            total += 1
    return right / total


if __name__ == "__main__":
    main()
