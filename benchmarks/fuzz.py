"""Mutated models, images and run folders: nothing runs, nothing hangs, nothing ends in a traceback.

Each case is built from its seed, read as the commands read it, and ends `right`, refused by one
clear `line`, or in what must not happen. Cases run in child processes, so that a crash or an
endless loop below Python ends one case and is counted; a sample of each family goes through the
real command line, too.

    python -m benchmarks.fuzz                     # 2,090 models, 2,100 images, 550 runs
    python -m benchmarks.fuzz --only runs         # one family; results once all three are there
    python -m benchmarks.fuzz case models archive.pt 17   # one case, with its traceback
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from audit.files import read_json, write_json
from benchmarks.results_file import configuration, print_table, write_results
from tests.fuzzing import (
    BLOCKED_S,
    HANG_S,
    IMAGE_KINDS,
    MODEL_KINDS,
    RUN_KINDS,
    Outcome,
    image_case,
    image_seeds,
    model_case,
    model_seeds,
    run_case,
    run_seed,
    watch_for_code,
)

KINDS = {"models": MODEL_KINDS, "images": IMAGE_KINDS, "runs": RUN_KINDS}
COUNTS = {"models": 2090, "images": 2100, "runs": 550}
FIRST_SEED = 1000
PARTS = Path(__file__).parents[1] / "local"  # families that are finished
SAMPLE = 12  # of each family through the command line
EXAMPLES = 3  # lines kept of each kind
MEMORY_GIB = 4  # that a child may take beyond what it starts with
GRACE_S = BLOCKED_S + 20.0  # a child that says nothing for so long is stuck below Python
Case = tuple[str, str, int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", nargs="*", metavar="case FAMILY KIND SEED")
    parser.add_argument("--only", choices=KINDS)
    for family, count in COUNTS.items():
        parser.add_argument(f"--{family}", type=int, default=count)
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--minutes", type=float, default=600, help="stop then; call again to go on")
    parser.add_argument("--again", action="store_true", help="read what ended wrongly once more")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        if given.case:
            _, family, kind, seed = given.case
            _show_one(folder, (family, kind, int(seed)))
            return
        deadline_s = time.monotonic() + 60 * given.minutes
        parts = []
        for family in KINDS:
            part = _kept(family, given)
            if given.only in (None, family) and not part["finished"]:
                _go_on(part, family, given, folder, deadline_s)
            parts.append(part)
    outcomes = [Outcome(**one) for part in parts for one in part["outcomes"]]
    wall = {part["family"]: part["seconds"] for part in parts}
    again = sum(part.get("again", 0) for part in parts)
    _report(outcomes, wall, again, write=all(part["finished"] for part in parts))


def _go_on(
    part: dict[str, Any], family: str, given: argparse.Namespace, folder: Path, deadline_s: float
) -> None:
    """Add outcomes to a family's, until all are there or the time is over; keep them."""
    started_s, before_s = time.monotonic(), part["seconds"]
    cases = _cases(family, getattr(given, family))
    sample = cases[:: max(1, len(cases) // max(1, given.sample))][: given.sample]
    known = {(one["kind"], one["seed"]) for one in part["outcomes"]}

    def keep() -> None:
        part["seconds"] = round(before_s + time.monotonic() - started_s, 1)
        write_json(PARTS / f"fuzz-{family}.json", part)

    for outcome in chain(
        _run_family(family, [c for c in cases if c[1:] not in known], folder, given.verbose),
        _through_commands(
            family, [c for c in sample if (f"{c[1]}, command", c[2]) not in known], folder
        ),
    ):
        part["outcomes"].append(asdict(outcome))
        if len(part["outcomes"]) % 50 == 0:
            keep()
        if time.monotonic() > deadline_s:
            break
    part["finished"] = len(part["outcomes"]) == len(cases) + len(sample)
    keep()


def _kept(family: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return what earlier calls left of a family, nothing where they were asked for other cases."""
    path = PARTS / f"fuzz-{family}.json"
    asked = [getattr(given, family), given.sample, FIRST_SEED]
    if path.is_file() and (part := read_json(path))["asked"] == asked:
        if given.again:
            harmless = [one for one in part["outcomes"] if one["ending"] in ("right", "line")]
            part["again"] = part.get("again", 0) + len(part["outcomes"]) - len(harmless)
            part["outcomes"] = harmless
            part["finished"] = part["finished"] and not part["again"]
        return part
    return {"family": family, "asked": asked, "finished": False, "seconds": 0.0, "outcomes": []}


def _cases(family: str, count: int) -> list[Case]:
    kinds = KINDS[family]
    return [(family, kinds[i % len(kinds)], FIRST_SEED + i // len(kinds)) for i in range(count)]


# ------------------------------------------------------------------------- in child processes


def _run_family(family: str, cases: list[Case], folder: Path, verbose: bool) -> Iterator[Outcome]:
    """Yield the outcome of every case; a child that dies or hangs is replaced."""
    context = multiprocessing.get_context("fork")  # torch is there at once
    waiting = list(cases)
    done = 0
    suspected: Case | None = None
    while waiting:
        here, there = context.Pipe()
        child = context.Process(target=_work, args=(family, waiting, str(folder), there))
        child.start()
        there.close()
        try:
            for outcome in _until_silent(here, child, waiting):
                if outcome.ending == "hang" and suspected != waiting[0]:
                    # The machine may have been busy: once more, in a new child.
                    suspected = waiting[0]
                    break
                done += 1
                waiting.pop(0)
                if verbose or outcome.ending not in ("right", "line"):
                    print(f"  {outcome}", file=sys.stderr)
                if done % 200 == 0:
                    print(f"{family}: {done} of {len(cases)}", file=sys.stderr)
                yield outcome
        finally:  # also where whoever asked has heard enough
            child.kill()
            child.join()


def _until_silent(
    pipe: multiprocessing.connection.Connection, child: Any, waiting: list[Case]
) -> Iterator[Outcome]:
    limit_s = 120.0  # the first answer comes after torch was imported
    while waiting:
        family, kind, seed = waiting[0]
        if not pipe.poll(limit_s):
            yield _lost(family, kind, seed, "hang", f"silent for {limit_s:g} s")
            return
        try:
            answer = pipe.recv()
            if not isinstance(answer, Outcome):
                raise RuntimeError(f"{waiting[0]}: {answer}")
            yield answer
        except EOFError:
            child.join()
            yield _lost(family, kind, seed, "traceback", f"the process died with {child.exitcode}")
            return
        limit_s = GRACE_S


def _lost(family: str, kind: str, seed: int, ending: Any, detail: str) -> Outcome:
    return Outcome(
        family=family, kind=kind, seed=seed, ending=ending, seconds=HANG_S, detail=detail
    )


def _work(
    family: str, cases: list[Case], folder: str, pipe: multiprocessing.connection.Connection
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # threads do not come along into a forked process
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libraries below Python talk there
    try:
        run = _runner(family, Path(folder))
        _limit_memory()
        watch_for_code()
        for case in cases:
            outcome = run(case)
            pipe.send(replace(outcome, detail=_without_folders(outcome.detail)))
    except Exception as error:  # this script's own; what a case raises is its outcome
        pipe.send(f"{type(error).__name__}: {error}")


def _without_folders(text: str) -> str:
    """Return the text without the folders that a case was made in, which only this call had."""
    return re.sub(r"[^\s:'(]*/fuzz-[^/\s]+/tmp[^/\s]+/", "", text)


def _runner(family: str, folder: Path) -> Callable[[Case], Outcome]:
    # The run that others are mutated from is kept, too: it takes longest to make.
    seeds = (PARTS if family == "runs" else folder) / f"fuzz-{family}-seeds"
    seeds.mkdir(exist_ok=True, parents=True)
    made: Any
    if family == "models":
        made, make = model_seeds(seeds), model_case
    elif family == "images":
        made, make = image_seeds(), image_case
    else:
        if not (seeds / "finished").exists():
            shutil.rmtree(seeds)
            seeds.mkdir()
            run_seed(seeds)
            (seeds / "finished").touch()
        runs = sorted((seeds / "runs").iterdir())
        made, make = runs[0], run_case

    def run(case: Case) -> Outcome:
        _, kind, seed = case
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            return make(made, kind, seed, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    return run


def _limit_memory() -> None:
    """Let a bomb fail in this process, not in the machine."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_GIB * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _show_one(folder: Path, case: Case) -> None:
    import tests.fuzzing

    real = tests.fuzzing.observe

    def observe(family: str, kind: str, seed: int, canary: Path, read: Any) -> Outcome:
        outcome = real(family, kind, seed, canary, read)
        print(outcome)
        if outcome.ending == "traceback":
            read()
        return outcome

    tests.fuzzing.observe = observe
    _runner(case[0], folder)(case)


# ------------------------------------------------------------------------- through the commands


def _through_commands(family: str, cases: list[Case], folder: Path) -> Iterator[Outcome]:
    """Yield the outcome of cases that a command of its own process read."""
    import tests.fuzzing

    run = _runner(family, folder)
    real = tests.fuzzing.observe

    def observe(family: str, kind: str, seed: int, canary: Path, read: Any) -> Outcome:
        del read
        return _by_command(family, kind, seed, canary)

    tests.fuzzing.observe = observe
    try:
        for case in cases:
            yield run(case)
    finally:
        tests.fuzzing.observe = real


def _by_command(family: str, kind: str, seed: int, canary: Path) -> Outcome:
    folder = canary.parent
    commands = {
        "models": [
            "audit",
            "layers",
            *(str(p) for p in folder.glob("model.p*")),
            *_classes(folder),
        ],
        "images": ["audit", "scan", "torchvision:none", "--data", str(folder / "photos")],
        "runs": ["audit", "report" if seed % 2 else "gate", *map(str, _stamped(folder))],
    }
    command = commands[family]
    if family == "models" and len(command) < 3:
        command = ["audit", "layers", *(str(p) for p in folder.glob("model.s*"))]
    if family == "images":
        command[2] = str(_scannable(folder))
    if command[1] == "gate":
        command += ["--min-accuracy", "0.1", "--no-flag"]
    started_s = time.monotonic()
    ending: Any = "right"
    try:
        finished = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            timeout=120,
            check=False,
            cwd=folder,
        )
    except subprocess.TimeoutExpired:
        return _lost(family, f"{kind}, command", seed, "hang", "120 s")
    told = finished.stderr.decode("utf-8", "replace").strip()
    last = told.splitlines()[-1] if told else ""
    if finished.returncode not in (0, 3):
        ending = "line"
    if "Traceback" in told or "internal error" in told or finished.returncode not in (0, 1, 2, 3):
        ending = "traceback"
    if ending == "line" and not (last.startswith("error: ") and last.isprintable()):
        ending = "traceback"
    if canary.exists():
        ending = "code run"
    return Outcome(
        family=family,
        kind=f"{kind}, command",
        seed=seed,
        ending=ending,
        seconds=time.monotonic() - started_s,
        detail=_without_folders(last)[:400],
    )


def _classes(folder: Path) -> list[str]:
    path = folder / "classes.txt"
    return ["--classes", str(path)] if path.exists() else []


def _stamped(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name[:2] == "20"]


def _scannable(folder: Path) -> Path:
    """Return a model for the photos of an image case."""
    seeds = model_seeds(folder)
    (folder / "state.toml").write_text(seeds.card)
    return folder / "state.pt"


# ------------------------------------------------------------------------- figures


def _report(outcomes: list[Outcome], wall: dict[str, float], again: int, *, write: bool) -> None:
    rows = []
    for family, kinds in KINDS.items():
        for kind in (*kinds, *(f"{kind}, command" for kind in kinds)):
            found = [one for one in outcomes if (one.family, one.kind) == (family, kind)]
            if found:
                endings = Counter(one.ending for one in found)
                rows.append(
                    {
                        "family": family,
                        "kind": kind,
                        "inputs": len(found),
                        "right": endings["right"],
                        "one line": endings["line"],
                        "tracebacks": endings["traceback"],
                        "hangs": endings["hang"],
                        "code runs": endings["code run"],
                        "longest s": round(max(one.seconds for one in found), 2),
                    }
                )
    endings = Counter(one.ending for one in outcomes)
    summary = {
        "inputs": len(outcomes),
        "tracebacks": endings["traceback"],
        "hangs": endings["hang"],
        "code_runs": endings["code run"],
        "right": endings["right"],
        "one_line": endings["line"],
        **{f"{family}_inputs": sum(o.family == family for o in outcomes) for family in KINDS},
        "longest_s": round(max(o.seconds for o in outcomes if not o.kind.endswith("command")), 2),
    }
    if not rows:
        return
    print_table("mutated files", rows)
    print(summary)
    if not write:
        return
    examples = []
    for row in rows:
        lines = (o for o in outcomes if (o.family, o.kind) == (row["family"], row["kind"]))
        kept = [asdict(one) for one in lines if one.ending == "line"][:EXAMPLES]
        examples.append(
            {**row, "examples": [{k: one[k] for k in ("seed", "detail")} for one in kept]}
        )
    wrong = [asdict(one) for one in outcomes if one.ending not in ("right", "line")]
    config = configuration(
        "cpu",
        "pillow",
        "pyarrow",
        "safetensors",
        first_seed=FIRST_SEED,
        hang_processor_s=HANG_S,
        hang_blocked_s=BLOCKED_S,
        wall_s=wall,
        read_again_after_a_fix=again,
    )
    for path in PARTS.glob("fuzz-*.json"):
        path.unlink()
    shutil.rmtree(PARTS / "fuzz-runs-seeds", ignore_errors=True)
    write_results("fuzz", summary=summary, config=config, rows=[*examples, *wrong])


if __name__ == "__main__":
    main()
