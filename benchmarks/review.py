"""A whole review in a real browser: does every page say what the files of a real run say?

Drives Chromium through a run that `journey.py` made: verdict, cases, images of case 3 by the
keyboard, maps before and after, an export by a click whose ONNX file is downloaded and classifies
the held-out photos in onnxruntime, a study with ten votes of each of two raters, and Table 3. Each
step is held against the run's files, read without the code of the pages
(`tests/dashboard/review_steps.py`). Errors in the browser's console and requests that fail are
counted. The review works on a copy; the run stays as it was.

    python benchmarks/review.py local/journey/case-1/runs
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results_file import configuration, print_table, write_results

from audit.runs import newest_run
from tests.dashboard.browser import browsing, served
from tests.dashboard.review_steps import VOTES_EACH, Step, review

SHOWN = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="a folder of runs; the newest one is reviewed")
    run = newest_run(parser.parse_args().runs)
    steps: list[Step] = []
    with tempfile.TemporaryDirectory(prefix="review-") as folder:
        copy = Path(folder) / run.name
        shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns("votes.sqlite*"))
        downloads = Path(folder) / "downloads"
        downloads.mkdir()
        with served(copy) as address, browsing() as visitor:
            for step in review(visitor, address, copy, downloads):
                steps.append(step)
                print(f"{step.seconds:6.1f} s  {_mark(step)}  {step.name}", flush=True)
            browser = visitor.tab.context.browser.version
            problems = list(visitor.problems)
    rows = [as_row(step) for step in steps]
    shown = [
        {**row, "seen": row["seen"][:SHOWN], "expected": row["expected"][:SHOWN]} for row in rows
    ]
    print_table("A review, step by step", shown)
    for problem in problems:
        print(problem)
    config = configuration(
        "cpu",
        *("krippendorff", "onnxruntime", "playwright", "streamlit"),
        browser=browser,
        window=[1440, 1000],
        run={name: run.info[name] for name in ("created_utc", "command")},
        model=run.info["model"]["arch"] or run.info["model"]["source"],
        repaired=run.repairs[0].layer,
        images=run.info["data"]["images"],
        load_average=[round(load, 1) for load in os.getloadavg()],
    )
    print(write_results("review", summary=summarize(steps, problems), config=config, rows=rows))


def summarize(steps: list[Step], problems: list[str]) -> dict[str, float]:
    by_name = {step.name: step for step in steps}
    answers = by_name["held-out images with the recorded answer in onnxruntime"]
    return {
        "steps": len(steps),
        "steps_right": sum(step.right for step in steps),
        "browser_errors": len(problems),
        "images_of_case_3": by_name["images of case 3"].seen,
        "images_stepped_through": len(by_name["stepping on with the arrow key"].seen),
        "onnx_images": answers.expected,
        "onnx_same_answer": answers.seen,
        "votes": sum(len(step.seen) for name, step in by_name.items() if name.endswith("as kept")),
        "votes_expected": 2 * VOTES_EACH,
        "export_s": by_name["exported by a click"].seconds,
        "review_s": round(sum(step.seconds for step in steps), 1),
    }


def as_row(step: Step) -> dict[str, Any]:
    """Return a step as a row of the results; what was seen and expected as text."""
    return {
        "step": step.name,
        "right": str(step.right),
        "seconds": step.seconds,
        "seen": str(step.seen),
        "expected": str(step.expected),
    }


def _mark(step: Step) -> str:
    return "right" if step.right else f"WRONG: {step.seen!r}, expected {step.expected!r}"


if __name__ == "__main__":
    main()
