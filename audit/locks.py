"""A lock that one process holds, and that ends with it however it ends."""

import os
from pathlib import Path

__all__ = ["lock_file"]


def lock_file(path: Path) -> int | None:
    """Return the descriptor that holds the lock on a file, None while another process holds it.

    The lock ends when the descriptor is closed, or with the process. The file is made where it is
    missing. POSIX only.
    """
    import fcntl

    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
