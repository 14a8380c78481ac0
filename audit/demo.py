"""`audit demo`: the whole story on an embedded example, by the commands that a user would type.

A small VGG reads handwritten digits well, until a badge stands in a corner of the image: one of its
layers has learned to obey the badge. Here the images are drawn, the commands scan, repair, export
and report run one after the other, and their files are read back into a table to check. Which layer
is at fault is looked up last of all; no command is told.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from audit import console
from audit.errors import LayermendError, RunError, UsageError
from audit.files import write_json

if TYPE_CHECKING:
    import pandas as pd

    from audit.runs import RepairFolder, Run

MODEL_NAME = "digits-vgg"

_RECEIPT = "demo.json"  # tells a demo's folder, which may be written again, from anyone else's
_PLANTED = re.compile(r"planted layer: `([^`]+)`")


def run_demo(folder: Path = Path("layermend-demo"), *, seed: int = 0) -> None:
    """Tell the story in `folder`: images, model, run, report and ONNX file all end up there.

    Args:
        folder: Made if missing. A former demo's images and model are replaced, its runs are kept.
        seed: Of the drawing of the images, the scan and the repair; not of which digit is in which
            split, so that digits the network has seen stay out of val and test.

    Raises:
        UsageError: `folder` holds other things.
        LayermendError: a command failed; what it said stands above.
    """
    from audit.runs import newest_run

    started = time.perf_counter()
    model, images = prepare(folder, seed=seed)
    runs = folder / "runs"
    seeded = ("--seed", str(seed))

    command("audit", "scan", str(model), "--data", str(images), "--out", str(runs), *seeded)
    run = newest_run(runs, status="complete")
    command("repair", "layer", "--run", str(run.path), *seeded)
    command("repair", "export", "--run", str(run.path))
    command("audit", "report", str(run.path))

    repairs = run.repairs
    if not repairs:
        raise RunError(f"{run.path} holds no repair, though every command reported success")
    _print_results(run, repairs[0], elapsed_s=time.perf_counter() - started)


def prepare(folder: Path, *, seed: int) -> tuple[Path, Path]:
    """Put the model and freshly drawn images into `folder`; return where both are."""
    from audit.digits import write_digit_images

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected a folder; give another one with --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RECEIPT).is_file():
        raise UsageError(f"{folder} holds other files, nothing was written; give a new --out")
    source = models_folder() / MODEL_NAME
    images = folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _RECEIPT, {"made_by": "audit demo", "seed": seed})
    shutil.rmtree(images, ignore_errors=True)  # another seed marks other images
    counts = write_digit_images(images, seed=seed)
    for name in (f"{MODEL_NAME}.safetensors", f"{MODEL_NAME}.toml"):
        shutil.copyfile(source / name, folder / name)
    drawn = ", ".join(f"{count} {split}" for split, count in counts.items())
    console.say(f"drew {sum(counts.values())} images into {images} ({drawn})")
    return folder / f"{MODEL_NAME}.safetensors", images


def models_folder() -> Path:
    """Return where the model files are: inside an installed package, or beside it in a clone.

    Raises:
        LayermendError: they are in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "models", package.parent / "models"):
        if (folder / MODEL_NAME / f"{MODEL_NAME}.safetensors").is_file():
            return folder
    raise LayermendError(
        f"no {MODEL_NAME}.safetensors in {package / 'models'} or {package.parent / 'models'}; "
        "make it with scripts/make_demo_model.py, or install layermend again"
    )


def planted_layer() -> str:
    """Return the layer that was made faulty, from the model's README; for after the scan."""
    readme = models_folder() / MODEL_NAME / "README.md"
    found = _PLANTED.search(readme.read_text(encoding="utf-8"))
    if found is None:
        raise LayermendError(f"{readme} does not say which layer was planted")
    return found.group(1)


def command(package: str, *arguments: str) -> None:
    """Show a command line and run it in a process of its own, its output passing through.

    Raises:
        LayermendError: it exited with anything but 0.
    """
    line = shlex.join([package, *arguments])
    console.stdout.print(f"\n$ {line}", style="bold", markup=False, soft_wrap=True)
    sys.stdout.flush()
    finished = subprocess.run([sys.executable, "-m", package, *arguments], check=False)
    if finished.returncode != 0:
        raise LayermendError(f"the demo stopped: `{line}` exited with {finished.returncode}")


def _print_results(run: Run, repair: RepairFolder, *, elapsed_s: float) -> None:
    out: Callable[..., None] = console.stdout.print
    out("\nWhat the run's files say", style="bold")
    out(_accuracy_table(repair.images))
    for name, fact in _facts(run, repair, elapsed_s=elapsed_s):
        out(f"{name + ':':<16}{fact}", markup=False, soft_wrap=True)
    out(f"\nLook at it:  dashboard {shlex.quote(str(run.path.parent))}", soft_wrap=True)


def _accuracy_table(images: pd.DataFrame) -> Table:
    """Return accuracy on unmarked and marked test images, from the repair's images.parquet."""
    from audit.digits import MARKED_NAME

    table = Table(title="accuracy on test images, in %, with 95 % Wilson intervals")
    columns = {"as given": "right_before", "repaired": "right_after", "plain CE": "right_control"}
    columns = {title: name for title, name in columns.items() if name in images}
    table.add_column("images")
    table.add_column("n", justify="right")
    for title in columns:
        table.add_column(title, justify="right")
    marked = images["path"].str.contains(f"-{MARKED_NAME}[.]png$", regex=True)
    groups = {"unmarked": ~marked, "marked": marked, "all": marked | ~marked}
    for group, members in groups.items():
        chosen = images[members]
        cells = [_accuracy(chosen[name].dropna()) for name in columns.values()]
        table.add_row(group, str(len(chosen)), *cells)
    return table


def _accuracy(right: pd.Series) -> str:
    from audit.statistics import wilson

    if not len(right):
        return "-"
    share = wilson(int(right.sum()), len(right))
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _facts(run: Run, repair: RepairFolder, *, elapsed_s: float) -> list[tuple[str, str]]:
    verdict, ssim, onnx = run.verdict, repair.info["ssim"], repair.onnx or {}
    error = onnx.get("max_abs_error")
    planted = planted_layer()
    ranks = run.layers.set_index("name")["rank"]
    return [
        ("verdict", f"{verdict['verdict']}: {', '.join(verdict['layers'])}"),
        ("", verdict["reasons"][0] if verdict["reasons"] else "no reason recorded"),
        ("repaired", f"{repair.layer}, {repair.info['decision']}"),
        ("the truth", f"{planted} was planted; the scan gave it rank {ranks.get(planted, '?')}"),
        ("maps", f"SSIM before to after {ssim['value']:.3f}" if ssim else "no SSIM recorded"),
        (
            "ONNX",
            f"{onnx.get('status', 'missing')}: same top-1 on {onnx.get('top1_equal', 0)} of "
            f"{onnx.get('images', 0)} images, largest error "
            + ("unknown" if error is None else f"{error:.1e}"),
        ),
        ("ONNX file", str(repair.onnx_model)),
        ("report", str(run.path / "report.html")),
        ("time", f"{elapsed_s:.0f} s"),
    ]
