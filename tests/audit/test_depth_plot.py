"""Marks stand where the numbers say, whatever the number of layers."""

from __future__ import annotations

import itertools
import math

import pytest

from audit.depth_plot import HEIGHT, TOP, DepthRow, Scores, depth_plot

NAN = float("nan")


def _rows(*values: float, half: float = 0.1, flagged: tuple[int, ...] = ()) -> list[DepthRow]:
    return [
        DepthRow(
            label=f"blocks.{place}.conv",
            said=f"layer {place}",
            value=value,
            low=value - half,
            high=value + half,
            tone="flagged" if place in flagged else "other",
        )
        for place, value in enumerate(values)
    ]


def test_marks_and_intervals_stand_at_their_values_by_hand() -> None:
    # The axis goes from -0.1 to 0.9: 0.8 lies a tenth below its top.
    plot = depth_plot(_rows(0.0, 0.8, 0.4, 0.3), limit=0.1)
    assert [mark.x for mark in plot.marks] == [12.5, 37.5, 62.5, 87.5]
    best = plot.marks[1]
    assert best.y == pytest.approx(TOP + 0.1 * HEIGHT, abs=0.06)
    assert best.high == TOP
    assert best.low == pytest.approx(TOP + 0.2 * HEIGHT, abs=0.06)
    assert plot.zero == pytest.approx(TOP + 0.9 * HEIGHT, abs=0.06)
    assert plot.limit == pytest.approx(TOP + 0.8 * HEIGHT, abs=0.06)
    assert not plot.cut


def test_a_trial_that_ruined_the_network_does_not_flatten_the_others() -> None:
    plot = depth_plot(_rows(-11.0, 0.4, 0.2))
    ruined, best, _ = plot.marks
    assert plot.cut and ruined.cut and not best.cut
    assert ruined.y == plot.bottom
    assert best.y is not None and plot.zero - best.y > HEIGHT / 3


def test_a_layer_without_an_estimate_has_a_place_and_no_mark() -> None:
    plot = depth_plot(_rows(NAN, 0.4))
    assert (plot.marks[0].y, plot.marks[0].low, plot.marks[0].high) == (None, None, None)
    assert plot.marks[0].label == "blocks.0.conv"
    assert depth_plot(_rows(NAN, NAN)).marks[0].y is None


def test_small_panels_stand_beneath_one_another_and_reach_from_their_reference() -> None:
    scores = [
        Scores(heading="norm", values=[1.0, 4.0, NAN]),
        Scores(
            heading="auroc",
            values=[0.5, 0.7, 0.4],
            lows=[0.4, 0.6, 0.3],
            highs=[0.6, 0.8, 0.5],
            reference=0.5,
        ),
    ]
    plot = depth_plot(_rows(0.1, 0.2, 0.3), scores)
    norm, auroc = plot.panels
    assert plot.bottom < norm.top < norm.bottom < auroc.top < auroc.bottom < plot.labels_at
    assert norm.reference == norm.bottom
    assert [score.y for score in norm.scores] == [norm.bottom - 10, norm.top]  # 40 pixels high
    # From 0.3 to 0.8: the reference lies two fifths up.
    assert auroc.reference == pytest.approx(auroc.bottom - 16, abs=0.06)
    assert auroc.scores[1].y == pytest.approx(auroc.bottom - 32, abs=0.06)
    assert auroc.scores[1].high == auroc.top and auroc.scores[2].low == auroc.bottom


@pytest.mark.parametrize("layers", [1, 5, 16, 55, 56, 100, 200])
def test_labels_never_run_into_each_other_and_the_flagged_ones_come_first(layers: int) -> None:
    worst = 2 * layers // 3
    plot = depth_plot(_rows(*[0.1] * layers, flagged=(worst,)))
    pitch = plot.least_width / layers
    places = [place for place, mark in enumerate(plot.marks) if mark.label]
    gaps = [pitch * (two - one) for one, two in itertools.pairwise(places)]
    assert worst in places
    assert all(gap >= 13 for gap in gaps)
    if layers <= 55:
        assert len(places) == layers
    assert plot.least_width <= 830  # what the page of a desktop has room for
    assert all(0 < mark.x < 100 for mark in plot.marks)
    assert plot.radius * 2 <= max(pitch, 9)


def test_long_names_keep_both_ends() -> None:
    (row,) = _rows(0.1)
    name = "backbone.stage3.layers.17.mlp.fc1"
    long = DepthRow(**{**vars(row), "label": name})
    (mark,) = depth_plot([long]).marks
    assert len(mark.label) <= 26 and math.isclose(mark.x, 50)
    start, end = mark.label.split("\N{HORIZONTAL ELLIPSIS}")
    assert name.startswith(start) and name.endswith(end)
