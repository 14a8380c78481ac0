"""Votes are kept once, by whoever holds the link, and an acknowledged one is on the disk."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import sqlalchemy as sa

from audit.errors import UsageError, VotesError
from audit.runs import start_run
from dashboard.study import VOTES_VARIABLE
from dashboard.study.design import BACKGROUND, questions
from dashboard.study.store import Rater, Study, VoteStore, check_url, find_study, store_of
from tests.dashboard.study_material import design, side_of

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    opened = VoteStore(f"sqlite:///{tmp_path / 'votes.sqlite'}")
    yield opened
    opened.close()


def _study(store: VoteStore, raters: int = 2, run: str = "run") -> tuple[Study, list[str]]:
    return store.create_study(
        run=run, repair="repair", title="Title", design=design(4, 2), raters=raters
    )


def test_a_study_comes_back_as_it_was_made(store: VoteStore) -> None:
    first, _ = _study(store)
    second, _ = _study(store)
    assert store.study(first.id) == first
    assert store.studies("run") == [second, first]
    assert store.studies("another") == [] and store.study("nothing") is None


def test_only_the_holder_of_a_link_is_its_rater(store: VoteStore, tmp_path: Path) -> None:
    study, tokens = _study(store, raters=3)
    other, _ = _study(store)
    assert [store.rater(study.id, token).number for token in tokens] == [0, 1, 2]  # type: ignore[union-attr]
    assert store.rater(study.id, "guess") is None
    assert store.rater(other.id, tokens[0]) is None
    assert all(len(token) >= 43 for token in tokens)  # 256 bits in base64
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("votes.sqlite*"))
    assert not [token for token in tokens if token.encode() in kept]


def test_a_new_link_replaces_the_lost_one(store: VoteStore) -> None:
    study, tokens = _study(store)
    token = store.new_token(study.id, 1)
    assert store.rater(study.id, tokens[1]) is None
    assert store.rater(study.id, token).number == 1  # type: ignore[union-attr]
    with pytest.raises(VotesError, match="no rater 10"):
        store.new_token(study.id, 9)


def test_an_answer_sent_twice_counts_once_and_the_first_stays(store: VoteStore) -> None:
    study, _ = _study(store)
    rater = store.raters(study.id)[0]
    prefer = [q for q in questions(study.design, 0) if q.task == "prefer" and not q.item.check]
    assert store.record(rater, prefer[0], side_of(prefer[0], "after"), seconds=2.5)
    assert not store.record(rater, prefer[0], side_of(prefer[0], "before"))
    [vote] = store.votes(study.id)
    assert (vote.answer, vote.left, vote.shown, vote.seconds) == (
        "after",
        prefer[0].left,
        None,
        2.5,
    )
    assert store.record(rater, prefer[0], "same", revise=True)
    assert [vote.answer for vote in store.votes(study.id)] == ["same"]


def test_an_answer_that_was_not_offered_is_refused(store: VoteStore) -> None:
    study, _ = _study(store)
    with pytest.raises(ValueError, match="'maybe'"):
        store.record(store.raters(study.id)[0], questions(study.design, 0)[0], "maybe")
    assert store.votes(study.id) == []


def test_background_is_kept_once_and_whole(store: VoteStore) -> None:
    study, _ = _study(store)
    rater = store.raters(study.id)[0]
    assert rater.background is None
    answers = dict(zip(BACKGROUND, (0, 3, 1), strict=True))
    store.save_background(rater, answers)
    store.save_background(rater, dict.fromkeys(BACKGROUND, 2))
    assert store.raters(study.id)[0].background == answers
    for wrong in ({}, dict.fromkeys(BACKGROUND, 4)):
        with pytest.raises(ValueError, match="background"):
            store.save_background(rater, wrong)


def test_raters_may_be_added_by_several_at_once(store: VoteStore) -> None:
    study, _ = _study(store)
    with ThreadPoolExecutor(6) as pool:
        added = list(pool.map(lambda _: store.add_raters(study.id, 2), range(6)))
    numbers = [number for some in added for number, _ in some]
    assert sorted(numbers) == list(range(2, 14))
    assert [rater.number for rater in store.raters(study.id)] == list(range(14))


def test_sqlite_flushes_every_vote_and_waits_for_others(store: VoteStore) -> None:
    with store._engine.connect() as connection:
        told = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }
    full = 2
    assert told == {
        "journal_mode": "wal", "synchronous": full, "busy_timeout": 30_000, "foreign_keys": 1
    }  # fmt: skip


def test_no_vote_is_lost_or_doubled_among_processes_one_of_which_is_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'votes.sqlite'}"
    store = VoteStore(url)
    study, _ = store.create_study(
        run="run", repair="repair", title="", design=design(20, 2), raters=3
    )
    asked = study.design.votes_per_rater
    # Each process votes for two raters, so that every rater's answers are sent by two.
    voters = [_voter(url, study.id, f"{n},{(n + 1) % 3}") for n in range(3)]
    lines: list[str] = []
    for _ in range(10):
        lines.append(voters[0].stdout.readline())  # type: ignore[union-attr]
    voters[0].send_signal(signal.SIGKILL)
    outputs = [voter.communicate(timeout=60) for voter in voters]
    assert [voter.returncode for voter in voters] == [-signal.SIGKILL, 0, 0], outputs
    acknowledged = {
        line for line in [*lines, *"".join(out for out, _ in outputs).splitlines(keepends=True)]
        if line.endswith("\n")
    }  # fmt: skip
    kept = [f"{v.rater} {v.item} {v.task}\n" for v in store.votes(study.id)]
    assert len(kept) == len(set(kept)) == 3 * asked
    assert acknowledged <= set(kept)
    assert sqlite3.connect(tmp_path / "votes.sqlite").execute("PRAGMA integrity_check").fetchone()
    store.close()


def test_votes_that_wait_are_committed_together(store: VoteStore) -> None:
    study, _ = _study(store, raters=6)
    commits: list[object] = []
    sa.event.listen(store._engine, "commit", commits.append)
    with ThreadPoolExecutor(6) as pool:
        with store._shared._turn:  # somebody is writing
            told = [pool.submit(_first_vote, store, study, rater) for rater in range(6)]
            _await(lambda: len(store._shared._waiting) == 6)
            assert not any(future.done() for future in told) and store.votes(study.id) == []
        assert all(future.result() for future in told)
    assert sorted(vote.rater for vote in store.votes(study.id)) == list(range(6))
    assert len(commits) == 1


def test_a_vote_that_is_refused_takes_none_of_the_others_with_it(store: VoteStore) -> None:
    study, _ = _study(store, raters=2)
    with ThreadPoolExecutor(3) as pool:
        with store._shared._turn:
            told = [pool.submit(_first_vote, store, study, rater) for rater in (0, 9, 1)]
            _await(lambda: len(store._shared._waiting) == 3)
        assert told[0].result() and told[2].result()
        with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"):
            told[1].result()
    assert sorted(vote.rater for vote in store.votes(study.id)) == [0, 1]


def test_a_writer_waits_for_its_turn_among_processes(store: VoteStore, tmp_path: Path) -> None:
    study, _ = _study(store)
    hold = (
        "import fcntl, os, sys\n"
        "lock = os.open(sys.argv[1], os.O_RDONLY)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        told = pool.submit(_first_vote, store, study, 0)
        _await(lambda: store._shared._turn.locked())
        assert not wait([told], timeout=0.3).done
        other.stdin.close()
        assert told.result()
    assert len(store.votes(study.id)) == 1


def _first_vote(store: VoteStore, study: Study, number: int) -> bool:
    rater = Rater(study=study.id, number=number, background=None)
    return store.record(rater, questions(study.design, number)[0], "cant")


def _await(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within half a minute")


def _voter(url: str, study_id: str, raters: str) -> subprocess.Popen[str]:
    code = (
        "import sys\n"
        "from dashboard.study.design import questions\n"
        "from dashboard.study.store import VoteStore\n"
        "url, study_id, raters = sys.argv[1:]\n"
        "store = VoteStore(url)\n"
        "study = store.study(study_id)\n"
        "for rater in store.raters(study_id):\n"
        "    if str(rater.number) not in raters.split(','): continue\n"
        "    for question in questions(study.design, rater.number):\n"
        "        store.record(rater, question, 'cant')\n"
        "        print(rater.number, question.item.number, question.task, flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, url, study_id, raters],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_votes_of_a_run_lie_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VOTES_VARIABLE, raising=False)
    run, other = start_run(tmp_path, "one"), start_run(tmp_path, "two")
    assert store_of(run) is None and not (run.path / "votes.sqlite").exists()
    store = store_of(run, create=True)
    assert store is not None and (run.path / "votes.sqlite").is_file()
    study, _ = _study(store, run=run.name)
    found = find_study(tmp_path, study.id)
    assert found is not None and found[0].name == run.name and found[2] == study
    assert find_study(run.path, study.id) is not None
    assert find_study(other.path, study.id) is None and find_study(tmp_path, "guess") is None


def test_votes_that_were_deleted_are_gone_and_new_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VOTES_VARIABLE, raising=False)
    run = start_run(tmp_path, "one")
    _study(store_of(run, create=True), run=run.name)  # type: ignore[arg-type]
    for path in run.path.glob("votes.sqlite*"):
        path.unlink()
    assert store_of(run) is None
    store = store_of(run, create=True)
    assert store is not None and store.studies(run.name) == []
    study, _ = _study(store, run=run.name)
    copy = tmp_path / "copy.sqlite"
    shutil.copy(run.path / "votes.sqlite", copy)
    assert VoteStore(f"sqlite:///{copy}").study(study.id) == study


def test_one_database_may_serve_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VOTES_VARIABLE, f"sqlite:///{tmp_path / 'all.sqlite'}")
    runs = [start_run(tmp_path / "runs", name) for name in ("one", "two")]
    stores = [store_of(run) for run in runs]
    studies = [_study(store, run=run.name)[0] for store, run in zip(stores, runs, strict=True)]  # type: ignore[arg-type]
    for run, study in zip(runs, studies, strict=True):
        found = find_study(tmp_path / "runs", study.id)
        assert found is not None and found[0].name == run.name
    assert not list((tmp_path / "runs").rglob("votes.sqlite"))


@pytest.mark.parametrize("url", ["nonsense", "mysql://localhost/votes", "sqlite://"])
def test_other_databases_are_wrong_usage_with_the_remedy(url: str) -> None:
    with pytest.raises(UsageError, match="postgresql://USER@HOST/NAME"):
        check_url(url)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(VotesError) as caught:
        VoteStore("postgresql://me:secret@127.0.0.1:1/votes?connect_timeout=2")
    assert "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_votes_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "votes.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(VotesError, match="cannot be read or written") as caught:
        VoteStore(f"sqlite:///{tmp_path / 'votes.sqlite'}")
    assert "\n" not in str(caught.value)


def test_a_newer_or_damaged_study_says_so(store: VoteStore) -> None:
    study, _ = _study(store)
    table = sa.table("studies", sa.column("schema_version"), sa.column("design", sa.JSON))
    with store._engine.begin() as connection:
        connection.execute(sa.update(table).values(design={"seed": 0}))
    with pytest.raises(VotesError, match="damaged"):
        store.study(study.id)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE studies SET design = '{'")
    with pytest.raises(VotesError, match="damaged"):
        store.studies("run")
    with store._engine.begin() as connection:
        connection.execute(sa.update(table).values(schema_version=99, design={}))
    with pytest.raises(VotesError, match="update layermend"):
        store.study(study.id)


def test_the_study_needs_neither_torch_nor_streamlit() -> None:
    check = (
        "import sys, dashboard.study.results, dashboard.study.store\n"
        "assert not {'torch', 'streamlit'} & set(sys.modules)\n"
    )
    environment = {**os.environ, VOTES_VARIABLE: ""}
    subprocess.run(
        [sys.executable, "-c", check], check=True, cwd=PROJECT, env=environment, timeout=60
    )
