"""The whole review of a run in a browser, each step held against the files of the run folder.

From the verdict through cases and images to an exported model that classifies, and from a study's
links through ten votes of two raters each to Table 3. What a page shows is read from the page; what
it should show is worked out here from the files themselves, with pandas, sqlite3, onnxruntime and
krippendorff in place of the code that made the page. Run by the browser test on a small run, and by
`benchmarks/review.py` on a real one.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import itertools
import json
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import krippendorff
import numpy as np
import onnxruntime
import pandas as pd
from PIL import Image, ImageOps
from scipy import stats

from tests.dashboard.browser import Visitor

CASES = (1, 2, 3, 4)
CASE_NAMES = {
    1: "1: right, accurate map",
    2: "2: wrong, accurate map",
    3: "3: right, inaccurate map",
    4: "4: wrong, inaccurate map",
    0: "Without a case",
}
METHODS = {"gradcam": "Grad-CAM", "guided-gradcam": "Guided Grad-CAM", "hirescam": "HiResCAM"}
STEPPED = 8
"""Images that are stepped through with the keyboard."""
STUDY_IMAGES, STUDY_CHECKS, VOTES_EACH = 9, 1, 10
ANSWERS = {
    "left": "The left image",
    "right": "The right image",
    "same": "They look the same",
    "cant": "Can't distinguish",
}
VIEWER_CELLS = 28
EXPORT_TIMEOUT_MS = 600_000


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a review: what the page showed, and what the files say."""

    name: str
    seen: Any
    expected: Any
    seconds: float

    @property
    def right(self) -> bool:
        return bool(self.seen == self.expected)


def review(visitor: Visitor, address: str, run: Path, downloads: Path) -> Iterator[Step]:
    """Yield the steps of a whole review as they are taken.

    The run gets an export and a study with votes, where it had none.

    Args:
        address: Of a dashboard that was started on the run.
        run: A finished scan with one repair that was accepted, and no study.
        downloads: An empty folder.
    """
    files = _Files(run)
    started_s = time.perf_counter()
    parts = (
        _overview(visitor, address, files),
        _cases(visitor, files),
        _images(visitor, address, files),
        _export(visitor, files, downloads),
        _study(visitor, address, files),
    )
    for name, seen, expected in itertools.chain.from_iterable(parts):
        now_s = time.perf_counter()
        yield Step(name=name, seen=seen, expected=expected, seconds=round(now_s - started_s, 2))
        started_s = now_s


Taken = Iterator[tuple[str, Any, Any]]


# --- what the files say ---------------------------------------------------------------------------


class _Files:
    """The run folder, read without the code that the pages read it with."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.repair = max((run / "repairs").iterdir())

    @cached_property
    def verdict(self) -> dict[str, Any]:
        return _json(self.run / "verdict.json")

    @cached_property
    def images(self) -> pd.DataFrame:
        """Images of the scan, in its order, with what the repair says of those that it judged."""
        scanned = pd.read_parquet(self.run / "images.parquet")
        return scanned.merge(self.judged, on="path", how="left", suffixes=("", "_repair"))

    @cached_property
    def judged(self) -> pd.DataFrame:
        return pd.read_parquet(self.repair / "images.parquet")

    @property
    def proof(self) -> dict[str, Any]:
        return _json(self.repair / "onnx.json")

    @property
    def exported(self) -> bool:
        return (self.repair / "onnx.json").is_file()

    @cached_property
    def kept(self) -> dict[str, list[str]]:
        """Paths of the images whose maps are kept, by the repair and by the scan."""
        return {
            name: [entry["path"] for entry in _json(folder / "maps" / "index.json")["images"]]
            for name, folder in (("repair", self.repair), ("run", self.run))
        }

    @property
    def moves(self) -> list[list[int]]:
        """Images by case before (rows) and after (columns)."""
        known = self.judged.dropna(subset=["case_before", "case_after"])
        return [
            [int(((known.case_before == b) & (known.case_after == a)).sum()) for a in CASES]
            for b in CASES
        ]

    def in_order(self, images: pd.DataFrame) -> list[str]:
        """Return paths as the page lists them: with maps first, of these the changed ones."""
        before = images.right_before.where(images.right_before.notna(), images.right).astype(bool)
        after = images.right_after.where(images.right_after.notna(), before).astype(bool)
        rank = pd.Series(3, images.index)  # right
        rank[~before & ~after] = 2
        rank[~before & after] = 1
        rank[before & ~after] = 0
        in_repair = images.path.isin(self.kept["repair"])
        in_run = images.path.isin(self.kept["run"])
        rank = rank.where(in_repair, rank + 4).where(in_repair | in_run, 8)
        return [str(path) for path in images.path[rank.sort_values(kind="stable").index]]

    def votes(self) -> pd.DataFrame:
        """Votes in the order in which they were given; raters count from 0."""
        with contextlib.closing(sqlite3.connect(self.run / "votes.sqlite")) as database:
            return pd.read_sql("SELECT * FROM votes ORDER BY created_utc", database)

    def study_items(self) -> pd.DataFrame:
        with contextlib.closing(sqlite3.connect(self.run / "votes.sqlite")) as database:
            ((design,),) = database.execute("SELECT design FROM studies").fetchall()
        return pd.DataFrame(json.loads(design)["items"]).set_index("number")


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# --- overview and cases ---------------------------------------------------------------------------


def _overview(visitor: Visitor, address: str, files: _Files) -> Taken:
    tab = visitor.tab
    visitor.open(address)
    yield "verdict", tab.locator("h1.lm-headline").inner_text(), _verdict_sentence(files)
    reasons = tab.locator(".lm-reasons").first.locator("li").all_inner_texts()
    yield "reasons", reasons, [text.replace("`", "") for text in files.verdict["reasons"]]

    judged, shown = files.judged, _figures(visitor)
    before, after = (judged[f"right_{when}"].astype(bool) for when in ("before", "after"))
    yield (
        "before and after",
        {name: shown[name][0] for name in ("Accuracy before", "Accuracy after", "Difference")},
        {
            "Accuracy before": _percent(before.mean()),
            "Accuracy after": _percent(after.mean()),
            "Difference": f"{_signed(100 * (after.mean() - before.mean()))} points",
        },
    )
    fixed, broken = int((after & ~before).sum()), int((before & ~after).sum())
    yield "fixed and broken", shown["McNemar test"][1], f"{fixed} fixed, {broken} broken"
    yield "accuracy of the scan", shown["Accuracy"][0], _percent(files.images.right.mean())
    todo = "Whether to ship it" in tab.inner_text(".lm-banner.lm-open >> nth=0")
    yield "still to decide: whether to ship it", todo, not files.exported


def _verdict_sentence(files: _Files) -> str:
    names = files.verdict["layers"]
    match files.verdict["verdict"]:
        case "spread":
            several = f"{len(names)} layer{'s' if len(names) != 1 else ''}"
            return f"The fault is spread over {several}; none stands out alone."
        case "localized":
            layers = pd.read_parquet(files.run / "layers.parquet").set_index("name")
            alias = layers.loc[names[0], "alias"]
            title = names[0] if alias in (None, "", names[0]) else f"{alias} ({names[0]})"
            return f"One layer stands out: {title}."
    return "No layer stands out."


def _figures(visitor: Visitor) -> dict[str, tuple[str, str]]:
    """Return the key numbers of a page: value and note by label."""
    found = {}
    for one in visitor.tab.locator(".lm-figures > div").all():
        label, value, note = (
            one.locator(part).first.text_content() for part in ("dt", ".lm-value", ".lm-note")
        )
        found[_plain(label)] = (_plain(value), _plain(note))
    return found


def _cases(visitor: Visitor, files: _Files) -> Taken:
    tab = visitor.tab
    visitor.go("Cases")
    rows = tab.locator(".lm-cases").first.locator("tbody tr").all()
    cells = [
        [int(text.replace(",", "")) for text in r.locator("b").all_inner_texts()] for r in rows
    ]
    yield "cases before and after", cells, files.moves

    largest = max((n, b, a) for b, row in zip(CASES, files.moves, strict=True)
                  for a, n in zip(CASES, row, strict=True))  # fmt: skip
    held, before, after = largest
    tab.locator(f'.lm-cases a[href*="case_before={before}&case_after={after}"]').click()
    tab.wait_for_url("**/images?**")
    yield "a cell opens its images", _awaited_count(visitor, held), held


# --- images ---------------------------------------------------------------------------------------


def _images(visitor: Visitor, address: str, files: _Files) -> Taken:
    tab = visitor.tab
    visitor.open(f"{address}/images")
    visitor.choose("Case", "Case 3")
    third = files.images[files.images.case == 3]
    yield "images of case 3", _awaited_count(visitor, len(third)), len(third)

    wanted = files.in_order(third)[:STEPPED]
    _one_by_one(visitor)
    seen = [_stepped_to(visitor, 1, len(third))]
    for at in range(2, len(wanted) + 1):
        tab.keyboard.press("ArrowRight")
        seen.append(_stepped_to(visitor, at, len(third)))
    yield "stepping on with the arrow key", seen, wanted
    tab.keyboard.press("ArrowLeft")
    yield "and back", _stepped_to(visitor, len(wanted) - 1, len(third)), wanted[-2]

    visitor.choose("Case", "All")
    # The image itself is in the address of the view before; without it the list starts anew.
    visitor.open(f"{address}/images?view=one")
    yield from _compared(visitor, files)


def _compared(visitor: Visitor, files: _Files) -> Taken:
    tab = visitor.tab
    first = files.in_order(files.images)[0]
    visitor.see(f"1 of {len(files.images):,} images")
    yield "the image that changed most is first", visitor.titles(), [first]
    index = _json(files.repair / "maps" / "index.json")
    method, layer = index["shown_method"], index["shown_layer"]
    titles = ["Image", *(f"{when}, {METHODS[method]}" for when in ("Before", "After"))]
    captions = tab.locator(".lm-viewer figcaption").all_inner_texts()
    yield "maps before and after", captions, titles

    place = files.kept["repair"].index(first)
    for number, when in enumerate(("before", "after"), start=1):
        figure = tab.locator(".lm-viewer figure").nth(number)
        cells = figure.locator("i[data-v]").evaluate_all("all => all.map(one => one.dataset.v)")
        kept = np.load(files.repair / "maps" / method / f"{layer}.{when}.npz")["maps"][place]
        yield f"values of the map {when}", list(cells), _cells(kept)
    cell = tab.locator(".lm-viewer .lm-cells i").last
    cell.hover()
    told = cell.evaluate("cell => getComputedStyle(cell, '::after').content")
    yield "the value under the pointer", told.strip('"'), _cells(kept)[-1]

    row = files.images.set_index("path").loc[first]
    facts = _plain(tab.locator(".lm-viewer .lm-facts").inner_text())
    chance = f"{_percent(row.p_true)} \N{RIGHTWARDS ARROW} {_percent(row.p_true_after)}"
    for name, value in (
        ("Label", row.label_name),
        ("Says after", row.predicted_after_name),
        ("Chance of the label", chance),
        ("Similarity of maps", _minus(f"{row.ssim:.2f}")),
    ):
        yield f"{name}, of one image", f"{name} {value}" in facts, True

    tab.get_by_role("slider", name="Opacity of maps").press("ArrowLeft")
    tab.wait_for_selector('.lm-viewer[style*="0.79"]')
    heat = tab.locator(".lm-viewer").evaluate("one => one.style.getPropertyValue('--heat')")
    yield "opacity by the keyboard", heat.strip(), "0.79"
    link = tab.url
    yield "the address names the image", parse_qs(urlparse(link).query)["image"], [first]
    visitor.open(link)
    yield "the address opens the image", visitor.titles(), [first]


def _one_by_one(visitor: Visitor) -> None:
    tab = visitor.tab
    tab.get_by_role("radio", name="One by one").or_(
        tab.get_by_role("button", name="One by one")
    ).first.click()
    tab.wait_for_selector(".lm-viewer")
    visitor.wait()
    tab.locator(".lm-viewer h4").click()  # out of the choice of views, which has arrow keys too


def _stepped_to(visitor: Visitor, at: int, count: int) -> str:
    """Return the name of the image that is shown once the page says which one it is."""
    visitor.see(re.compile(rf"^{at:,} of {count:,} images?$"))
    visitor.wait()
    return ", ".join(visitor.titles())


def _awaited_count(visitor: Visitor, expected: int) -> int | None:
    """Return how many images the page says it lists, once it says what is expected or stays."""
    from playwright.sync_api import TimeoutError as NeverCame

    with contextlib.suppress(NeverCame):
        visitor.see(re.compile(rf"of {expected:,} images?$"), 30_000)
    visitor.wait()
    told = visitor.tab.get_by_text(re.compile(r"of [\d,]+ images?$")).first.inner_text()
    found = re.search(r"of ([\d,]+) images?$", told)
    return int(found[1].replace(",", "")) if found else None


def _cells(kept: np.ndarray) -> list[str]:
    """Return the values of a map as the pointer finds them, a larger one averaged over cells."""
    rows, columns = (np.array_split(np.arange(size), _edges(size)[1:]) for size in kept.shape)
    heat = kept.astype(np.float32)
    return [f"{heat[np.ix_(r, c)].mean():.2f}" for r in rows for c in columns]


def _edges(size: int) -> list[int]:
    cells = min(size, VIEWER_CELLS)
    return [cell * size // cells for cell in range(cells)]


# --- export ---------------------------------------------------------------------------------------


def _export(visitor: Visitor, files: _Files, downloads: Path) -> Taken:
    tab = visitor.tab
    visitor.go("Export")
    told = _plain(tab.locator(".lm-banner strong").first.inner_text())
    yield "state before the export", told, _export_sentence(files)
    tab.get_by_role("button", name=re.compile("^Export to ONNX")).click()
    visitor.see(re.compile(r"^Export under way"))
    visitor.see(re.compile(r"^Export (finished|failed|cancelled)"), EXPORT_TIMEOUT_MS)
    visitor.wait()
    yield "exported by a click", _banners(visitor)[1:2], [_export_sentence(files)]
    yield "proof passed", files.proof["status"], "passed"

    model, card = downloads / "model.onnx", downloads / "model.md"
    for label, file in (("ONNX model", model), ("Model card", card)):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=re.compile(f"^{label}")).click()
        download.value.save_as(file)
        yield f"{label} downloaded", _digest(file), _digest(files.repair / file.name)
    pairs = _pairs(visitor)
    yield "SHA-256 on the page", pairs["SHA-256"], _digest(model)
    answers = _answers(model, files)
    recorded = [str(name) for name in files.judged.predicted_after_name]
    same = sum(a == b for a, b in zip(answers, recorded, strict=True))
    yield "held-out images with the recorded answer in onnxruntime", same, len(recorded)
    yield "as the page says", pairs["Same top answer"], f"{same:,} of {len(recorded):,} images"

    with tab.expect_download() as download:
        tab.get_by_role("button", name="Report, HTML").click()
    page = Path(download.value.path()).read_text(encoding="utf-8")
    yield "the report has the verdict", _verdict_sentence(files) in page, True


def _export_sentence(files: _Files) -> str:
    if not files.exported:
        return "Not exported yet."
    return (
        "The ONNX model gives the same top answer as the network on all of "
        f"{files.proof['images']:,} images."
    )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _answers(model: Path, files: _Files) -> list[str]:
    """Return what an exported model says of the held-out images, prepared with Pillow and numpy."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    classes, settings = (
        json.loads(notes[f"layermend.{key}"]) for key in ("classes", "preprocessing")
    )
    root = Path(_json(files.run / "run.json")["data"]["root"])
    name = session.get_inputs()[0].name
    answers = []
    for path in files.judged.path:
        pixels = _pixels(root / path, settings)
        logits = session.run(None, {name: pixels[None]})[0]
        answers.append(str(classes[int(logits[0].argmax())]))
    return answers


def _pixels(path: Path, settings: Mapping[str, Any]) -> np.ndarray:
    """Return one photo as the network takes it, CHW float32."""
    (height, width), crop = settings["input_size"], settings["crop"]
    with Image.open(path) as opened:
        photo = ImageOps.exif_transpose(opened).convert("RGB")
    scale = max(round(height / crop) / photo.height, round(width / crop) / photo.width)
    size = int(photo.width * scale + 1e-6), int(photo.height * scale + 1e-6)
    photo = photo.resize(size, Image.Resampling[settings["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    values = np.asarray(photo.crop((left, top, left + width, top + height)), np.float32) / 255
    mean, std = (np.asarray(settings[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))


# --- study ----------------------------------------------------------------------------------------


def _study(visitor: Visitor, address: str, files: _Files) -> Taken:
    tab = visitor.tab
    visitor.open(f"{address}/study_setup")
    for label, value in (
        ("Images", STUDY_IMAGES),
        ("Raters", 2),
        ("Attention checks", STUDY_CHECKS),
    ):
        tab.get_by_label(label, exact=True).fill(str(value))
        tab.keyboard.press("Tab")
        visitor.wait()
    tab.locator("label").filter(has_text="Ask whether the network is right").click()
    asked = 2 * STUDY_IMAGES + STUDY_CHECKS  # which map is better, and does it lie on the object
    visitor.see(f"Each rater answers {asked} questions")
    tab.get_by_role("button", name="Set up the study").click()
    visitor.see("Rater 2: http")
    links = re.findall(r"Rater \d: (http\S+)", tab.inner_text("body"))
    yield "links of two raters", len(set(links)), 2

    given = {}
    for rater, link in enumerate(links):
        given[rater] = _vote(visitor, link, rater)
        yield (
            f"votes of rater {rater + 1}, as kept",
            _as_clicked(files.votes(), rater),
            given[rater],
        )

    visitor.open(f"{address}/study_setup")
    pairs = _pairs(visitor)
    yield (
        "how far the raters are",
        (pairs["Raters who have begun"], pairs["Votes"]),
        ("2 of 2", f"{2 * VOTES_EACH} of {2 * asked}"),
    )
    yield from _read_votes(visitor, address, files)


def _vote(visitor: Visitor, link: str, rater: int) -> list[str]:
    """Vote ten times by one link, the first rater with the mouse, the second by keys."""
    tab = visitor.tab
    visitor.open(link)
    tab.get_by_role("radiogroup").nth(2).wait_for()
    for group in tab.get_by_role("radiogroup").all():
        group.locator("label").nth(rater).click()
    tab.get_by_role("button", name="Start").click()
    given: list[str] = []
    for place in range(VOTES_EACH):
        visitor.see(re.compile(rf"^{place} of \d+ answered"))
        visitor.wait()  # the buttons of the question before are gone
        answer = _answer_to(visitor, rater, place)
        button = tab.get_by_role("button", name=ANSWERS[answer])
        button.wait_for()  # before it is there, nothing listens to its key
        if rater:
            tab.keyboard.press(str(1 + list(ANSWERS).index(answer)))
        else:
            button.click()
        given.append(answer)
    visitor.see(re.compile(rf"^{VOTES_EACH} of \d+ answered"))
    return given


def _answer_to(visitor: Visitor, rater: int, place: int) -> str:
    """Return what a rater who looks says: never the blank decoy; else one after the other."""
    sources = visitor.tab.locator(".lm-study img").evaluate_all("all => all.map(one => one.src)")
    left, right = (_spread(source) for source in sources[1:])
    if min(left, right) < 2:
        return "left" if left > right else "right"
    turns = (("left", "right", "left", "same", "right", "cant"), ("right", "left", "same", "left"))
    return turns[rater][place % len(turns[rater])]


def _spread(source: str) -> float:
    """Return the standard deviation of a picture's pixels, from its data URI."""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        return float(np.asarray(picture, np.float32).std())


def _as_clicked(votes: pd.DataFrame, rater: int) -> list[str]:
    """Return what a rater clicked, from what the database says of it."""
    clicked = []
    for vote in votes[votes.rater == rater].itertuples():
        if vote.answer in ("same", "cant"):
            clicked.append(vote.answer)
        else:
            after = vote.answer in ("after", "real")
            clicked.append("left" if after == (vote.left_map == "after") else "right")
    return clicked


def _read_votes(visitor: Visitor, address: str, files: _Files) -> Taken:
    tab = visitor.tab
    visitor.open(f"{address}/study_results")
    votes, items = files.votes(), files.study_items()
    yield (
        "votes and raters",
        *(
            re.sub(r"^.*, ", "", _plain(tab.locator(".lm-eyebrow").first.inner_text())),
            f"{len(votes)} votes of {votes.rater.nunique()} raters",
        ),
    )
    counting = votes[votes.item.map(items.check.isna())]
    cases = files.judged.set_index("path").case_before
    case = counting.item.map(items.path).map(cases).fillna(0).astype(int)
    parts = [("All images", counting)]
    parts += [(CASE_NAMES[n], counting[case == n]) for n in CASE_NAMES if (case == n).any()]
    shown = _table(visitor, "Which map is preferred")
    yield (
        "Table 3",
        [[row[0], row[1], *(cell.partition(" [")[0] for cell in row[2:6])] for row in shown],
        [[name, str(len(part)), *_shares(part.answer)] for name, part in parts],
    )
    yield "its intervals hold Wilson's", [_too_narrow(row) for row in shown], [[]] * len(shown)

    alpha = _alpha(counting)
    agreement = _table(visitor, "Do raters agree")
    yield "Krippendorff's alpha", agreement[0][1], _minus(f"{alpha:.2f}")
    checked = [row[2] for row in _table(visitor, "Rater by rater")]
    yield "attention checks failed", checked, [f"0 of {STUDY_CHECKS}"] * 2
    left = int((counting.left_map == "after").sum())
    told = tab.get_by_text("The map after stood on the left").inner_text()
    yield "sides", f"left in {left} of {len(counting)} pairs" in told, True

    with tab.expect_download() as download:
        tab.get_by_role("button", name="All votes, CSV").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8")
    rows = [
        (r["rater"], r["item"], r["task"], r["answer"]) for r in csv.DictReader(io.StringIO(lines))
    ]
    kept = [(str(v.rater + 1), str(v.item), v.task, v.answer) for v in votes.itertuples()]
    yield "votes as CSV", sorted(rows), sorted(kept)


def _shares(answers: pd.Series) -> list[str]:
    return [_percent((answers == name).mean(), 0) for name in ("before", "after", "same", "cant")]


def _too_narrow(row: Sequence[str]) -> list[str]:
    """Return the shares of a row whose interval does not hold Wilson's, give or take rounding."""
    wrong = []
    for cell in row[2:6]:
        share, low, high = map(int, re.findall(r"\d+", cell))
        votes = int(row[1])
        alone = stats.binomtest(round(share * votes / 100), votes).proportion_ci(method="wilson")
        if low > 100 * alone.low + 0.5 or high < 100 * alone.high - 0.5:
            wrong.append(cell)
    return wrong


def _alpha(votes: pd.DataFrame) -> float:
    codes = votes.answer.astype("category").cat.codes.astype(float)
    values = votes.assign(code=codes).pivot(index="rater", columns="item", values="code")
    found: float = krippendorff.alpha(values.to_numpy(), level_of_measurement="nominal")
    return found


# --- what a page shows ----------------------------------------------------------------------------


def _banners(visitor: Visitor) -> list[str]:
    return [_plain(text) for text in visitor.tab.locator(".lm-banner strong").all_inner_texts()]


def _pairs(visitor: Visitor) -> dict[str, str]:
    names, values = (
        map(_plain, visitor.tab.locator(f".lm-pairs {part}").all_inner_texts())
        for part in ("dt", "dd")
    )
    return dict(zip(names, values, strict=True))


def _table(visitor: Visitor, section: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    found = visitor.tab.evaluate(
        """heading => {
            const all = [...document.querySelectorAll('.lm-section h2, .lm-table')];
            const at = all.findIndex(one => one.tagName === 'H2' && one.innerText === heading);
            return [...all[at + 1].querySelectorAll('tbody tr')].map(
                row => [...row.cells].map(cell => cell.innerText));
        }""",
        section,
    )
    return [[_plain(cell) for cell in row] for row in found]


def _plain(text: str | None) -> str:
    return (text or "").replace("\N{NO-BREAK SPACE}", " ").strip()


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _signed(value: float) -> str:
    return _minus(f"{value:+.1f}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
