"""What the sidebar calls the runs and repairs that one chooses from."""

from pathlib import Path

import pytest

from audit.runs import start_run
from dashboard.selection import _repair_labels


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        ("features.blocks.3.2.conv_pwl", "blocks.3.2.conv_pwl"),
        ("features.28", "features.28"),
        ("a_layer_with_one_very_long_name", "a_layer_with_one_very_long_name"),
    ],
)
def test_a_long_layer_is_cut_at_its_start_so_that_the_decision_is_seen(
    tmp_path: Path, layer: str, shown: str
) -> None:
    repair = start_run(tmp_path, "model").start_repair(layer, {"alias": None})
    repair.finish(decision="accepted")
    assert _repair_labels(repair)[0] == f"{shown}, accepted"
