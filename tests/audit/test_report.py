"""The report is one file that loads nothing, and says what the run folder says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from audit.after_section import CASE_NAMES
from audit.gallery import card
from audit.rendering import part
from audit.report import write_report
from audit.runs import Run
from tests.run_builder import (
    FAULTY,
    HOSTILE_CLASS,
    HOSTILE_NAME,
    SHUFFLED,
    build_all,
    build_run,
)

STATES = ("healthy", "broken", "rejected", "running", "accepted")
# What a browser fetches of its own accord.
FETCHED = ("src", "srcset", "href", "data", "poster", "background", "action")


class Document(HTMLParser):
    """The text, tags and attributes of a page; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.styles = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.styles += data
        else:
            self.text = f"{self.text} {' '.join(data.split())}".strip()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return build_all(tmp_path_factory.mktemp("runs"))


def _report(run: Run, tmp_path: Path) -> Document:
    return Document(write_report(run, tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("state", STATES)
def test_the_report_loads_nothing_from_anywhere(
    runs: dict[str, Run], tmp_path: Path, state: str
) -> None:
    document = _report(runs[state], tmp_path)
    tags = {tag for tag, _ in document.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in document.tags:
        for name in set(attributes) & set(FETCHED):
            assert str(attributes[name]).startswith("data:image/"), attributes[name]
        assert "url(" not in (attributes.get("style") or "")
    assert "url(" not in document.styles and "@import" not in document.styles


def test_numbers_in_the_report_are_those_of_the_run(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["accepted"]
    repair = run.repairs[0]
    text = _report(run, tmp_path).text.replace("\N{NO-BREAK SPACE}", " ")
    scan = run.info["metrics"]["all"]
    for interval in (scan["accuracy"], repair.info["before"]["accuracy"], scan["recall"]):
        assert f"{100 * interval['value']:.1f} %" in text
        assert f"95 %: {100 * interval['low']:.1f} to {100 * interval['high']:.1f} %" in text
    for row in run.layers.to_dict("records"):
        assert f"{row['rank']}. {row['alias']}" in text
        assert f"{100 * row['trial_gain']:.1f} %".replace("-", "\N{MINUS SIGN}") in text
    control = repair.info["controls"][0]
    assert f"{100 * control['after']['accuracy']['value']:.1f} %" in text
    assert f"{repair.info['difference']['mcnemar']['fixed']} fixed" in text
    assert str(repair.onnx and repair.onnx["sha256"]) in text
    for reason in run.verdict["reasons"] + repair.info["reasons"]:
        assert reason in text
    assert "truncated after 512 bytes" in text


def test_a_penalty_that_did_no_good_is_said_in_the_first_lines(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    text = _report(runs["rejected"], tmp_path).text
    said = text.index("The penalty did no better than plain cross entropy")
    assert said < text.index("Layers, from input to output")
    assert text.count(SHUFFLED) == 1
    assert text.index("Did the penalty earn its place?") < text.index(SHUFFLED)


def test_every_gallery_image_has_its_maps_before_and_after(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    document = _report(runs["accepted"], tmp_path)
    entries = runs["accepted"].repairs[0].gallery["images"]
    pictures = [attributes["src"] for tag, attributes in document.tags if tag == "img"]
    shown = min(12, len(entries))
    repaired = runs["accepted"].repairs[0]
    for place in range(shown):
        whole, before, after = card(repaired, place, "gradcam", FAULTY).pictures
        assert pictures.count(whole.uri) == 3  # alone, and beneath the map before and after
        assert before.heat in pictures and after.heat in pictures and before.heat != after.heat
    for entry in entries[:12]:
        assert entry["path"] in document.text


def test_damaged_parts_are_named_and_the_rest_is_shown(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    text = _report(runs["broken"], tmp_path).text
    assert "layers.parquet is damaged" in text
    assert "verdict.json is damaged" in text
    assert "Accuracy" in text and "Versions".lower() in text


def test_a_running_scan_is_reported_as_unfinished(runs: dict[str, Run], tmp_path: Path) -> None:
    assert "has not finished" in _report(runs["running"], tmp_path).text


def test_hostile_names_are_text_in_the_report(tmp_path: Path) -> None:
    run = build_run(tmp_path / "runs", hostile=True, repairs=("accepted",))
    document = _report(run, tmp_path)
    assert HOSTILE_NAME in document.text
    assert HOSTILE_CLASS in document.text
    assert "alert" not in {tag for tag, _ in document.tags}
    for _, attributes in document.tags:
        assert not [name for name in attributes if name.startswith("on")]


def test_the_report_lies_in_the_run_folder_unless_told_otherwise(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    assert write_report(runs["healthy"]) == runs["healthy"].path / "report.html"
    assert write_report(runs["healthy"], tmp_path / "a" / "b.html").is_file()


def test_the_report_reads_on_paper_on_a_phone_and_in_the_dark(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    document = _report(runs["accepted"], tmp_path)
    assert "prefers-color-scheme: dark" in document.styles
    assert "@media print" in document.styles
    viewport = [a for tag, a in document.tags if tag == "meta" and a.get("name") == "viewport"]
    assert re.search("width=device-width", str(viewport[0]["content"]))


def test_backticks_become_code_and_nothing_inside_them_becomes_markup() -> None:
    shown = part("headline", "", "Verdict", ["Retrain `<b>conv</b>` & `fc` alone.", "odd ` one"])
    assert "Retrain <code>&lt;b&gt;conv&lt;/b&gt;</code> &amp; <code>fc</code> alone." in shown
    assert "odd ` one" in shown


def test_cases_before_and_after_stand_in_the_report(runs: dict[str, Run], tmp_path: Path) -> None:
    repair = runs["accepted"].repairs[0]
    text = " ".join(_report(runs["accepted"], tmp_path).text.split())
    images = repair.images
    for before in (1, 2, 3, 4):
        row = [
            int(((images["case_before"] == before) & (images["case_after"] == after)).sum())
            for after in (1, 2, 3, 4)
        ]
        known = images["case_before"].notna().sum()
        cells = " ".join(f"{n} {100 * n / known:.1f}\N{NO-BREAK SPACE}%" for n in row)
        assert f"{CASE_NAMES[before - 1]} {cells}".replace("\N{NO-BREAK SPACE}", " ") in text


def test_every_repair_is_told_in_full_with_its_tests(runs: dict[str, Run], tmp_path: Path) -> None:
    text = " ".join(_report(runs["accepted"], tmp_path).text.split())
    assert text.index("Repair of block4_conv3") < text.index("Another repair, of block4_conv3")
    for repair in runs["accepted"].repairs:
        test = repair.info["controls"][0]["versus_repair"]
        gain = test["accuracy"]["value"]
        row = f"Repair against control ce {100 * gain:+.1f} points".replace("-", "\N{MINUS SIGN}")
        assert row in text
        assert f"{test['mcnemar']['fixed']} {test['mcnemar']['broken']} p " in text
    assert "counterfactual images, 144 of train and 72 of val" in text


def test_what_is_open_is_said_at_the_top(runs: dict[str, Run], tmp_path: Path) -> None:
    text = _report(runs["rejected"], tmp_path).text
    assert "Still to decide" in text
    assert text.index("the network as it was stays in use") < text.index("Layers, from input")
