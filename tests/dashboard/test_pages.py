"""The pages show what the run folder holds, for every state a run can be in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from audit.layers_section import EVIDENCE
from audit.runs import Run
from dashboard.pictures import FORMATS
from tests.run_builder import FAULTY, HOSTILE_CLASS, HOSTILE_NAME, SHUFFLED, build_all, build_run

APP = Path(__file__).resolve().parents[2] / "dashboard" / "app.py"
PAGES = ("overview", "layers", "cases", "images", "groups", "repair", "export")
STATES = ("healthy", "broken", "rejected", "running", "accepted")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return build_all(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Open a page of the dashboard on a folder, without any exception on it."""

    def open_page(root: Path, page: str = "overview", **address: str) -> AppTest:
        monkeypatch.setenv("LAYERMEND_RUNS", str(root))
        app = AppTest.from_file(str(APP), default_timeout=60)
        if page != "overview":
            app = app.run().switch_page(f"views/{page}.py")
        for name, value in address.items():
            app.query_params[name] = value
        app = app.run()
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
    assert f"Whether to repair {FAULTY}: no repair has been started." in _text(app)


def test_where_the_blame_is_shared_the_layer_to_repair_is_named(visit, tmp_path) -> None:  # type: ignore[no-untyped-def]
    app = visit(build_run(tmp_path, verdict="spread", images=120).path)
    assert "repair layer --name features.19 " in app.code[0].value
    assert "Which of the 3 layers to repair: none stands out, so begin with features.19" in _text(
        app
    )


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
    [("overview", "verdict.json"), ("layers", "layers.parquet"), ("images", "images.parquet")],
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
    for end in ("", "_low", "_high"):
        title = "Trial gain" + end.replace("_", ", ")
        assert shown[title].tolist() == pytest.approx((100 * ranked[f"trial_gain{end}"]).tolist())
    chart = json.loads(app.get("vega_lite_chart")[0].proto.spec)
    assert chart["layer"]

    app = app.main.selectbox[0].set_value("map_auroc").run()
    assert not app.exception
    assert any("tells right images from wrong ones" in text.value for text in app.caption)
    assert app.query_params["evidence"] == "map_auroc"


def test_every_score_is_drawn_over_depth(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path, "layers", evidence="every")
    layers = runs["accepted"].layers
    held = [one.heading for one in EVIDENCE if layers[one.column].notna().any()]
    specs = [json.loads(chart.proto.spec) for chart in app.get("vega_lite_chart")]
    assert [spec["title"]["text"] for spec in specs] == held and len(held) >= 8


def test_one_image_is_shown_through_every_layer(visit, runs) -> None:  # type: ignore[no-untyped-def]
    seen = _seen(visit(runs["accepted"].path, "layers"))
    pictures = [attributes for tag, attributes in seen.tags if tag == "img"]
    heats = [one["src"] for one in pictures if one.get("class") == "heat"]
    assert len(heats) == len(set(heats)) == len(runs["accepted"].gallery["layers"])


# --- images ---------------------------------------------------------------------------------------


def test_images_filter_by_outcome_and_class(visit, runs) -> None:  # type: ignore[no-untyped-def]
    run, repair = runs["accepted"], runs["accepted"].repairs[0]
    rows = repair.images
    fixed = rows[~rows["right_before"] & rows["right_after"]]
    app = visit(run.path, "images", order="name")
    app = _box(app, "Outcome").set_value("fixed").run()
    assert _titles(app) == sorted(fixed["path"])[:12]
    label = str(fixed["label_name"].iloc[0])
    app = app.multiselect[0].set_value([label]).run()
    assert sorted(_titles(app)) == sorted(fixed[fixed["label_name"] == label]["path"])


def test_images_filter_by_the_cases_of_the_scan_and_of_the_repair(visit, runs) -> None:  # type: ignore[no-untyped-def]
    run, repair = runs["accepted"], runs["accepted"].repairs[0]
    app = visit(run.path, "images", case="3")
    assert f"of {int((run.images['case'] == 3).sum())} images" in app.main.caption[0].value
    app = visit(run.path, "images", case_before="3", case_after="1")
    rows = repair.images
    moved = rows[(rows["case_before"] == 3) & (rows["case_after"] == 1)]
    assert f"of {len(moved)} images" in app.main.caption[0].value
    assert set(_titles(app)) <= set(moved["path"])


def test_images_are_searched_and_sorted(visit, runs) -> None:  # type: ignore[no-untyped-def]
    run = runs["accepted"]
    app = visit(run.path, "images", search="ONE/", order="unsure")
    rows = run.images[run.images["path"].str.startswith("one/")]
    assert _titles(app) == rows.sort_values("p_true")["path"].tolist()[:12]
    repair = run.repairs[0].images
    app = visit(run.path, "images", order="changed")
    known = repair[repair["ssim"].notna()].sort_values("ssim")["path"].tolist()
    assert _titles(app)[: len(known)] == known


def test_images_of_an_error_group(visit, runs) -> None:  # type: ignore[no-untyped-def]
    run = runs["accepted"]
    members = run.groups["groups"][0]["paths"]
    app = visit(run.path, "images", group="group-1", order="name")
    assert _titles(app) == sorted(members)[:12]


def test_images_come_in_pages_by_buttons_with_keys(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["healthy"].path, "images", order="name")
    paths = sorted(runs["healthy"].images["path"])
    assert _titles(app) == paths[:12]
    following = next(button for button in app.main.button if button.label == "Next")
    assert following.proto.shortcut == "right"
    assert _titles(following.click().run()) == paths[12:24]


def test_an_image_in_the_address_is_shown_large_before_and_after(visit, runs) -> None:  # type: ignore[no-untyped-def]
    run = runs["accepted"]
    entry = run.repairs[0].gallery["images"][3]
    app = visit(run.path, "images", view="one", image=entry["path"])
    assert _titles(app) == [entry["path"]]
    text = _text(app)
    assert "Before, Grad-CAM" in text and "After, Grad-CAM" in text
    assert f"Similarity of maps {entry['ssim']:.2f}".replace("-", "\N{MINUS SIGN}") in text
    maps = run.repairs[0].maps("gradcam", FAULTY, "after")[3]
    values = [a["data-v"] for tag, a in _seen(app).tags if tag == "i" and "data-v" in a]
    assert values[-maps.size :] == [f"{value:.2f}" for value in maps.ravel()]
    app = app.main.slider[-1].set_value(35).run()
    styles = [str(a.get("style")) for tag, a in _seen(app).tags if a.get("class") == "lm-viewer"]
    assert styles == ["--heat: 0.35"]


def test_images_without_maps_come_from_the_scanned_folder(visit, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = build_run(tmp_path / "runs", images=120)
    paths = sorted(set(run.images["path"]) - {one["path"] for one in run.gallery["images"]})
    outside = tmp_path / "outside.png"
    photos = tmp_path / "photos"
    for file in (photos / paths[0], outside):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (10, 200, 30)).save(file)
    run.write_info(data={**run.info["data"], "root": str(photos)})
    run.write_images({**run.images, "path": run.images["path"].replace(paths[1], "../outside.png")})
    app = visit(run.path, "images", view="one", image=paths[0])
    assert [tag for tag, _ in _seen(app).tags].count("img") == 1
    assert "none kept of this image" in _text(app)
    app = visit(run.path, "images", view="one", image="../outside.png")
    assert "not in the scanned folder" in _text(app)
    assert "img" not in [tag for tag, _ in _seen(app).tags]


def test_formats_are_those_that_a_scan_opens() -> None:
    from audit.images import decoding

    assert decoding.FORMATS == FORMATS


def _titles(app: AppTest) -> list[str]:
    tags = _seen(app).tags
    return [
        str(attributes["title"])
        for tag, attributes in tags
        if tag == "span" and attributes.get("title")
    ]


def _box(app: AppTest, label: str):  # type: ignore[no-untyped-def]
    return next(box for box in app.main.selectbox if box.label == label)


# --- cases, groups, repair ------------------------------------------------------------------------


def test_a_cell_of_the_cases_opens_its_images(visit, runs) -> None:  # type: ignore[no-untyped-def]
    run, repair = runs["accepted"], runs["accepted"].repairs[0]
    seen = _seen(visit(run.path, "cases"))
    links = [str(a["href"]) for tag, a in seen.tags if tag == "a"]
    asked = [parse_qs(link.partition("?")[2]) for link in links]
    rows = repair.images
    for before in (1, 2, 3, 4):
        for after in (1, 2, 3, 4):
            held = ((rows["case_before"] == before) & (rows["case_after"] == after)).any()
            wanted = {"case_before": [str(before)], "case_after": [str(after)]}
            found = [one for one in asked if wanted.items() <= one.items()]
            assert len(found) == int(held)
            assert all(one["repair"] == [repair.name] for one in found)
    for case in (1, 2, 3, 4):
        assert [one for one in asked if one.get("case") == [str(case)]]


def test_error_groups_are_told_with_their_examples(visit, runs) -> None:  # type: ignore[no-untyped-def]
    group = runs["accepted"].groups["groups"][0]
    app = visit(runs["accepted"].path, "groups")
    assert group["sentence"] in _text(app)
    assert _titles(app) == [one["path"] for one in group["examples"]]
    assert any("group=group-1" in str(a.get("href")) for tag, a in _seen(app).tags if tag == "a")


def test_classes_and_confusions_are_those_of_the_tables(visit, runs) -> None:  # type: ignore[no-untyped-def]
    repair = runs["accepted"].repairs[0]
    text = _text(visit(runs["accepted"].path, "repair"))
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


def test_whether_the_penalty_earned_its_place_comes_first(visit, runs) -> None:  # type: ignore[no-untyped-def]
    for state in ("accepted", "rejected"):
        text = _text(visit(runs[state].path, "repair"))
        said = runs[state].repairs[0].info["penalty"]["sentence"]
        assert text.index(said) < text.index(f"Repair {state}")
        assert runs[state].repairs[0].info["reasons"][0] in text


def test_the_form_starts_the_command_on_this_run_alone(visit, runs, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    started = []

    def start(kind, run, arguments, *, served):  # type: ignore[no-untyped-def]
        started.append((kind, run, list(arguments), list(served)))

    monkeypatch.setattr("dashboard.job_view.start_job", start)
    run = runs["rejected"]
    app = visit(run.path, "repair")
    _box(app, "Loss").set_value("ce")
    _box(app, "Learning rate").set_value("0.03")
    form = next(one for one in app.main.button if one.label == "Start the repair")
    app = form.click().run()
    assert not app.exception
    ((kind, path, arguments, served),) = started
    assert (kind, path, served) == ("repair", run.path, [run.path])
    assert arguments[:2] == ["--name=features.19", "--loss=ce"]
    assert "--lr=0.03" in arguments


def test_the_form_begins_with_the_best_trial_where_no_layer_is_flagged(
    visit: Callable[..., AppTest], tmp_path: Path
) -> None:
    run = build_run(tmp_path, verdict="none")
    layers = run.layers.assign(trial_gain=run.layers["rank"] / 1000)  # the last one's is the best
    run.write_layers(layers.to_dict(orient="list"))
    app = visit(run.path, "repair")
    last = layers.loc[layers["rank"].idxmax(), "name"]
    assert _box(app, "Layer, most likely at fault first").value == last


def test_a_server_that_is_read_only_offers_to_start_nothing(visit, runs, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("LAYERMEND_READ_ONLY", "1")
    for page in ("repair", "export"):
        labels = [one.label for one in visit(runs["accepted"].path, page).main.button]
        assert not [label for label in labels if "Start" in label or "Export to" in label]


def test_the_address_names_run_and_repair(visit, runs) -> None:  # type: ignore[no-untyped-def]
    run = runs["accepted"]
    rejected = run.repairs[1]
    app = visit(run.path.parent, run=run.name, repair=rejected.name)
    assert "Repair rejected" in _text(app)
    app = visit(run.path.parent, run="of another folder")
    assert app.query_params["run"] == run.name  # the newest


def test_export_shows_the_proof_and_the_files(visit, runs) -> None:  # type: ignore[no-untyped-def]
    app = visit(runs["accepted"].path, "export")
    proof = json.loads((runs["accepted"].repairs[0].path / "onnx.json").read_text())
    text = _text(app)
    assert f"{proof['top1_equal']} of {proof['images']} images" in text
    assert f"{proof['max_abs_error']:.1e}" in text
    assert proof["sha256"] in text
    labels = [button.proto.label.split(",")[0] for button in app.get("download_button")]
    assert labels == ["ONNX model", "Proof", "Weights", "Weights' card", "Report"]


def test_hostile_names_are_shown_as_text_on_every_page(visit, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = build_run(tmp_path, hostile=True, repairs=("accepted",))
    long = "x" * 4000 + "\n<b>.png"
    run.write_images({**run.images, "path": run.images["path"].replace("00" + HOSTILE_NAME, long)})
    texts = []
    for page in PAGES:
        app = visit(run.path, page)
        seen = _seen(app)
        texts.append(" ".join(seen.text))
        assert not [tag for tag, _ in seen.tags if tag in ("script", "iframe", "link")]
        links = [str(attributes.get("href")) for tag, attributes in seen.tags if tag == "a"]
        assert all(re.fullmatch(r"\w*\?[\w%~.+&=-]+", link) for link in links)
        for tag, attributes in seen.tags:
            assert not [name for name in attributes if name.startswith("on")]
            assert tag != "img" or str(attributes["src"]).startswith("data:image/")
        # Markdown would load the image that the class name points to.
        for element in [*app.markdown, *app.caption, *app.subheader]:
            assert "example.invalid" not in element.value and "onerror" not in element.value
    assert HOSTILE_NAME in texts[PAGES.index("images")]
    assert "<b>.png" in _text(visit(run.path, "images", search="xxxx"))
    assert HOSTILE_CLASS in texts[PAGES.index("repair")]


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
