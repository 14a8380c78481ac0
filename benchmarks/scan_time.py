"""How long `audit scan` takes with all its defaults: EfficientNet-Lite0, 1,000 photographs, 224 px.

The command as a user types it: predictions, evidence of all 51 layers, error groups, trials within
the default budget, verdict, gallery. No layer is at fault.

    LAYERMEND_DATA=... python benchmarks/scan_time.py [--work local/imagenet]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("local/imagenet"))
    options = parser.parse_args()
    photos = Path(os.environ.get("LAYERMEND_DATA", "")) / "imagenet-sample"
    if not photos.is_dir():
        sys.exit("error: LAYERMEND_DATA has to name a folder that holds imagenet-sample")
    checkpoint = efficientnet_lite0.write_checkpoint(options.work)
    scan = run_command(
        ["audit", "scan", checkpoint, "--data", photos, "--out", options.work / "runs", "--json"]
    )
    document = scan.json()
    layers = pyarrow.parquet.read_table(Path(document["run"]) / "layers.parquet").to_pandas()
    summary = {
        "minutes": round(scan.seconds / 60, 2),
        "images": document["data"]["images"],
        "layers": len(layers),
        "layers_tried": int(layers["trial_gain"].notna().sum()),
        "layers_tried_longest": int((layers["trial_steps"] == layers["trial_steps"].max()).sum()),
        "peak_memory_mib": scan.peak_memory_mib,
        **{f"{step}_s": seconds for step, seconds in document["timings_s"].items()},
    }
    verdict = document["verdict"]
    rows = [{"verdict": verdict["verdict"], "layers": verdict["layers"], "why": verdict["reasons"]}]
    print_table("A scan with defaults", [{"what": k, "value": v} for k, v in summary.items()])
    print(verdict)
    config = configuration("cpu", "timm", checkpoint=checkpoint.name, seed=document["seed"])
    print(write_results("scan_time", summary=summary, config=config, rows=rows))


if __name__ == "__main__":
    main()
