"""`audit scan` of EfficientNet-Lite0 on 1,000 ImageNet photographs, one per class.

Class folders carry synset ids and the model's card class names: the scan has to match all of them.
The reference is 88.3 % top-1, measured with the weights' own preprocessing.

    LAYERMEND_DATA=... python benchmarks/imagenet_sample.py [--work local/imagenet]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import efficientnet_lite0
import pyarrow.parquet
from commands import run_command
from results_file import configuration, print_table, write_results

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
        "reference_accuracy": REFERENCE,
        "images": len(images),
        "classes_matched": images["label_name"].nunique(),
        "class_folders": len(folders),
        "seconds": scan.seconds,
        "peak_memory_mib": scan.peak_memory_mib,
    }
    config = configuration(command=scan.arguments, checkpoint=checkpoint.name)
    print_table("EfficientNet-Lite0 on imagenet-sample", [summary])
    print(write_results("imagenet_sample", summary=summary, config=config, rows=[]))


if __name__ == "__main__":
    main()
