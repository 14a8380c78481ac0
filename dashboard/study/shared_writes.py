"""Votes that come at once, in SQLite: written together, by one process after the other.

SQLite lets one writer in and keeps no queue. Who finds it busy sleeps, up to 100 ms, and asks
again: with fifty raters some answers wait for seconds while later ones pass them, and each pays for
a flush of its own. Here the threads of a process queue up; the one whose turn it is writes what all
of them brought, in one transaction with one flush. Processes queue by an advisory lock on the
database's folder. Neither is needed for votes to be right, only for nobody to be left waiting: a
process that does without is still kept out by SQLite's own locks.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqlalchemy.exc import IntegrityError

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.engine import Connection, CursorResult

    _Waiting = tuple[sa.Executable, Future[int]]

__all__ = ["SharedWrites", "turn_among_processes"]


class SharedWrites:
    """Statements of several threads, committed together.

    Args:
        transaction: Gives a transaction that is on the disk when its block is left.
    """

    def __init__(self, transaction: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._transaction = transaction
        self._waiting: deque[_Waiting] = deque()
        self._turn = threading.Lock()

    def execute(self, statement: sa.Executable) -> int:
        """Return how many rows a statement changed, once it is committed; raise what it raised."""
        changed: Future[int] = Future()
        self._waiting.append((statement, changed))
        with self._turn:
            if not changed.done():  # whoever had the turn before may have written it
                self._commit([self._waiting.popleft() for _ in range(len(self._waiting))])
        return changed.result()

    def _commit(self, waiting: Sequence[_Waiting]) -> None:
        try:
            with self._transaction() as connection:
                counts = [
                    cast("CursorResult[object]", connection.execute(statement)).rowcount
                    for statement, _ in waiting
                ]
        except BaseException as error:
            if isinstance(error, IntegrityError) and len(waiting) > 1:
                for one in waiting:  # one that is refused takes none of the others with it
                    self._commit([one])
                return
            for _, changed in waiting:  # nobody waits for what will not come
                changed.set_exception(error)
        else:
            for (_, changed), count in zip(waiting, counts, strict=True):
                changed.set_result(count)


@contextmanager
def turn_among_processes(folder: Path) -> Iterator[None]:
    """Wait for one's turn among the processes that write in a folder; it ends with the block.

    Where there is no such lock, or the folder's file system has none, the block runs at once.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    lock = None
    try:
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        if lock is not None:
            os.close(lock)  # which ends the turn
