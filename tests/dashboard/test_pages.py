"""The pages show what the run folder holds, for every state a run can be in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from audit.runs import Run
from tests.run_builder import FAULTY, HOSTILE_CLASS, HOSTILE_NAME, SHUFFLED, build_all, build_run

APP = Path(__file__).resolve().parents[2] / "dashboard" / "app.py"
PAGES = ("overview", "layers", "images", "accuracy", "export")
STATES = ("healthy", "broken", "rejected", "running", "accepted")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return build_all(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Open a page of the dashboard on a folder, without any exception on it."""

    def open_page(root: Path, page: str = "overview") -> AppTest:
        monkeypatch.setenv("LAYERMEND_RUNS", str(root))
        app = AppTest.from_file(str(APP), default_timeout=60).run()
        if page != "overview":
            app = app.switch_page(f"views/{page}.py").run()
        assert not app.exception, app.exception
        return app

    return open_page


class _Seen(HTMLParser):
    """The text and the tags of a piece of HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def _seen(app: AppTest) -> _Seen:
    seen = _Seen()
    for element in [*app.main.get("html"), *app.sidebar.get("html")]:
        if not element.proto.body.startswith("<style>"):
            seen.feed(element.proto.body)
    return seen


def _text(app: AppTest) -> str:
    return " ".join(" ".join(_seen(app).text).split())


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("page", PAGES)
def test_every_page_stands_for_every_state_of_a_run(visit, runs, state, page) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs[state].path, page)
    assert len(_text(app)) > 20


def test_overview_numbers_are_those_of_the_repair(visit, runs) -> None:  # type: ignore[no-untyped-def]
    repair = json.loads((runs["accepted"].repairs[0].path / "repair.json").read_text())
    text = _text(visit(runs["accepted"].path))
    before, after = repair["before"]["accuracy"], repair["after"]["accuracy"]
    gain, test = repair["difference"]["accuracy"], repair["difference"]["mcnemar"]
    assert f"Repair accepted: held-out accuracy went from {_share(before['value'])}" in text
    assert f"Accuracy after {_share(after['value'])}" in text
    assert f"95 %: {100 * after['low']:.1f} to {_share(after['high'])}" in text
    assert f"Difference +{100 * gain['value']:.1f} points" in text
    assert f"{test['fixed']} fixed, {test['broken']} broken" in text
    assert f"{abs(repair['ssim']['value']):.3f}" in text
    for reason in repair["reasons"] + runs["accepted"].verdict["reasons"]:
        assert reason in text


def test_a_rejected_repair_says_so_and_why(visit, runs) -> None:  # type: ignore[no-untyped-def]
    text = _text(visit(runs["rejected"].path))
    assert "Repair rejected" in text
    assert "includes zero: the gain may be chance" in text
    assert "The penalty did no better than plain cross entropy" in text
    assert SHUFFLED in text
    assert "Not exported yet." in text


def test_a_run_without_a_repair_names_the_command_for_one(visit, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = build_run(tmp_path, images=120)
    app = visit(run.path)
    assert "One layer stands out" in _text(app)
    expected = f"repair layer --name {FAULTY} --run {run.path}"
    assert [code.value for code in app.code] == [expected]


def test_a_healthy_network_is_not_sent_to_repair(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["healthy"].path)
    assert "No layer stands out" in _text(app)
    assert not app.code


def test_a_rejected_repair_is_not_sent_to_export(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["rejected"].path, "export")
    assert "The repair itself was rejected" in _text(app)
    assert not app.code


def test_a_running_scan_shows_what_it_has(visit, runs) -> None:  # type: ignore[no-untyped-def]
    text = _text(visit(runs["running"].path))
    assert "still running" in text and "No verdict yet." in text


@pytest.mark.parametrize(
    ("page", "file"),
    [("overview", "verdict.json"), ("layers", "layers.parquet"), ("images", "index.json"),
     ("accuracy", "images.parquet")],
)  # fmt: skip
def test_a_damaged_file_is_named_where_it_is_missed(visit, runs, page, file) -> None:  # type: ignore[no-untyped-def]
    assert file in _text(visit(runs["broken"].path, page))


def test_an_empty_folder_names_the_command_that_fills_it(visit, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "20260101T000000Z-cut").mkdir()
    app = visit(tmp_path)
    assert "No run to show yet." in _text(app)
    assert "has no run.json" in _text(app)
    assert app.code[0].value == "audit scan MODEL --data DIR"


def test_the_newest_run_comes_first_and_another_can_be_picked(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path.parent)
    assert "One layer stands out" in _text(app)
    app = app.sidebar.selectbox[0].set_value(runs["healthy"].name).run()
    assert not app.exception
    assert "No layer stands out" in _text(app)


def test_another_repair_can_be_picked(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path)
    app = app.sidebar.selectbox[1].set_value(runs["accepted"].repairs[1].name).run()
    assert "Repair rejected" in _text(app)


def test_layers_are_ranked_and_charted_as_in_the_table(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path, "layers")
    layers = runs["accepted"].layers
    shown = app.dataframe[0].value
    ranked = layers.sort_values("rank")
    assert shown["Module path"].tolist() == ranked["name"].tolist()
    assert shown["Module path"].iloc[0] == FAULTY
    assert shown["Trial gain"].tolist() == pytest.approx((100 * ranked["trial_gain"]).tolist())
    chart = json.loads(app.get("vega_lite_chart")[0].proto.spec)
    assert chart["layer"]

    app = app.main.selectbox[0].set_value("map_auroc").run()
    assert not app.exception
    assert any("tells right images from wrong ones" in text.value for text in app.caption)


def test_one_image_is_shown_through_every_layer(visit, runs) -> None:  # type: ignore[no-untyped-def]
    seen = _seen(visit(runs["accepted"].path, "layers"))
    pictures = [attributes["src"] for tag, attributes in seen.tags if tag == "img"]
    assert len(pictures) == len(set(pictures)) == len(runs["accepted"].gallery["layers"])


def test_gallery_filters_by_outcome(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path, "images")
    entries = runs["accepted"].repairs[0].gallery["images"]
    fixed = [one["path"] for one in entries if not one["right"] and one["right_after"]]
    assert fixed, "the built run holds at least one fixed image"
    assert _titles(app) == [one["path"] for one in entries]
    outcome = next(box for box in app.main.selectbox if box.label == "Outcome")
    app = outcome.set_value("fixed").run()
    assert _titles(app) == fixed
    labels = {one["label_name"] for one in entries if one["path"] not in fixed}
    app = app.multiselect[0].set_value(sorted(labels)[:1]).run()
    assert not app.exception


def test_gallery_orders_by_how_much_the_maps_changed(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path, "images")
    entries = runs["accepted"].repairs[0].gallery["images"]
    order = next(box for box in app.main.selectbox if box.label == "Order")
    app = order.set_value("Maps changed most").run()
    assert _titles(app) == [one["path"] for one in sorted(entries, key=lambda one: one["ssim"])]


def test_gallery_of_the_scan_comes_in_pages(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["healthy"].path, "images")
    paths = [one["path"] for one in runs["healthy"].gallery["images"]]
    assert _titles(app) == paths[:12]
    shown = next(box for box in app.main.selectbox if box.label == "Shown")
    assert _titles(shown.set_value(12).run()) == paths[12:24]


def _titles(app: AppTest) -> list[str]:
    tags = _seen(app).tags
    return [
        str(attributes["title"])
        for tag, attributes in tags
        if tag == "span" and attributes.get("title")
    ]


def test_classes_and_confusions_are_those_of_the_tables(visit, runs) -> None:  # type: ignore[no-untyped-def]
    repair = runs["accepted"].repairs[0]
    text = _text(visit(runs["accepted"].path, "accuracy"))
    for row in repair.info["before"]["per_class"]:
        after = next(one for one in repair.info["after"]["per_class"] if one["name"] == row["name"])
        assert f"{100 * row['value']:.0f} % → {100 * after['value']:.0f} %" in text
    counts = {"before": Counter(), "after": Counter()}
    for row in repair.images.to_dict("records"):
        for when, counter in counts.items():
            if not row[f"right_{when}"]:
                counter[row["label_name"], row[f"predicted_{when}_name"]] += 1
    pair, change = max(
        ((pair, counts["after"][pair] - counts["before"][pair]) for pair in counts["before"]),
        key=lambda item: abs(item[1]),
    )
    before, after = counts["before"][pair], counts["after"][pair]
    assert f"{pair[0]} {pair[1]} {before} {after} {change:+d}".replace("-", "−") in text


def test_export_shows_the_proof_and_the_files(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path, "export")
    proof = json.loads((runs["accepted"].repairs[0].path / "onnx.json").read_text())
    text = _text(app)
    assert f"{proof['top1_equal']} of {proof['images']} images" in text
    assert f"{proof['max_abs_error']:.1e}" in text
    assert proof["sha256"] in text
    labels = [button.proto.label.split(",")[0] for button in app.get("download_button")]
    assert labels == ["ONNX model", "Proof", "Weights", "Model card", "Report"]


def test_hostile_names_are_shown_as_text_on_every_page(visit, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = build_run(tmp_path, hostile=True, repairs=("accepted",))
    texts = []
    for page in PAGES:
        app = visit(run.path, page)
        seen = _seen(app)
        texts.append(" ".join(seen.text))
        assert not [tag for tag, _ in seen.tags if tag in ("script", "iframe", "a", "link")]
        for tag, attributes in seen.tags:
            assert not [name for name in attributes if name.startswith("on")]
            assert tag != "img" or str(attributes["src"]).startswith("data:image/")
        # Markdown would load the image that the class name points to.
        for element in [*app.markdown, *app.caption, *app.subheader]:
            assert "example.invalid" not in element.value and "onerror" not in element.value
    assert HOSTILE_NAME in texts[PAGES.index("images")]
    assert HOSTILE_CLASS in texts[PAGES.index("accuracy")]


def test_the_pages_never_import_torch(runs) -> None:  # type: ignore[no-untyped-def]
    check = (
        "import os, sys\n"
        "os.environ['LAYERMEND_RUNS'] = sys.argv[2]\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file(sys.argv[1], default_timeout=60).run()\n"
        f"for page in {PAGES}: app.switch_page(f'views/{{page}}.py').run()\n"
        "assert not app.exception\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    command = [sys.executable, "-c", check, str(APP), str(runs["accepted"].path)]
    subprocess.run(command, check=True, timeout=120, cwd=APP.parents[1], capture_output=True)
