"""Numbers and verdicts in words."""

from __future__ import annotations

import math

import pytest

from audit.wording import (
    byte_size,
    comparison_rows,
    count,
    decision_headline,
    export_headline,
    fixed,
    layer_title,
    model_title,
    moment,
    number,
    p_value,
    percent,
    points,
    proof_rows,
    repair_figures,
    scan_figures,
    span,
    verdict_headline,
)

NBSP, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (percent(0.9375), f"93.8{NBSP}%"),
        (percent(1), f"100.0{NBSP}%"),
        (percent(-0.021), f"{MINUS}2.1{NBSP}%"),
        (percent(-0.00001), f"0.0{NBSP}%"),
        (points(0.125), "+12.5 points"),
        (points(-0.125), f"{MINUS}12.5 points"),
        (number(0.12345), "0.123"),
        (number(1.25e-7), "1.2e-07"),
        (number(0), "0.000"),
        (number(-1.5), f"{MINUS}1.500"),
        (fixed(0.17251), "0.17"),
        (fixed(8.3e-5), "0.00"),
        (fixed(-0.0213), f"{MINUS}0.02"),
        (count(1797, "images"), "1,797 images"),
        (count(1, "images"), "1 image"),
        (count(0, "images"), "0 images"),
        (p_value(0.0311), "p = 0.031"),
        (p_value(1e-9), "p < 0.001"),
        (byte_size(558), "558 bytes"),
        (byte_size(741_203), "723.8 KiB"),
        (byte_size(5 * 2**30), "5.0 GiB"),
        (moment("2026-11-23T20:49:49.123456Z"), "23 Nov 2026, 20:49 UTC"),
        (moment("yesterday"), "yesterday"),
        (span({"value": 0.5, "low": 0.4, "high": 0.61}), f"40.0 to 61.0{NBSP}%"),
        (span({"value": 0.5, "low": -0.04, "high": 0.1}, "points"), f"{MINUS}4.0 to +10.0"),
        (layer_title("features.28", "block5_conv3"), "block5_conv3 (features.28)"),
        (layer_title("fc", "fc"), "fc"),
        (layer_title("fc", None), "fc"),
        (model_title("/home/me/models/vgg.pt"), "vgg.pt"),
        (model_title("C:\\models\\vgg.pt"), "vgg.pt"),
        (model_title("timm:tf_efficientnet_lite0"), "timm:tf_efficientnet_lite0"),
    ],
)
def test_numbers_read_as_expected(said: str, expected: str) -> None:
    assert said == expected


@pytest.mark.parametrize("say", [percent, points, number, fixed, count, p_value, byte_size])
def test_a_number_that_is_not_there_is_never_made_up(say) -> None:  # type: ignore[no-untyped-def]
    assert say(None) == say(math.nan) == "n/a"


def test_verdicts_are_one_sentence() -> None:
    localized = {"verdict": "localized", "layers": ["features.28"]}
    assert verdict_headline(localized, {"features.28": "block5_conv3"}) == (
        "One layer stands out: block5_conv3 (features.28)."
    )
    spread = {"verdict": "spread", "layers": ["a", "b", "c"]}
    assert verdict_headline(spread).startswith("The fault is spread over 3 layers")
    assert verdict_headline({"verdict": "none", "layers": []}).startswith("No layer stands out")
    assert "no verdict" in verdict_headline({"verdict": "localized", "layers": []})


def test_decisions_are_one_sentence() -> None:
    sides = {"before": {"accuracy": {"value": 0.8}}, "after": {"accuracy": {"value": 0.9}}}
    went = f"held-out accuracy went from 80.0{NBSP}% to 90.0{NBSP}%"
    assert decision_headline({"decision": "accepted", **sides}) == f"Repair accepted: {went}."
    assert decision_headline({"decision": "rejected", **sides}).startswith(
        f"Repair rejected: {went}"
    )
    assert decision_headline({"status": "failed", "failure": "it diverged"}) == (
        "The repair failed: it diverged."
    )
    assert "not finished" in decision_headline({"status": "running"})


def test_only_a_passed_proof_is_called_good() -> None:
    assert export_headline(None) == "Not exported yet."
    assert "same top answer" in export_headline({"status": "passed", "images": 3})
    assert "do not ship" in export_headline({"status": "failed", "images": 3})
    assert "do not ship" in export_headline({})


def test_images_that_the_export_answers_otherwise_are_named() -> None:
    rows = dict(proof_rows({"top1_mismatches": ["a/1.png", "b/2.png"]}))
    assert rows["Different top answer"] == "2: a/1.png, b/2.png"
    many = dict(proof_rows({"top1_mismatches": [f"{n}.png" for n in range(40)]}))
    assert many["Different top answer"].startswith("40: 0.png")
    assert many["Different top answer"].endswith("and more")
    assert dict(proof_rows({"top1_mismatches": []}))["Different top answer"] == "0"


def test_empty_documents_make_empty_figures_and_no_errors() -> None:
    for figures in (scan_figures({}), repair_figures({})):
        assert {figure.value for figure in figures} == {"n/a"}
    assert comparison_rows({})[0]["Accuracy"] == "n/a"
    assert dict(proof_rows({}))["SHA-256"] == "n/a"
