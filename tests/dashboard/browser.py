"""A dashboard under way and a Chromium that looks at it, for tests in a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

TIMEOUT_MS = 120_000  # on a machine that has much else to do
PROJECT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
# A page that is opened by its own address asks below that first, and is told 404 by Streamlit.
PROBE = re.compile(r"^http://localhost:\d+/\w+/_stcore/(health|host-config)$")
LOCAL = ("http://localhost:", "ws://localhost:", "data:", "blob:")


def find_browser() -> str:
    """Return the Chromium of this machine; the test fails where there is none."""
    named = os.environ.get("LAYERMEND_BROWSER")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(
            "no Chromium found: apt-get install chromium (scripts/test does it as root), "
            "or name another one with LAYERMEND_BROWSER"
        )
    return found


@contextlib.contextmanager
def served(runs: Path) -> Iterator[str]:
    """Run the dashboard on a folder of runs while the block lasts; yield its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dashboard", str(runs), "--port", str(port)]
    with subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            for _ in range(300):
                with contextlib.suppress(URLError, OSError):
                    urlopen(f"http://localhost:{port}/_stcore/health", timeout=5).close()
                    break
                time.sleep(0.2)
            yield f"http://localhost:{port}"
        finally:
            server.terminate()
            server.wait(timeout=20)


class Visitor:
    """A tab that writes down what a page must never do."""

    def __init__(self, context: Any) -> None:
        self.tab = context.new_page()
        self.tab.set_default_timeout(TIMEOUT_MS)
        self.problems: list[str] = []
        self.tab.on("dialog", self._on_dialog)
        self.tab.on("request", self._on_request)
        self.tab.on("requestfailed", self._on_failure)
        self.tab.on("response", self._on_response)
        self.tab.on("console", self._on_console)
        self.tab.on("pageerror", lambda error: self.problems.append(f"a script failed: {error}"))

    def open(self, url: str) -> None:
        self.tab.goto(url)
        self.wait()

    def wait(self) -> None:
        """Wait until there is something of ours on the page and its script is done."""
        block = '[data-testid="stMainBlockContainer"] .lm'
        self.tab.wait_for_selector(block, state="attached")
        self.tab.wait_for_function(
            "() => document.querySelector('[data-testid=\"stApp\"]')"
            "?.getAttribute('data-test-script-state') === 'notRunning'"
        )
        assert not self.tab.locator('[data-testid="stException"]').count()

    def go(self, page: str) -> None:
        """Follow the navigation to a page."""
        self.tab.get_by_role("link", name=page, exact=True).first.click()
        self.tab.wait_for_url(f"**/{page.lower()}**")
        self.wait()

    def see(self, text: str | re.Pattern[str], timeout_ms: float = TIMEOUT_MS) -> None:
        self.tab.get_by_text(text).first.wait_for(timeout=timeout_ms)

    def choose(self, label: str, option: str) -> None:
        self.tab.get_by_label(label, exact=True).first.click()
        self.tab.get_by_role("option", name=option, exact=True).click()
        self.wait()

    def titles(self) -> list[str]:
        """Return the names of the images that are shown."""
        found = self.tab.locator(".lm-card h4 span[title]")
        return [str(title) for title in found.evaluate_all("all => all.map(one => one.title)")]

    def _on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(LOCAL):
            self.problems.append(f"a request to {request.url}")

    def _on_failure(self, request: Any) -> None:
        # What a page still waits for is dropped when another one is opened; a download is no page.
        if request.failure != "net::ERR_ABORTED":
            self.problems.append(f"a request to {request.url} failed: {request.failure}")

    def _on_response(self, response: Any) -> None:
        if response.status >= 400 and not PROBE.search(response.url):
            self.problems.append(f"{response.url} answered {response.status}")

    def _on_console(self, message: Any) -> None:
        if message.type == "error" and not PROBE.search(message.location.get("url", "")):
            self.problems.append(f"the console: {message.text}")


@contextlib.contextmanager
def browsing() -> Iterator[Visitor]:
    """Yield a tab of a Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        context = browser.new_context(viewport={"width": 1440, "height": 1000})
        try:
            yield Visitor(context)
        finally:
            context.close()
            browser.close()


@contextlib.contextmanager
def visiting() -> Iterator[Visitor]:
    """Yield a tab as `browsing` does; fail on what a page must never do."""
    with browsing() as visitor:
        yield visitor
    assert visitor.problems == []
