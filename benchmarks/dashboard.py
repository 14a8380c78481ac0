"""How long a reviewer waits for the dashboard: runs of 1,000 and of 20,000 images, in Chromium.

Each run is made up (`tests/run_builder.py`) with a repair of it; a server is started on it. Every
visit is a new browser window without a cache. First paint: from the address to the verdict on the
overview, or to the first cards among the images. Filter: from the choice to the cards that pass.
The first visit to a fresh server is told apart. Beside the seconds on the clock stand those of the
server's processor, which say more on a busy machine.

    PYTHONPATH=. python benchmarks/dashboard.py [--browser /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from results_file import configuration, print_table, write_results

from scripts.served_dashboard import served
from tests.run_builder import build_run

SIZES = (1_000, 20_000)
VISITS = 7
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
VERDICT = "h1.lm-headline"
CARDS = "article.lm-card img.heat"


class Server:
    """A dashboard under way: its address, and what its process has used."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self.process, self.address = process, address

    @property
    def processor_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def measured(server: Server, action: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds that an action takes, on the clock and of the server's processor."""
    started_s, processor_s = time.perf_counter(), server.processor_s
    action()
    seconds = time.perf_counter() - started_s
    return {"seconds": seconds, "processor_s": server.processor_s - processor_s}


def open_page(page: Page, url: str, awaited: str) -> None:
    page.goto(url, wait_until="commit")
    page.wait_for_selector(awaited, timeout=120_000)


def filters(page: Page) -> dict[str, Callable[[], None]]:
    """Return choices on the page of the images, each with the wait for what it brings."""

    def counted(act: Callable[[], None]) -> Callable[[], None]:
        def choose() -> None:
            caption = page.locator('[data-testid="stCaptionContainer"]').first
            before = caption.inner_text()
            act()
            page.wait_for_function(
                "before => { const told = document.querySelector("
                "'[data-testid=\"stCaptionContainer\"]'); "
                "return told && told.innerText !== before; }",
                arg=before,
                timeout=60_000,
            )

        return choose

    def pick(label: str, option: str) -> Callable[[], None]:
        def act() -> None:
            page.get_by_role("option", name=option, exact=True).click()

        def choose() -> None:
            counted(act)()

        choose.opening = lambda: page.get_by_label(label, exact=True).click()  # type: ignore[attr-defined]
        return choose

    search = page.get_by_label("Search", exact=True)
    # Each one changes how many images pass, and none leaves no image.
    return {
        "case 3": pick("Case", "Case 3"),
        "search": counted(lambda: search.fill("00")),
        "all cases": pick("Case", "All"),
        "wrong": pick("Outcome", "Wrong"),
    }


def visit(browser: Any, server: Server, size: int, number: int) -> list[dict[str, Any]]:
    """Open both pages and filter, each in a window of its own; return what it took."""
    rows = []
    for what, url, awaited in (
        ("overview", server.address, VERDICT),
        ("images", f"{server.address}/images", CARDS),
    ):
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        took = measured(server, lambda page=page, url=url, a=awaited: open_page(page, url, a))  # type: ignore[misc]
        rows.append({"images": size, "visit": number, "what": f"first paint, {what}", **took})
        if what == "images":
            page.wait_for_timeout(500)
            for name, choose in filters(page).items():
                opening = getattr(choose, "opening", None)
                if opening is not None:
                    opening()  # the list of choices; the wait counts from the choice
                took = measured(server, choose)
                rows.append({"images": size, "visit": number, "what": f"filter, {name}", **took})
                page.wait_for_timeout(200)
        context.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--visits", type=int, default=VISITS)
    parser.add_argument("--browser", default=shutil.which("chromium") or "/usr/bin/chromium")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    memory: dict[int, float] = {}
    load = os.getloadavg()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=FLAGS)
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                build_run(Path(folder), repairs=("accepted",), images=size)
                with served(Path(folder)) as (address, process):
                    server = Server(process, address)
                    for number in range(options.visits):
                        rows += visit(browser, server, size, number)
                    memory[size] = server.memory_mib
        browser.close()
    table = [
        _row(rows, size, what) for size in SIZES for what in dict.fromkeys(r["what"] for r in rows)
    ]
    print_table("The dashboard in Chromium, seconds", table)
    summary = {}
    for size in SIZES:
        mine = [row for row in table if row["images"] == size]
        paints = [row for row in mine if row["what"].startswith("first paint")]
        chosen = [row for row in mine if row["what"].startswith("filter")]
        summary |= {
            f"first_paint_s_{size}": max(row["median_s"] for row in paints),
            f"first_paint_first_visit_s_{size}": max(row["first_visit_s"] for row in paints),
            f"filter_s_{size}": max(row["median_s"] for row in chosen),
            f"filter_processor_s_{size}": max(row["processor_median_s"] for row in chosen),
            f"server_memory_mib_{size}": memory[size],
        }
    config = configuration(
        "cpu", "streamlit", "pyarrow", "playwright", visits=options.visits, load_average=load,
        cores=os.cpu_count(), window=[1440, 900], seed=0,
    )  # fmt: skip
    print(write_results("dashboard", summary=summary, config=config, rows=rows))


def _row(rows: list[dict[str, Any]], size: int, what: str) -> dict[str, Any]:
    """Return the median over all visits but the first, which stands beside it."""
    mine = [row for row in rows if row["images"] == size and row["what"] == what]
    later = [row for row in mine if row["visit"] > 0]
    return {
        "images": size,
        "what": what,
        "median_s": statistics.median(row["seconds"] for row in later),
        "min_s": min(row["seconds"] for row in later),
        "max_s": max(row["seconds"] for row in later),
        "processor_median_s": statistics.median(row["processor_s"] for row in later),
        "first_visit_s": mine[0]["seconds"],
    }


if __name__ == "__main__":
    main()
