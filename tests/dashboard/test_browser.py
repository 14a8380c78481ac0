"""A whole review in a real browser, of a network that was really scanned and repaired.

From the verdict through cases and images to a model exported by a click and votes that are read
(`review_steps`); and names that try to be more than names.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from audit.runs import Run, open_run
from audit.scan import ScanConfig, ScanRequest, scan_model
from repair.config import RepairConfig
from repair.layer import RepairRequest, repair_layer
from tests.dashboard.browser import served, visiting
from tests.dashboard.review_steps import review
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


def test_a_review_from_the_verdict_to_the_votes_shows_what_the_files_say(
    scanned: Run, tmp_path: Path
) -> None:
    with served(scanned.path) as address, visiting() as visitor:
        steps = list(review(visitor, address, scanned.path, tmp_path))
    assert [step for step in steps if not step.right] == []
    assert {"images of case 3", "Table 3"} < {step.name for step in steps}


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    run = build_run(tmp_path, hostile=True, repairs=("accepted",), images=120)
    with served(run.path) as address, visiting() as visitor:
        visitor.open(f"{address}/images")
        assert any(HOSTILE_NAME in title for title in visitor.titles())
        assert HOSTILE_NAME in visitor.tab.inner_text("body")
        for page in ("layers", "groups", "repair", "cases"):
            visitor.open(f"{address}/{page}")
        assert HOSTILE_CLASS in visitor.tab.inner_text("body")
