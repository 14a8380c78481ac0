"""Take a picture of every dashboard page and of every report under a folder of runs.

    python scripts/screenshots.py runs pictures [--browser /usr/bin/chromium]

Starts the dashboard on a free port, visits each page at 1440 and 420 pixels in light and in dark,
and fails if a page shows an exception, opens a dialog, or asks any other machine for anything.
Needs `pip install playwright` and a Chromium on this machine; neither belongs to layermend.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from served_dashboard import served

from audit.report import write_report
from audit.runs import list_runs

PAGES = {"overview": "", "layers": "layers", "scores": "layers?evidence=every", "cases": "cases",
         "images": "images", "image": "images?view=one", "groups": "groups", "repair": "repair",
         "export": "export", "study": "study_setup", "votes": "study_results"}  # fmt: skip
SIZES = {1440: 900, 420: 860}
SCHEMES = ("light", "dark")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="a run folder or a folder of runs")
    parser.add_argument("pictures", type=Path, help="where the PNG files go")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="the Chromium to use")
    parser.add_argument("--pages", nargs="*", default=list(PAGES), choices=[*PAGES, "report"])
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("screenshots need playwright: pip install playwright", file=sys.stderr)
        return 1
    options.pictures.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with served(options.runs) as (address, _), sync_playwright() as playwright:
        for width, height in SIZES.items():
            for scheme in SCHEMES:
                with visitor(playwright, options.browser, width, height, scheme, problems) as tab:
                    for name in options.pages:
                        if name != "report":
                            target = options.pictures / f"{name}-{width}-{scheme}.png"
                            visit(tab, f"{address}/{PAGES[name]}", target, problems)
                    if "report" in options.pages or options.pages == list(PAGES):
                        shoot_reports(tab, options, f"{width}-{scheme}")
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    return 1 if problems else 0


@contextlib.contextmanager
def visitor(
    playwright: Any, browser: str, width: int, height: int, scheme: str, problems: list[str]
) -> Iterator[Any]:
    """Yield a tab of a browser with an empty profile that writes down what it should not see."""
    with tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=browser,
            args=FLAGS,
            viewport={"width": width, "height": height},
            color_scheme=scheme,
        )
        tab = context.new_page()

        def on_dialog(dialog: Any) -> None:
            problems.append(f"a page opened a dialog: {dialog.message}")
            dialog.dismiss()

        def on_request(request: Any) -> None:
            local = ("http://localhost:", "ws://localhost:", "data:", "blob:", "file:")
            if not request.url.startswith(local):
                problems.append(f"a page asked for {request.url}")

        tab.on("dialog", on_dialog)
        tab.on("request", on_request)
        yield tab
        context.close()


def visit(tab: Any, url: str, target: Path, problems: list[str]) -> None:
    tab.goto(url)
    tab.wait_for_selector('[data-testid="stMainBlockContainer"] .lm', timeout=60_000)
    # Streamlit says when it is done; charts draw a little later.
    tab.wait_for_function(
        "() => document.querySelector('[data-testid=\"stApp\"]')"
        "?.getAttribute('data-test-script-state') === 'notRunning'",
        timeout=60_000,
    )
    tab.wait_for_timeout(1200)
    if tab.locator('[data-testid="stException"]').count():
        problems.append(f"{url} shows an exception")
    # The page scrolls inside its own container: make the window as tall as the content.
    size = tab.viewport_size
    tall = tab.evaluate(
        "() => document.querySelector('[data-testid=\"stMain\"]')?.scrollHeight || 0"
    )
    tab.set_viewport_size({"width": size["width"], "height": max(size["height"], int(tall) + 20)})
    tab.wait_for_timeout(700)
    wide = tab.evaluate("() => document.documentElement.scrollWidth")
    if wide > size["width"]:
        problems.append(f"{url} is {wide} pixels wide in a window of {size['width']}")
    tab.screenshot(path=str(target))
    tab.set_viewport_size(size)


def shoot_reports(tab: Any, options: argparse.Namespace, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for run in list_runs(options.runs):
            page = write_report(run, Path(folder).resolve() / "report.html")
            tab.goto(page.as_uri())
            picture = options.pictures / f"report-{run.name}-{suffix}.png"
            tab.screenshot(path=str(picture), full_page=True)


if __name__ == "__main__":
    sys.exit(main())
