"""A small budget of what `benchmarks/fuzz.py` does at length, and properties behind it."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.console import error_line, printable
from audit.errors import LayermendError, NetworkError, RunError
from audit.files import json_text, read_json
from audit.images.records import one_line
from audit.networks.bombs import check_unfolding
from audit.record_shapes import check_record, reading
from tests.fuzzing import (
    IMAGE_KINDS,
    MODEL_KINDS,
    RUN_KINDS,
    ModelSeeds,
    Outcome,
    WrongError,
    image_case,
    image_seeds,
    model_case,
    model_seeds,
    observe,
    run_case,
    run_seed,
)
from tests.mutations import Canary

FEW = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelSeeds:
    return model_seeds(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def seed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_seed(tmp_path_factory.mktemp("runs"))


def assert_harmless(outcomes: list[Outcome]) -> None:
    assert [one for one in outcomes if one.ending not in ("right", "line")] == []


def fresh(folder: Path, number: int) -> Path:
    place = folder / str(number)
    place.mkdir()
    return place


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_mutated_models_are_right_or_refused_in_one_line(
    models: ModelSeeds, kind: str, tmp_path: Path
) -> None:
    outcomes = [model_case(models, kind, seed, fresh(tmp_path, seed)) for seed in range(5)]
    assert_harmless(outcomes)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_mutated_images_are_right_or_left_out_with_a_reason(kind: str, tmp_path: Path) -> None:
    seeds = image_seeds()
    assert_harmless([image_case(seeds, kind, seed, fresh(tmp_path, seed)) for seed in range(8)])


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_mutated_runs_are_read_right_or_refused_in_one_line(
    seed_run: Path, kind: str, tmp_path: Path
) -> None:
    assert_harmless([run_case(seed_run, kind, seed, fresh(tmp_path, seed)) for seed in range(3)])


# ------------------------------------------------------------------------- would it be noticed?


def unpickled(canary: Path) -> None:
    pickle.loads(pickle.dumps(Canary(canary)))


def endless(canary: Path) -> None:
    for _ in itertools.count():
        pass


def blocked(canary: Path) -> None:
    os.mkfifo(canary.parent / "pipe")
    (canary.parent / "pipe").read_bytes()


def failing(error: Exception) -> Callable[[Path], None]:
    def read(canary: Path) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "ending"),
    [
        (unpickled, "code run"),
        (endless, "hang"),
        (blocked, "hang"),
        (failing(KeyError("x")), "traceback"),
        (failing(WrongError("the good photo is gone")), "traceback"),
        (failing(NetworkError("no model file at x.pt")), "line"),
        (failing(RunError("")), "traceback"),  # no clear line
    ],
)
def test_what_must_not_happen_is_noticed(
    read: Callable[[Path], None], ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzzing.HANG_S", 0.5)
    monkeypatch.setattr("tests.fuzzing.BLOCKED_S", 0.5)
    canary = tmp_path / "canary"
    outcome = observe("models", "x", 0, canary, lambda: read(canary))
    assert outcome.ending == ending


# ------------------------------------------------------------------------- properties


@FEW
@given(st.text())
def test_what_is_printed_obeys_no_terminal(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


@FEW
@given(st.text())
def test_an_error_is_one_line_whatever_its_names(text: str) -> None:
    for error in (LayermendError(text), OSError(28, text, text), ValueError(text)):
        assert error_line(error).isprintable()
        assert len(error_line(error)) <= 1500
    assert one_line(text).isprintable() and len(one_line(text)) <= 200


@FEW
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_json_reads_back_as_it_was_and_holds_nothing_that_a_terminal_obeys(
    document: dict[str, Any],
) -> None:
    text = json_text(document)
    assert json.loads(text) == document
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in text.replace("\n", ""))
    assert not {*text} & {*"\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200f"}


@FEW
@given(JSON)
def test_any_record_is_accepted_or_refused_in_one_line(tmp_path: Path, document: Any) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": document, "metrics": document, "status": document}))
    try:
        record = read_json(path)
        check_record(record, path)
    except RunError as error:
        assert error_line(error).startswith(str(path))
    else:
        assert record["status"] is None or isinstance(record["status"], str)


@FEW
@given(st.dictionaries(st.text(), JSON, max_size=6), st.sampled_from([0, 1, 2, 4]))
def test_no_ordinary_pickle_unfolds_without_end(tmp_path: Path, value: Any, protocol: int) -> None:
    check_unfolding(pickle.dumps(value, protocol), tmp_path / "x.pt")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_billion_laughs_are_counted_and_not_built(protocol: int) -> None:
    nested: Any = ("ha",)
    for _ in range(19):
        nested = (nested, nested)
    content = pickle.dumps([nested], protocol)
    with pytest.raises(NetworkError, match="unfold into more than 1,000,000 values"):
        check_unfolding(content, Path("x.pt"))


def test_a_reader_that_stumbles_over_a_damaged_run_says_so(tmp_path: Path) -> None:
    told = "does not hold what a run holds (KeyError: 'value')"
    with pytest.raises(RunError, match=re.escape(told)), reading(tmp_path):
        {}["value"]
    with pytest.raises(RunError, match="^said before$"), reading(tmp_path):
        raise RunError("said before")
