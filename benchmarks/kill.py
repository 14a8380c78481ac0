"""Commands killed at random moments, by SIGKILL, and gone on with: is anything lost or half done?

`audit scan`, `repair layer`, `repair grid`, `repair export` and `repair transfer` run on a small
network and generated images, once undisturbed. Then each is started, killed at a moment drawn
evenly over the time that the undisturbed one took, gone on with (`--resume`; grid and export by the
same command again), killed again, and so on, and at last left to end. Its numbers, tables, maps and
weights have to be those of the undisturbed one, bit for bit; and after each kill every file under a
final name has to be whole: each is parsed to its end. Commands run in forked processes in which the
libraries are loaded already, so that moments fall into the work and not into imports.

    python benchmarks/kill.py [--work local/kill] [--minutes 8]

Chains of kills that were finished are kept; the same command does the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import torch
from PIL import Image
from results_file import configuration, print_table, write_results
from safetensors.torch import load_file

import audit.cli
import audit.scan
import repair.cli
import repair.grid
import repair.layer

IMAGES = 400
KILLS_A_CHAIN = 4
# At least so many of each command.
KILLS = {"scan": 11, "layer": 8, "grid": 4, "export": 7, "transfer": 4}
SOURCES = {"layer": "scan", "grid": "scan", "export": "layer"}  # what each starts from
TIMES = {
    "created_utc",
    "finished_utc",
    "timings_s",
    "peak_memory_mib",
    "seconds",
    "command",
    "out",
    "cache",
    "control_caches",
    "importance",
}
"""What may differ: times, memory, the command line and what it calls its file; of a grid, fANOVA's
reading of the order in which its trials came."""

LAYER = "block2_conv1"
GRID = ("--lr", "0.01,0.1", "--lambda", "0.9,0.7", "--epochs", "2", "--name", LAYER)
REPAIR = ("--epochs", "6", "--keep", "last", "--controls", "ce,next-layer", "--name", LAYER)
PROGRESS = "transferred.progress"
TRANSFER = ("--epochs", "6", "--filters", "32")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("local/kill"))
    parser.add_argument("--commands", nargs="+", choices=tuple(KILLS), default=tuple(KILLS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ends_s = time.monotonic() + 60 * options.minutes
    reference = undisturbed(options.work.absolute(), options.commands)
    kept = options.work / "chains.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for what in options.commands:
        wanted = KILLS[what]
        while sum(row["kills"] for row in rows if row["command"] == what) < wanted:
            if time.monotonic() > ends_s:
                print(f"{sum(row['kills'] for row in rows)} kills; run it again for the rest")
                return
            number = sum(row["command"] == what for row in rows)
            row = chain(what, number, options.work.absolute(), reference, options.seed)
            rows.append(row)
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    report(rows, options.seed)


# -------------------------------------------------------------------- commands


def command(what: str, folder: Path, work: Path) -> list[str]:
    """Return what a user would type to start it, or to go on with it."""
    runs = folder / "runs"
    model, images = work / "digits.safetensors", work / "images"
    if what == "scan":
        typed = ["audit", "scan", str(model), "--data", str(images), "--out", str(runs)]
        typed += ["--batch-size", "8"]
        return typed + (["--resume"] if any(runs.glob("*/run.json")) else [])
    if what == "transfer":
        typed = ["repair", "transfer", str(model), "--data", str(images), *TRANSFER]
        typed += ["--out", str(folder / "transferred.pt2")]
        return typed + (["--resume"] if (folder / PROGRESS / "settings.json").exists() else [])
    (run,) = (found.parent for found in runs.glob("*/run.json"))
    if what == "layer":
        begun = any((run / "repairs").glob("*/repair.json"))
        typed = ["repair", "layer", "--run", str(run), *REPAIR]
        return typed + (["--resume"] if begun else [])
    return ["repair", what, "--run", str(run), *(GRID if what == "grid" else ())]


def start(typed: Sequence[str], folder: Path) -> int:
    """Return the process in which the command now runs, its output in `folder/log.txt`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = list(typed)
    code = 1
    try:
        {"audit": audit.cli.main, "repair": repair.cli.main}[typed[0]]()
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float = float("inf")) -> int | None:
    """Return the exit code, None where the process has not ended after so many seconds."""
    ends_s = time.perf_counter() + seconds
    while time.perf_counter() < ends_s:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def finish(typed: Sequence[str], folder: Path) -> float:
    started_s = time.perf_counter()
    if wait(start(typed, folder)) != 0:
        end = (folder / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"`{' '.join(typed)}` failed:\n{end}")
    return time.perf_counter() - started_s


def undisturbed(work: Path, commands: Sequence[str]) -> dict[str, float]:
    """Return the seconds of each command, undisturbed; their results lie in `work/NAME`."""
    done = work / "undisturbed.json"
    found: dict[str, float] = json.loads(done.read_text()) if done.exists() else {}
    if not done.exists():
        # In a process of its own: a network that was trained here could not be trained after a
        # fork.
        code = "import sys, scale; from pathlib import Path; p = Path(sys.argv[1]);"
        code += "scale.trained_model(p / 'digits.safetensors', 0);"
        code += f"scale.drawn_images(p / 'images', {IMAGES}, 0)"
        subprocess.run([sys.executable, "-c", code, work], cwd=Path(__file__).parent, check=True)
    for what in needed(commands):
        if what not in found:
            begin(what, work / what, work)
            found[what] = finish(command(what, work / what, work), work / what)
            done.write_text(json.dumps(found))
    return found


def needed(commands: Sequence[str]) -> list[str]:
    """Return the commands and those whose results they start from, these first."""
    wanted = {*commands, *(SOURCES[what] for what in commands if what in SOURCES)}
    wanted |= {SOURCES[what] for what in wanted if what in SOURCES}
    return [what for what in KILLS if what in wanted]


def begin(what: str, folder: Path, work: Path) -> None:
    """Make the folder that a command starts from: a scan to repair, a repair to export."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if what in SOURCES:
        shutil.copytree(work / SOURCES[what] / "runs", folder / "runs")


def chain(
    what: str, number: int, work: Path, seconds: dict[str, float], seed: int
) -> dict[str, Any]:
    """Kill a command again and again, let it end, and compare."""
    generator = np.random.default_rng([seed, list(KILLS).index(what), number])
    folder = work / f"{what}-{number}"
    begin(what, folder, work)
    moments: list[float] = []
    halves: list[str] = []
    while len(moments) < KILLS_A_CHAIN and not is_complete(what, folder):
        moment_s = generator.uniform(0, seconds[what])
        child = start(command(what, folder, work), folder)
        code = wait(child, moment_s)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            moments.append(round(moment_s, 2))
            halves += damaged_files(folder)
        elif code == 0:
            break  # it was done before the moment came: there is nothing more to kill
        else:
            raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    if len(moments) == KILLS_A_CHAIN and not is_complete(what, folder):
        finish(command(what, folder, work), folder)
    differing = differences(what, folder, work / what)
    halves += damaged_files(folder)
    left = [path for path in folder.rglob("*") if path.is_file() and is_temporary(path)]
    row = {
        "command": what,
        "chain": number,
        "kills": len(moments),
        "moments_s": moments,
        "undisturbed_s": round(seconds[what], 2),
        "differing": differing,
        "half_files": halves,
        "temporary_files_left": len(left),
    }
    if not differing and not halves:
        shutil.rmtree(folder)
    return row


def is_complete(what: str, folder: Path) -> bool:
    """Whether a kill came after the last word was written; there is nothing to resume then."""
    if what == "transfer":
        settings = folder / PROGRESS / "settings.json"
        return (folder / "transferred.pt2").exists() and not settings.exists()
    records = {"scan": "runs/*/run.json", "layer": "runs/*/repairs/*/repair.json"}
    found = list(folder.glob(records[what])) if what in records else []
    return any(json.loads(path.read_text())["status"] == "complete" for path in found)


# -------------------------------------------------------------------- what has to be equal


def differences(what: str, folder: Path, expected: Path) -> list[str]:
    """Return the files that differ from those of the undisturbed command."""
    found, wanted = (outcome(what, place) for place in (folder, expected))
    return sorted(name for name in found | wanted if found.get(name) != wanted.get(name))


def outcome(what: str, folder: Path) -> dict[str, Any]:
    """Return what a command wrote, by file: without times, and arrays by their hash."""
    if what == "transfer":
        written = {one.name: content(one) for one in folder.glob("transferred.*") if one.is_file()}
        written["transferred.pt2"] = weights(folder / "transferred.pt2")
        return written
    # A kill just after a folder was made leaves an empty one.
    (run,) = (found.parent for found in folder.glob("runs/*/run.json"))
    if what == "scan":
        root = run
    elif what == "grid":
        (root,) = (run / "grids").iterdir()
    else:
        (root,) = (found.parent for found in run.glob("repairs/*/repair.json"))
    return {
        path.relative_to(root).as_posix(): content(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and not is_temporary(path) and path.suffix != ".db"
    }


def content(path: Path) -> Any:
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        table = table.drop(columns=[name for name in table if name in TIMES])
        keys = [name for name in ("lr", "lambda") if name in table]  # a grid's trials, in any order
        return (table.sort_values(keys) if keys else table).to_csv(index=False)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: digest(arrays[name].tobytes()) for name in arrays.files}
    return digest(path.read_bytes())


def weights(program: Path) -> dict[str, str]:
    """Return the hash of each tensor of an exported program, whose file has names of its own."""
    state = torch.export.load(program).state_dict
    return {name: digest(value.numpy().tobytes()) for name, value in state.items()}


def plain(document: Any) -> Any:
    """Return a JSON document without times, a grid's trials in the order of their settings.

    An entry that is null says no more than one that is not there.
    """
    if isinstance(document, dict):
        kept = {k: v for k, v in document.items() if k not in TIMES and v is not None}
        return {key: plain(value) for key, value in kept.items()}
    if isinstance(document, list):
        items = [plain(item) for item in document]
        if items and all(isinstance(item, dict) and "lr" in item for item in items):
            items.sort(key=lambda item: (item["lr"], item.get("lambda", 0)))
        return items
    return document


def is_temporary(path: Path) -> bool:
    """Whether a killed command left a file that nobody reads: half written, or a checkpoint."""
    in_progress = path.parent.name in ("progress", PROGRESS)
    return path.name.startswith((".partial-", "state-")) or in_progress


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -------------------------------------------------------------------- whole files


def damaged_files(folder: Path) -> list[str]:
    """Return the files under final names that cannot be read to their end, and why."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(".partial-") or path.suffix not in READERS:
            continue
        try:
            READERS[path.suffix](path)
        except Exception as error:  # whatever a reader raises, the file is not whole
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    return found


def _read_arrays(path: Path) -> None:
    with np.load(path) as arrays:
        for name in arrays.files:
            arrays[name]


def _read_image(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _read_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise ValueError(bad)


def _check_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        (answer,) = database.execute("PRAGMA integrity_check").fetchone()
    if answer != "ok":
        raise ValueError(answer)


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".parquet": pd.read_parquet,
    ".npz": _read_arrays,
    ".png": _read_image,
    ".safetensors": load_file,
    ".toml": lambda path: tomllib.loads(path.read_text()),
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".pt2": _read_zip,
    ".onnx": lambda path: onnx.checker.check_model(onnx.load(path)),
    ".db": _check_database,
}


def report(rows: Sequence[dict[str, Any]], seed: int) -> None:
    by_command = [
        {
            "command": what,
            "chains": len(own),
            "kills": sum(row["kills"] for row in own),
            "differing": sum(bool(row["differing"]) for row in own),
            "half files": sum(len(row["half_files"]) for row in own),
            "temporary files left": sum(row["temporary_files_left"] for row in own),
        }
        for what in KILLS
        if (own := [row for row in rows if row["command"] == what])
    ]
    print_table("Killed at random moments, and gone on with", by_command)
    summary = {
        "kills": sum(row["kills"] for row in rows),
        "mismatches": sum(bool(row["differing"]) for row in rows),
        "half_files": sum(len(row["half_files"]) for row in rows),
        "chains": len(rows),
        "temporary_files_left": sum(row["temporary_files_left"] for row in rows),
    }
    config = configuration("cpu", "optuna", "onnx", seed=seed, images=IMAGES, cores=os.cpu_count())
    print(write_results("kill", summary=summary, config=config, rows=rows))


if __name__ == "__main__":
    main()
