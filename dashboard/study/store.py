"""Where studies, raters and votes are kept: `votes.sqlite` in the run, or PostgreSQL by URL.

A vote that `VoteStore.record` has acknowledged is committed and flushed: SQLite writes ahead with
`synchronous=FULL`, PostgreSQL commits synchronously. The primary key (study, rater, item, task)
lets nobody vote twice, however often a page sends an answer; the first one stays. Several processes
may write at once; with SQLite, votes that wait for each other are committed together
(`shared_writes`).

Of a rater's link only the SHA-256 of its token is kept. Run folders are copied and mailed, and a
token is worth a rater's votes; 256 random bits need no salt. The price is that a link is shown
once, and a lost one is replaced by a new one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from audit.errors import UsageError, VotesError
from audit.runs import Run, list_runs, open_run
from dashboard.study import VOTES_VARIABLE
from dashboard.study.design import (
    BACKGROUND,
    LEVELS,
    Question,
    Side,
    StudyDesign,
    Task,
    answer_meaning,
)
from dashboard.study.shared_writes import SharedWrites, turn_among_processes

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection, CursorResult, Engine

__all__ = [
    "Rater",
    "Study",
    "Vote",
    "VoteStore",
    "check_url",
    "find_study",
    "store_of",
]

VOTES_FILE = "votes.sqlite"
SCHEMA_VERSION = 1
_BUSY_S = 30.0
_ATTEMPTS = 20

_tables = sa.MetaData()
_studies = sa.Table(
    "studies",
    _tables,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("run", sa.Text, nullable=False),
    sa.Column("repair", sa.Text, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("created_utc", sa.String(40), nullable=False),
    sa.Column("design", sa.JSON, nullable=False),
)
_raters = sa.Table(
    "raters",
    _tables,
    sa.Column("study", sa.ForeignKey("studies.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("created_utc", sa.String(40), nullable=False),
    sa.Column("background", sa.JSON(none_as_null=True)),
)
_votes = sa.Table(
    "votes",
    _tables,
    sa.Column("study", sa.String(32), primary_key=True),
    sa.Column("rater", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("item", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("task", sa.String(16), primary_key=True),
    sa.Column("left_map", sa.String(8)),
    sa.Column("shown_map", sa.String(8)),
    sa.Column("answer", sa.String(16), nullable=False),
    sa.Column("seconds", sa.Float),
    sa.Column("created_utc", sa.String(40), nullable=False),
    sa.ForeignKeyConstraint(["study", "rater"], ["raters.study", "raters.number"]),
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study of one repair."""

    id: str
    run: str
    repair: str
    title: str
    created_utc: str
    design: StudyDesign


@dataclass(frozen=True, kw_only=True)
class Rater:
    """One rater; `background` is a level of `LEVELS` by question, None until it was answered."""

    study: str
    number: int
    background: Mapping[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One answer, with the sides undone as `answer_meaning` does.

    Attributes:
        left: The map on the left, in `prefer`.
        shown: The map that was shown, in the other tasks.
        seconds: From the question on the screen to the answer, None where it is not known.
    """

    rater: int
    item: int
    task: Task
    answer: str
    left: Side | None
    shown: Side | None
    seconds: float | None
    created_utc: str


def check_url(url: str) -> None:
    """Raise UsageError for a database that votes cannot be kept in."""
    _parsed(url)


def store_of(run: Run, *, create: bool = False) -> VoteStore | None:
    """Return the votes of a run: those at `LAYERMEND_VOTES`, or its `votes.sqlite`.

    Args:
        create: Make the file where there is none; else None comes back.
    """
    url = os.environ.get(VOTES_VARIABLE)
    if url:
        return _opened(url)
    path = (run.path / VOTES_FILE).resolve()
    if not path.is_file():
        if not create:
            return None
        VoteStore(_file_url(path)).close()
    return _opened(_file_url(path), path.stat().st_ino)


def find_study(root: Path, study_id: str) -> tuple[Run, VoteStore, Study] | None:
    """Return a study with its run and store, None where no run under `root` has it.

    Args:
        root: A run folder, or a folder of runs.
    """
    runs = [open_run(root)] if (root / Run.record).is_file() else list_runs(root)
    for run in runs:
        store = store_of(run)
        study = store.study(study_id) if store else None
        if store and study and study.run == run.name:
            return run, store, study
    return None


class VoteStore:
    """A database of studies, raters and votes.

    Raises VotesError wherever the database cannot be reached, read or written.
    """

    def __init__(self, url: str) -> None:
        parsed = _parsed(url)
        self.place = parsed.render_as_string(hide_password=True)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        self._folder = Path(parsed.database or "").parent  # of an SQLite file
        self._shared = SharedWrites(self._write)
        with self._problems():
            self._engine = _engine(parsed)
            self._prepare()

    def close(self) -> None:
        self._engine.dispose()

    # --- studies and raters -----------------------------------------------------------------------

    def create_study(
        self, *, run: str, repair: str, title: str, design: StudyDesign, raters: int
    ) -> tuple[Study, list[str]]:
        """Return a new study and the tokens of its raters, which are nowhere else to be found."""
        study = Study(
            id=secrets.token_urlsafe(9),
            run=run,
            repair=repair,
            title=title,
            created_utc=_now(),
            design=design,
        )
        tokens = [secrets.token_urlsafe(32) for _ in range(raters)]
        row = {**vars(study), "design": design.as_dict(), "schema_version": SCHEMA_VERSION}
        with self._write() as connection:
            connection.execute(sa.insert(_studies).values(row))
            if tokens:
                rows = [_rater_row(study.id, number, token) for number, token in enumerate(tokens)]
                connection.execute(sa.insert(_raters), rows)
        return study, tokens

    def add_raters(self, study_id: str, raters: int) -> list[tuple[int, str]]:
        """Return the numbers and tokens of further raters of a study."""
        tokens = [secrets.token_urlsafe(32) for _ in range(raters)]
        for attempt in range(_ATTEMPTS):  # another process may add some at the same moment
            try:
                with self._write() as connection:
                    last = sa.select(sa.func.max(_raters.c.number))
                    known = connection.scalar(last.where(_raters.c.study == study_id))
                    first = 0 if known is None else int(known) + 1
                    rows = [
                        _rater_row(study_id, first + n, token) for n, token in enumerate(tokens)
                    ]
                    connection.execute(sa.insert(_raters), rows)
                return [(first + n, token) for n, token in enumerate(tokens)]
            except IntegrityError as error:
                if attempt == _ATTEMPTS - 1:
                    raise VotesError(f"no raters could be added to study {study_id}") from error
        raise AssertionError  # the last attempt returns or raises

    def new_token(self, study_id: str, number: int) -> str:
        """Return a new token for a rater whose link was lost; the old one is worth nothing then."""
        token = secrets.token_urlsafe(32)
        change = (
            sa.update(_raters)
            .where(_raters.c.study == study_id, _raters.c.number == number)
            .values(token_sha256=_digest(token))
        )
        with self._write() as connection:
            if not _changed(connection.execute(change)):
                raise VotesError(f"study {study_id} has no rater {number + 1}")
        return token

    def studies(self, run: str) -> list[Study]:
        """Return the studies of a run, newest first."""
        query = sa.select(_studies).where(_studies.c.run == run)
        with self._read() as connection:
            rows = connection.execute(query.order_by(_studies.c.created_utc.desc())).mappings()
            return [_study(row) for row in rows.all()]

    def study(self, study_id: str) -> Study | None:
        with self._read() as connection:
            query = sa.select(_studies).where(_studies.c.id == study_id)
            row = connection.execute(query).mappings().first()
        return None if row is None else _study(row)

    def rater(self, study_id: str, token: str) -> Rater | None:
        """Return the rater whose link holds this token, None for a token of nobody."""
        query = sa.select(_raters).where(
            _raters.c.study == study_id, _raters.c.token_sha256 == _digest(token)
        )
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _rater(row)

    def raters(self, study_id: str) -> list[Rater]:
        """Return the raters of a study by number."""
        query = sa.select(_raters).where(_raters.c.study == study_id).order_by(_raters.c.number)
        with self._read() as connection:
            return [_rater(row) for row in connection.execute(query).mappings().all()]

    def save_background(self, rater: Rater, background: Mapping[str, int]) -> None:
        """Keep what a rater said about themselves; the first answer stays.

        Args:
            background: A place in `LEVELS` for each question of `BACKGROUND`.
        """
        if set(background) != set(BACKGROUND) or any(
            level not in range(len(LEVELS)) for level in background.values()
        ):
            raise ValueError(f"background {dict(background)}: expected a level for {[*BACKGROUND]}")
        change = (
            sa.update(_raters)
            .where(_raters.c.study == rater.study, _raters.c.number == rater.number)
            .where(_raters.c.background.is_(None))
            .values(background=dict(background))
        )
        with self._write() as connection:
            connection.execute(change)

    # --- votes ------------------------------------------------------------------------------------

    def record(
        self,
        rater: Rater,
        question: Question,
        answer: str,
        *,
        seconds: float | None = None,
        revise: bool = False,
    ) -> bool:
        """Keep an answer; return once it is committed, whether it is new.

        Args:
            answer: One of the task's `ANSWERS`, as the rater saw them.
            revise: Replace the answer that this rater gave before, instead of keeping that.

        Raises:
            ValueError: The task does not offer the answer.
            VotesError: It was not kept; it can be sent again.
        """
        row = {
            "study": rater.study,
            "rater": rater.number,
            "item": question.item.number,
            "task": question.task,
            "left_map": question.left,
            "shown_map": question.shown,
            "answer": answer_meaning(question, answer),
            "seconds": seconds,
            "created_utc": _now(),
        }
        insert = (sqlite.insert if self._sqlite else postgresql.insert)(_votes).values(row)
        key = ("study", "rater", "item", "task")
        if revise:
            changes = {name: value for name, value in row.items() if name not in key}
            insert = insert.on_conflict_do_update(index_elements=list(key), set_=changes)
        else:
            insert = insert.on_conflict_do_nothing(index_elements=list(key))
        if self._sqlite:
            return self._shared.execute(insert) == 1
        with self._write() as connection:
            return _changed(connection.execute(insert)) == 1

    def votes(self, study_id: str, rater: int | None = None) -> list[Vote]:
        """Return the votes of a study, or of one of its raters, in the order they were given."""
        query = sa.select(_votes).where(_votes.c.study == study_id)
        if rater is not None:
            query = query.where(_votes.c.rater == rater)
        query = query.order_by(_votes.c.created_utc, _votes.c.rater, _votes.c.item, _votes.c.task)
        with self._read() as connection:
            return [_vote(row) for row in connection.execute(query).mappings().all()]

    # --- the database -----------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        try:
            with self._problems(), self._engine.connect() as connection:
                yield connection
        except ValueError as error:  # what should be JSON is not
            raise VotesError(f"votes at {self.place} are damaged ({error})") from error

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """Yield a transaction that is on the disk when the block is left."""
        with self._problems(), self._engine.connect() as connection:
            # Connected first: where others wait too, none is the last to close the file, which
            # would write everything back into it, vote by vote.
            turn = turn_among_processes(self._folder) if self._sqlite else nullcontext()
            with turn, connection.begin():
                if not self._sqlite:  # a server may be set up to answer before it has flushed
                    connection.execute(sa.text("SET LOCAL synchronous_commit TO on"))
                yield connection

    @contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()
            raise VotesError(
                f"votes at {self.place} cannot be read or written ({reason[0] if reason else error}"
                "); is the database there, and may it be written?"
            ) from error

    def _prepare(self) -> None:
        """Make the tables where they are missing; other processes may be doing the same."""
        for attempt in range(_ATTEMPTS):
            try:
                with self._engine.connect() as connection:
                    if self._sqlite:
                        # Kept in the file; the first connections may get in each other's way.
                        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                    for table in _tables.sorted_tables:
                        connection.execute(CreateTable(table, if_not_exists=True))
                    connection.commit()
                return
            except (IntegrityError, OperationalError):
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.05)


@lru_cache(maxsize=64)
def _opened(url: str, _inode: int | None = None) -> VoteStore:
    """Return an open store; a file that was deleted and made again is another one."""
    return VoteStore(url)


def _file_url(path: Path) -> str:
    return sa.URL.create("sqlite", database=str(path)).render_as_string()


def _parsed(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise UsageError(
            "the votes' URL cannot be read; expected postgresql://USER@HOST/NAME or "
            "sqlite:////PATH/votes.sqlite"
        ) from error
    if backend in ("postgresql", "postgres"):
        try:
            import psycopg  # noqa: F401  # SQLAlchemy loads it by name
        except ImportError as error:
            raise UsageError(
                "votes in PostgreSQL need psycopg: pip install 'layermend[postgresql]'"
            ) from error
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed.set(drivername="sqlite+pysqlite")
    raise UsageError(
        f"votes cannot be kept in {parsed.render_as_string(hide_password=True)}; expected "
        "postgresql://USER@HOST/NAME or sqlite:////PATH/votes.sqlite"
    )


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        # A connection that died with the server is replaced before it is used.
        return sa.create_engine(url, pool_pre_ping=True, pool_size=8, max_overflow=24)
    # No pool: when the last connection closes, every vote is in the one file, and a copy of the run
    # has them all. An open one keeps the latest in `votes.sqlite-wal`.
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_S}, poolclass=sa.NullPool)

    @sa.event.listens_for(engine, "connect")
    def _settle(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA trusted_schema=OFF")  # the file may come from somebody else
        cursor.close()

    return engine


def _changed(result: Any) -> int:
    return cast("CursorResult[Any]", result).rowcount


def _rater_row(study_id: str, number: int, token: str) -> dict[str, Any]:
    return {
        "study": study_id,
        "number": number,
        "token_sha256": _digest(token),
        "created_utc": _now(),
    }


def _study(row: Mapping[Any, Any]) -> Study:
    if row["schema_version"] > SCHEMA_VERSION:
        raise VotesError(
            f"study {row['id']} was made by a newer layermend (schema version "
            f"{row['schema_version']}, this one reads {SCHEMA_VERSION}); update layermend"
        )
    try:
        design = StudyDesign.from_dict(row["design"])
    except (KeyError, TypeError, ValueError) as error:
        raise VotesError(f"study {row['id']} is damaged ({error}); set up a new one") from error
    return Study(
        id=row["id"],
        run=row["run"],
        repair=row["repair"],
        title=row["title"],
        created_utc=row["created_utc"],
        design=design,
    )


def _rater(row: Mapping[Any, Any]) -> Rater:
    return Rater(study=row["study"], number=row["number"], background=row["background"])


def _vote(row: Mapping[Any, Any]) -> Vote:
    return Vote(
        rater=row["rater"],
        item=row["item"],
        task=row["task"],
        answer=row["answer"],
        left=row["left_map"],
        shown=row["shown_map"],
        seconds=row["seconds"],
        created_utc=row["created_utc"],
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
