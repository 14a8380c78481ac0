"""The database that keeps a search's trials: opened, named without its password, and its failures
told in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from audit.errors import RunError, UsageError

if TYPE_CHECKING:
    import optuna
    from sqlalchemy import URL

__all__ = ["failures_told", "open_storage", "without_password"]

_EXPECTED = "expected postgresql://USER@HOST/NAME or sqlite:////PATH/study.db"


def open_storage(url: str, *, heartbeat_s: int) -> optuna.storages.RDBStorage:
    """Return the Optuna storage at a URL; its tables are made where they are missing.

    Raises:
        UsageError: The URL cannot be read, or no driver for such a database is installed.
        RunError: The database cannot be reached or written to.
    """
    import optuna

    parsed = _parsed(url)
    with failures_told(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return optuna.storages.RDBStorage(
                parsed.render_as_string(hide_password=False), heartbeat_interval=heartbeat_s
            )
        except ImportError as error:
            extra = ": pip install 'layermend[postgresql]'" if _is_postgresql(parsed) else ""
            raise UsageError(
                f"no driver for --storage {parsed.drivername} is installed{extra}"
            ) from error


@contextmanager
def failures_told(url: str) -> Iterator[None]:
    """Raise RunError, in one line, for what the database at a URL does not do."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        # SQLAlchemy quotes the driver, and adds the statement and a link.
        cause = getattr(error, "orig", None) or error.__cause__ or error
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise RunError(
            f"the study's database {_parsed(url).render_as_string()} cannot be used: {why}; "
            "what was tried is kept there, and the same command again does the rest"
        ) from error


def without_password(command: Sequence[str], url: str | None) -> list[str]:
    """Return a command line as it may be recorded."""
    if url is None:
        return list(command)
    return [word.replace(url, _parsed(url).render_as_string()) for word in command]


def _parsed(url: str) -> URL:
    """Return the URL, PostgreSQL by psycopg where it names no driver; it shows no password."""
    import sqlalchemy as sa
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except ArgumentError as error:  # also where the dialect is unknown
        raise UsageError(f"--storage cannot be read; {_EXPECTED}") from error
    except ImportError:
        pass  # said where it is opened
    return parsed


def _is_postgresql(parsed: URL) -> bool:
    return parsed.drivername.startswith("postgresql")
