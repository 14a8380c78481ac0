"""The section on the layers says what the table says, and leaves out what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from audit.layers_section import EVIDENCE, LayersSection, layers_section
from audit.report import appendix, write_report
from audit.runs import RUN_LAYERS, Run, start_run

SPREAD = {
    "verdict": "spread",
    "layers": ["features.2", "features.1"],
    "numbers": {"flag_threshold": 0.1},
}
ALIASES = {"features.2": "block2_conv1"}


def _table(**columns: list[Any]) -> pd.DataFrame:
    """Four layers: the third best, the second tied, the first dropped early, the last not tried."""
    known: dict[str, list[Any]] = {
        "index": [0, 1, 2, 3],
        "name": [f"features.{place}" for place in range(4)],
        "alias": ["", "", "block2_conv1", ""],
        "kind": ["conv2d"] * 4,
        "shape": ["8x3x3x3"] * 4,
        "parameters": [224] * 4,
        "trial_gain": [0.05, 0.38, 0.42, None],
        "trial_gain_low": [0.01, 0.33, 0.372, None],
        "trial_gain_high": [0.09, 0.43, 0.468, None],
        "rank": [3, 2, 1, None],
    }
    return pd.DataFrame({**known, **columns})


def _section(table: pd.DataFrame, verdict: dict[str, Any] = SPREAD) -> LayersSection:
    section = layers_section(table, ALIASES, verdict)
    assert section is not None
    return section


def _plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_layers_are_ranked_and_those_not_tried_come_last() -> None:
    section = _section(_table())
    assert [row.title for row in section.rows] == [
        "1. block2_conv1",
        "2. features.1",
        "3. features.0",
        "features.3",
    ]
    assert [row.flagged for row in section.rows] == [True, True, False, False]
    assert section.rows[0].detail == "features.2, conv2d 8x3x3x3, 224 parameters"
    assert section.rows[1].detail == "conv2d 8x3x3x3, 224 parameters"
    best, untried = section.rows[0].cells[0], section.rows[3].cells[0]
    assert (_plain(best.value), _plain(best.interval)) == ("42.0 %", "37.2 to 46.8 %")
    assert (untried.value, untried.interval) == ("n/a", "")


def test_the_plot_is_in_depth_order_with_the_tied_set_marked() -> None:
    steps = [4, 20, 20, None]
    section = _section(_table(trial_steps=steps))
    assert [mark.tone for mark in section.plot.marks] == ["short", "flagged", "flagged", "untried"]
    assert [tone for tone, _ in section.legend] == ["flagged", "short", "untried"]
    said = [_plain(mark.said) for mark in section.plot.marks]
    assert said[2] == (
        "1. block2_conv1 (features.2): trial gain 42.0 % [37.2 to 46.8 %] after 20 steps"
    )
    assert said[3] == "features.3: not tried"
    assert "largest for block2_conv1" in section.described
    assert section.plot.limit is not None and _plain(section.limit) == "10 %"


def test_nothing_is_dropped_where_all_trials_are_as_long() -> None:
    assert "short" not in {mark.tone for mark in _section(_table()).plot.marks}
    verdict = {"verdict": "none", "layers": []}
    section = _section(_table(trial_steps=[4, 4, 4, None]), verdict)
    assert [mark.tone for mark in section.plot.marks] == ["other"] * 3 + ["untried"]
    assert section.plot.limit is None


def test_columns_that_are_missing_or_null_are_left_out() -> None:
    table = _table(gradient_norm=[1.0, 2.0, None, 4.0], bn_drift=[None] * 4)
    section = _section(table)
    assert [one.column for one in section.columns] == ["trial_gain", "gradient_norm"]
    (panel,) = section.plot.panels
    assert panel.heading == "Gradient norm" and panel.largest == "4.000"
    assert len(panel.scores) == 3  # none for the null
    assert [row.cells[1].value for row in section.rows] == ["n/a", "2.000", "1.000", "4.000"]


@pytest.mark.parametrize("one", EVIDENCE, ids=lambda one: str(one.column))
def test_every_declared_column_is_shown_where_it_is_filled(one: Any) -> None:
    section = _section(_table(**{one.column: [0.25, 0.5, 0.75, None]}))
    (place,) = (n for n, column in enumerate(section.columns) if column is one)
    assert one.explanation.endswith(".")
    cells = [row.cells[place].value for row in section.rows]
    assert cells[-1] == "n/a" and "n/a" not in cells[:-1]
    drawn = [panel.heading.partition(",")[0] for panel in section.plot.panels]
    assert (one.heading in drawn) == one.panel


def test_every_score_of_the_run_folder_is_declared() -> None:
    told = {"index", "name", "alias", "kind", "shape", "parameters", "rank"}
    # What the size of the step was, and of what the AUROC is made, is detail of two others.
    detail = {"trial_step", "map_mean_right", "map_mean_wrong"}
    scores = {name for name in RUN_LAYERS if not name.endswith(("_low", "_high"))} - told - detail
    assert scores <= {one.column for one in EVIDENCE}


def test_an_auroc_has_its_interval_and_its_line_at_chance() -> None:
    auroc = {"map_auroc": [0.6] * 4, "map_auroc_low": [0.5] * 4, "map_auroc_high": [0.7] * 4}
    section = _section(_table(**auroc))
    (panel,) = section.plot.panels
    assert (panel.heading, panel.largest) == ("Map AUROC, line at 0.5", "0.70")
    assert panel.scores[0].low == panel.reference == panel.bottom
    cell = section.rows[0].cells[-1]
    assert (cell.value, cell.interval) == ("0.60", "0.50 to 0.70")


def test_a_table_without_layers_or_trials_is_no_failure() -> None:
    assert layers_section(_table().iloc[:0], {}, {}) is None
    section = _section(_table(trial_gain=[None] * 4), {})
    assert {mark.y for mark in section.plot.marks} == {None}
    assert section.described.endswith("none was tried.")


def test_the_plot_is_drawn_in_the_page_with_what_it_says(tmp_path: Path) -> None:
    run = start_run(tmp_path, "small")
    run.write_layers(_table().astype(object).where(_table().notna(), None).to_dict("list"))
    run.write_verdict({**SPREAD, "reasons": []})
    run.finish()
    page = _plain(write_report(run).read_text(encoding="utf-8"))
    assert page.count('class="lm-mark-flagged"><title>') == 2
    assert "<title>3. features.0: trial gain 5.0 % [1.0 to 9.0 %]</title>" in page
    assert page.count('class="cross"') == 1  # the layer that was not tried
    assert "above the dotted line, 10 %" in " ".join(page.split())


# -------------------------------------------------------------------- how it was made


@pytest.fixture
def run(tmp_path: Path) -> Run:
    record = {
        "command": ["audit", "scan", "my model.pt", "--data", "photos"],
        "config": {"limit": None, "batch_size": 32, "trial": {"steps": 4, "step_sizes": [0.01]}},
        "seed": 7,
        "versions": {"torch": "2.13.0"},
        "device": {"type": "cpu", "threads": 2},
        "model": {"source": "my model.pt", "sha256": "3f" * 32, "classes": ["cat", "dog"]},
        "data": {"fingerprint": "9c" * 32, "images": 1797, "split_notes": ["by content"]},
    }
    run = start_run(tmp_path, "small", record)
    run.finish(timings_s={"evidence": 9.4}, peak_memory_mib=412.5)
    return run


def test_how_a_run_was_made_is_told_in_full(run: Run) -> None:
    repair = run.start_repair(
        "conv", {"command": ["repair", "layer"], "config": {"seed": 3, "lambda": 0.9}}
    )
    repair.finish(model={"source": "x", "sha256_before": "3f", "sha256_after": "a7"})
    told = {
        f"{name}: {key}": value for name, facts in appendix(run, repair) for key, value in facts
    }
    assert told["Scan: command"] == "audit scan 'my model.pt' --data photos"
    assert told["Scan: seed"] == "7"
    assert told["Scan: device"] == "type cpu, threads 2"
    assert told["Scan: versions"] == "torch 2.13.0"
    assert told["Scan: time"] == "evidence 9.4 s"
    assert told["Scan: peak memory"] == "412 MiB"
    assert told["Scan: schema version"] == "1"
    assert told["Scan: started"].endswith("UTC") and told["Scan: finished"].endswith("UTC")
    assert told["Settings of the scan: limit"] == "not set"
    assert told["Settings of the scan: trial.steps"] == "4"
    assert told["Settings of the scan: trial.step_sizes"] == "[0.01]"
    assert told["Network: sha256"] == "3f" * 32
    assert told["Network: classes"] == "2: cat, dog"
    assert told["Images: fingerprint"] == "9c" * 32
    assert told["Images: images"] == "1,797"
    assert told["Images: note on the splits"] == "by content"
    assert told["Repair: seed"] == "3"
    assert (told["Repair: sha256_before"], told["Repair: sha256_after"]) == ("3f", "a7")
    assert told["Settings of the repair: lambda"] == "0.9"


def test_many_classes_are_counted_and_the_first_are_named(run: Run) -> None:
    run.info["model"]["classes"] = [f"class {n}" for n in range(1000)]
    network = dict(dict(appendix(run, None))["Network"])
    assert network["classes"].startswith("1,000: class 0, class 1,")
    assert network["classes"].endswith("class 19, \N{HORIZONTAL ELLIPSIS}")
