"""A whole review in a real browser, of a network that was really scanned and repaired.

From the verdict through cases and images to a model exported by a click; and names that try to be
more than names.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from audit.runs import Run, open_run
from audit.scan import ScanConfig, ScanRequest, scan_model
from repair.config import RepairConfig
from repair.layer import RepairRequest, repair_layer
from tests.dashboard.browser import served, visiting
from tests.run_builder import HOSTILE_CLASS, HOSTILE_NAME, build_run
from tests.shapes import DAMAGED, Shapes


@pytest.fixture(scope="module")
def scanned(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A scan of a network with one damaged layer, and a repair of that layer."""
    out = tmp_path_factory.mktemp("runs")
    request = ScanRequest(model=str(shapes.damaged), data=shapes.photos, out=out)
    run = scan_model(request, ScanConfig(budget_s=5))
    config = RepairConfig(loss="ce", epochs=4, learning_rate=0.02, controls=())
    repair = repair_layer(run, config, RepairRequest(layer=DAMAGED))
    assert repair.decision == "accepted"
    return open_run(run.path)


def test_a_review_from_the_verdict_to_the_exported_model(scanned: Run, tmp_path: Path) -> None:
    repair = scanned.repairs[0]
    images, later = scanned.images, repair.images
    with served(scanned.path) as address, visiting() as visitor:
        tab = visitor.tab
        visitor.open(address)
        after = repair.info["after"]["accuracy"]["value"]
        visitor.see("Repair accepted: held-out accuracy went from")
        assert f"to {100 * after:.1f}\N{NO-BREAK SPACE}%" in tab.inner_text("body")
        for reason in scanned.verdict["reasons"]:
            visitor.see(reason.replace("`", ""))
        visitor.see("Whether to ship it")

        # Cases: a cell opens its images.
        visitor.go("Cases")
        moved = later.dropna(subset=["case_before", "case_after"])
        before, now = (int(moved[name].iloc[0]) for name in ("case_before", "case_after"))
        cell = ((moved["case_before"] == before) & (moved["case_after"] == now)).sum()
        tab.locator(f'.lm-cases a[href*="case_before={before}&case_after={now}"]').click()
        tab.wait_for_url("**/images?**")
        visitor.wait()
        visitor.see(f" of {cell} image")

        # Images: case 3, one by one by the arrow keys, compared.
        visitor.choose("Case before", "All")
        visitor.choose("Case after", "All")
        visitor.choose("Case", "Case 3")
        held = int((images["case"] == 3).sum())
        visitor.see(f" of {held} image")
        visitor.choose("Case", "All")
        tab.get_by_role("radio", name="One by one").or_(
            tab.get_by_role("button", name="One by one")
        ).first.click()
        tab.wait_for_selector(".lm-viewer")
        visitor.see(f"1 of {len(images)} images")
        visitor.wait()
        (first,) = visitor.titles()
        tab.locator(".lm-viewer h4").click()  # out of the choice of views, which has arrow keys too
        tab.keyboard.press("ArrowRight")
        visitor.see(f"2 of {len(images)} images")
        visitor.wait()
        (second,) = visitor.titles()
        assert second != first
        visitor.see("After, Grad-CAM")
        tab.get_by_role("slider", name="Opacity of maps").press("ArrowLeft")
        tab.wait_for_selector('.lm-viewer[style*="0.79"]')
        value = tab.locator(".lm-viewer .lm-cells i").first
        value.hover()
        shown = value.evaluate("cell => getComputedStyle(cell, '::after').content")
        assert re.fullmatch(r'"[01]\.\d\d"', shown)

        # The address shows somebody else the same image.
        assert parse_qs(urlparse(tab.url).query)["image"] == [second]
        visitor.open(tab.url)
        assert visitor.titles() == [second]

        # Export: by a click, proven, downloaded.
        visitor.go("Export")
        tab.get_by_role("button", name="Export to ONNX", exact=True).click()
        visitor.see("Export under way")
        visitor.see("The ONNX model gives the same top answer as the network", 200_000)
        with tab.expect_download() as download:
            tab.get_by_role("button", name=re.compile("^ONNX model")).click()
        download.value.save_as(tmp_path / "model.onnx")
    proof = repair.onnx
    assert proof is not None and proof["status"] == "passed"
    digest = hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    assert digest == proof["sha256"]


def test_two_raters_vote_ten_times_each_and_the_votes_are_read(scanned: Run) -> None:
    with served(scanned.path) as address, visiting() as visitor:
        tab = visitor.tab
        visitor.open(f"{address}/study_setup")
        tab.get_by_label("Raters", exact=True).fill("2")
        tab.keyboard.press("Tab")
        visitor.wait()
        tab.get_by_role("button", name="Set up the study").click()
        visitor.see("Rater 2: http")
        links = re.findall(r"Rater \d: (http\S+)", tab.inner_text("body"))
        assert len(set(links)) == 2
        for link in links:
            visitor.open(link)
            for group in tab.get_by_role("radiogroup").all():
                group.locator("label").first.click()
            tab.get_by_role("button", name="Start").click()
            for votes in range(10):
                visitor.see(f"{votes} of ")
                tab.get_by_test_id("stBaseButton-secondary").first.click()
            visitor.see("10 of ")
        visitor.open(f"{address}/study_results")
        visitor.see("Table 3")
        visitor.open(f"{address}/study_setup")
        visitor.see("20 of ")
        assert "2 of 2" in tab.inner_text("body")  # raters who have begun


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    run = build_run(tmp_path, hostile=True, repairs=("accepted",), images=120)
    with served(run.path) as address, visiting() as visitor:
        visitor.open(f"{address}/images")
        assert any(HOSTILE_NAME in title for title in visitor.titles())
        assert HOSTILE_NAME in visitor.tab.inner_text("body")
        for page in ("layers", "groups", "repair", "cases"):
            visitor.open(f"{address}/{page}")
        assert HOSTILE_CLASS in visitor.tab.inner_text("body")
