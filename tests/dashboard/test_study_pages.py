"""The study in the browser: raters vote blind and come back, reviewers set up and read."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from streamlit.testing.v1 import AppTest

from audit.runs import RepairFolder, Run
from dashboard.study import STUDY_ONLY_VARIABLE, VOTES_VARIABLE
from dashboard.study.design import BACKGROUND, StudyDesign, questions
from dashboard.study.material import items_of, pictures
from dashboard.study.results import votes_csv
from dashboard.study.store import Study, VoteStore, store_of
from tests.dashboard.study_material import build_repaired_run, side_of
from tests.run_builder import HOSTILE_CLASS, HOSTILE_NAME

APP = Path(__file__).resolve().parents[2] / "dashboard" / "app.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, RepairFolder]:
    return build_repaired_run(tmp_path_factory.mktemp("runs"), hostile=True)


@pytest.fixture
def run(built: tuple[Run, RepairFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a run with a hostile class name and hostile file names, and no studies yet."""
    monkeypatch.setenv("LAYERMEND_RUNS", str(built[0].path.parent))
    monkeypatch.setenv(VOTES_VARIABLE, f"sqlite:///{tmp_path / 'votes.sqlite'}")
    monkeypatch.delenv(STUDY_ONLY_VARIABLE, raising=False)
    return built[0]


def _study(run: Run, images: int = 2, checks: int = 1) -> tuple[VoteStore, Study, list[str]]:
    repair = run.repairs[0]
    plan = StudyDesign(
        seed=3,
        tasks=("trust", "prefer", "accurate"),
        items=items_of(repair, images, checks, seed=3),
        per_rater=images,
    )
    store = store_of(run, create=True)
    assert store is not None
    study, tokens = store.create_study(
        run=run.name, repair=repair.name, title="<b>Look</b>", design=plan, raters=2
    )
    return store, study, tokens


def _open(study: str, token: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60)
    app.query_params["study"], app.query_params["rater"] = study, token
    app.run()
    assert not app.exception, app.exception
    return app


def _visit(page: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60).run()
    app.switch_page(f"views/{page}.py").run()
    assert not app.exception, app.exception
    return app


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", []  # type: ignore[var-annotated]

    def handle_data(self, data: str) -> None:
        self.text += " " + data

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def _seen(app: AppTest) -> _Seen:
    seen = _Seen()
    for element in [*app.main.get("html"), *app.sidebar.get("html")]:
        seen.feed(re.sub(r"<style>.*?</style>", "", element.proto.body, flags=re.DOTALL))
    seen.text = " ".join(seen.text.split())
    return seen


def _images(app: AppTest) -> list[str]:
    return [str(attributes["src"]) for tag, attributes in _seen(app).tags if tag == "img"]


def _say_background(app: AppTest) -> AppTest:
    for place, name in enumerate(BACKGROUND):
        app.radio(key=name).set_value(("None", "Some", "A lot")[place])
    return app.button(key="FormSubmitter:background-Start").click().run()


def _press(app: AppTest, answer: str) -> AppTest:
    [button] = [b for b in app.button if re.fullmatch(rf"answer-\d+-{answer}", str(b.key))]
    app = button.click().run()
    assert not app.exception, app.exception
    return app


def test_a_rater_votes_blind_stops_and_comes_back(run: Run) -> None:
    store, study, tokens = _study(run)
    asked = questions(study.design, 1)
    app = _open(study.id, tokens[1])
    assert "three questions about yourself" in _seen(app).text and not store.votes(study.id)
    app = app.button(key="FormSubmitter:background-Start").click().run()
    assert "answer all three" in _seen(app).text
    app = _say_background(app)
    assert store.raters(study.id)[1].background == dict(zip(BACKGROUND, (0, 2, 3), strict=True))

    chosen = {"trust": "no", "prefer": "left", "accurate": "yes"}
    for place, question in enumerate(asked):
        if place == 3:  # another visit, with the same link
            app = _open(study.id, tokens[1])
        shown = [picture.uri for picture in pictures(run.repairs[0], question)]
        assert _images(app) == shown
        assert app.get("progress")[0].proto.text == f"{place} of {len(asked)} answered"
        text = _seen(app).text
        if question.task == "prefer":
            assert "Which image best highlights the" in text
            assert [b.label for b in app.button][:4] == [
                "The left image", "The right image", "They look the same", "Can't distinguish"
            ]  # fmt: skip
        assert question.item.label_name in text or question.task == "trust"
        assert question.item.path not in _everything(app)
        app = _press(app, chosen[question.task])
    assert "Thank you" in _seen(app).text
    votes = store.votes(study.id)
    assert [(v.rater, v.task, v.item) for v in votes] == [(1, q.task, q.item.number) for q in asked]
    for vote, question in zip(votes, asked, strict=True):
        assert vote.left == question.left and vote.shown == question.shown
        if question.task == "prefer":
            left, right = ("real", "decoy") if question.item.check else ("after", "before")
            assert vote.answer == (left if question.left == "after" else right)
    assert all(vote.seconds is not None for vote in votes[:3])


def _everything(app: AppTest) -> str:
    return " ".join(str(element) for element in [*app.main, *app.sidebar])


def test_the_last_answer_can_be_changed_once_it_was_a_slip(run: Run) -> None:
    store, study, tokens = _study(run)
    app = _say_background(_open(study.id, tokens[0]))
    assert not [b for b in app.button if b.label == "Change the last answer"]
    app = _press(app, "yes")
    [back] = [b for b in app.button if b.label == "Change the last answer"]
    app = _press(back.click().run(), "no")
    assert [vote.answer for vote in store.votes(study.id)] == ["no"]
    assert app.get("progress")[0].proto.text.startswith("1 of")


def test_raters_are_shown_nothing_but_the_study(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store, study, tokens = _study(run)
    for link in (
        (study.id, "guess"),
        ("guess", tokens[0]),
        (study.id, store.new_token(study.id, 0)),
    ):
        app = _open(*link)
        assert not app.sidebar.selectbox and run.name not in _everything(app)
        assert ("not valid" in _seen(app).text) == ("guess" in link)
    assert "not valid" in _seen(_open(study.id, tokens[0])).text  # replaced by the new one
    monkeypatch.setenv(STUDY_ONLY_VARIABLE, "1")
    app = AppTest.from_file(str(APP), default_timeout=60).run()
    assert "Open the whole link" in _seen(app).text and run.name not in _everything(app)


def test_every_answer_has_a_key(run: Run) -> None:
    _, study, tokens = _study(run, images=1, checks=0)
    app = _say_background(_open(study.id, tokens[0]))
    keys = []
    for answer in ("cant", "cant", "cant"):
        offered = [b.proto.shortcut for b in app.button if str(b.key).startswith("answer-")]
        keys.append(offered)
        app = _press(app, answer)
    assert keys == [["1", "2", "3"], ["1", "2", "3", "4"], ["1", "2", "3"]]


def test_a_repair_that_is_gone_tells_raters_no_more_than_that(run: Run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    store, study, tokens = _study(run)
    store.save_background(store.raters(study.id)[0], dict.fromkeys(BACKGROUND, 1))
    for gallery in ({"images": []}, {"images": "nonsense"}, {}):
        monkeypatch.setattr(RepairFolder, "gallery", gallery)
        app = _open(study.id, tokens[0])
        assert "cannot be shown just now" in _seen(app).text
        assert run.name not in _everything(app)


def test_a_study_is_set_up_and_its_links_work(run: Run) -> None:
    app = _visit("study_setup")
    images = len(run.repairs[0].gallery["images"])
    assert f"Each rater answers {3 * images + 3} questions" in " ".join(
        c.value for c in app.caption
    )
    app.checkbox(key="accurate").set_value(False).run()
    app.number_input(key="images").set_value(2).run()
    [button] = [b for b in app.button if b.label == "Set up the study"]
    app = button.click().run()
    assert not app.exception, app.exception
    links = re.findall(r"http\S+", app.code[0].value)
    store = store_of(run)
    assert store is not None
    [study] = store.studies(run.name)
    assert study.design.tasks == ("trust", "prefer") and len(study.design.judged) == 2
    assert study.repair == run.repairs[0].name and len(links) == 4
    for number, link in enumerate(links):
        query = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
        assert query["study"] == study.id
        assert store.rater(study.id, query["rater"]).number == number  # type: ignore[union-attr]
    assert "yourself" in _seen(_open(query["study"], query["rater"])).text
    [done] = [b for b in app.button if b.label == "Done"]
    app = done.click().run()
    assert not app.code and "0 of 4" in _seen(app).text
    [more] = [b for b in app.button if b.label == "Two more raters"]
    app = more.click().run()
    assert app.code[0].value.startswith("Rater 5:") and len(store.raters(study.id)) == 6


def test_a_server_that_is_read_only_changes_no_study(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _study(run, images=4, checks=3)
    monkeypatch.setenv("LAYERMEND_READ_ONLY", "1")
    buttons = {button.label: button.disabled for button in _visit("study_setup").button}
    for label in ("Set up the study", "New link", "Two more raters"):
        assert buttons[label], label


def test_results_are_those_of_the_votes(run: Run) -> None:
    store, study, _ = _study(run, images=4, checks=3)
    assert "No votes on the maps yet" in _seen(_visit("study_results")).text
    for rater in store.raters(study.id):
        for question in questions(study.design, rater.number):
            wanted = "after" if rater.number == 0 else "before"
            answer = side_of(question, wanted) if question.task == "prefer" else "yes"
            store.record(rater, question, answer)
    app = _visit("study_results")
    text = _seen(app).text
    assert "100 % of the votes prefer the map after the repair" in text
    assert "are left out: 2." in text  # the second rater chose the decoys
    rows = {row[0]: row[1:] for row in _table(app, 0)}
    assert rows["All images"][:3] == ["4", "0 % [0, 49]", "100 % [51, 100]"]
    app = app.checkbox[0].set_value(True).run()
    assert "50 % of the votes prefer the map after the repair" in _seen(app).text
    assert dict(_pairs(_table(app, 0)))["All images"] == "8"
    votes_of = next(box for box in app.main.selectbox if box.label == "Votes of")
    app = votes_of.set_value(1).run()
    assert _table(app, 0)[0][:4] == ["All images", "4", "100 % [51, 100]", "0 % [0, 49]"]
    [download] = app.get("download_button")
    assert download.proto.label == "All votes, CSV"
    table = list(csv.reader(io.StringIO(votes_csv(study.design, store.raters(study.id),
                                                  store.votes(study.id)))))  # fmt: skip
    assert len(table) == 1 + 2 * (3 * 4 + 3)
    [decide] = [b for b in app.button if b.label == "Decide the cases by these votes"]
    app = decide.click().run()
    assert "are now by votes" in _seen(app).text
    _study(run, images=1)
    app = _visit("study_results")
    assert "No votes on the maps yet" in _seen(app).text  # the newest comes first
    studies = next(box for box in app.main.selectbox if box.label == "Study")
    assert "100 % of the votes" in _seen(studies.set_value(study.id).run()).text
    record = json.loads((run.repairs[0].path / "repair.json").read_text())
    assert record["cases"]["source"] == "votes" and record["cases_measured"]["source"] == "proxy"


def _table(app: AppTest, place: int) -> list[list[str]]:
    bodies = [e.proto.body for e in app.main.get("html") if "<table" in e.proto.body]
    cells = [
        re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)
        for row in re.findall(r"<tr.*?</tr>", bodies[place], flags=re.DOTALL)
    ]
    return [[" ".join(cell.split()) for cell in row] for row in cells if row]


def _pairs(rows: list[list[str]]) -> list[tuple[str, str]]:
    return [(row[0], row[1]) for row in rows]


def test_a_run_without_a_repair_has_nothing_to_vote_on(run: Run, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from tests.run_builder import build_run

    bare = build_run(tmp_path / "bare", images=60)
    monkeypatch.setenv("LAYERMEND_RUNS", str(bare.path))
    assert "Nothing to vote on" in _seen(_visit("study_setup")).text
    assert "No study in this run yet" in _seen(_visit("study_results")).text


def test_a_database_that_is_not_there_is_one_line(run: Run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(VOTES_VARIABLE, "sqlite:////nowhere/at/all/votes.sqlite")
    for page in ("study_setup", "study_results"):
        assert "cannot be read or written" in _seen(_visit(page)).text
    app = _open("study", "token")
    assert "cannot be shown just now" in _seen(app).text and "nowhere" not in _everything(app)


def test_names_from_files_are_text(run: Run) -> None:
    repair = run.repairs[0]
    hostile = [e["path"] for e in repair.gallery["images"] if HOSTILE_NAME in e["path"]]
    assert hostile, "the built run shows raters at least one hostile file"
    _, study, tokens = _study(run, images=len(repair.gallery["images"]), checks=0)
    app, seen = _say_background(_open(study.id, tokens[0])), []
    for question in questions(study.design, 0):
        seen.append(_seen(app))
        app = _press(app, "left" if question.task == "prefer" else "yes")
    seen += [_seen(app), _seen(_visit("study_setup")), _seen(_visit("study_results"))]
    assert any(HOSTILE_CLASS in one.text for one in seen)
    assert any("<b>Look</b>" in one.text for one in seen)
    for one in seen:
        assert HOSTILE_NAME not in one.text
        assert not [tag for tag, _ in one.tags if tag in ("script", "iframe", "a", "link")]
        for tag, attributes in one.tags:
            assert not [name for name in attributes if name.startswith("on")]
            assert tag != "img" or str(attributes["src"]).startswith("data:image/")


def test_a_database_of_no_use_is_wrong_usage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dashboard", str(tmp_path), "--votes", "mysql://here/votes"]
    done = subprocess.run(
        command, cwd=APP.parents[1], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "postgresql://USER@HOST/NAME" in done.stderr
