"""Locks between processes that the kernel drops when their holder dies.

flock, not the filelock package: a reader of a checkpoint needs a shared lock, and some mounts have
no locks at all, where everybody goes on without one.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL = 0.05  # seconds between two tries; flock itself knows no timeout


@contextmanager
def locked(
    path: Path, timeout: float = math.inf, *, shared: bool = False, create: bool = True
) -> Iterator[bool]:
    """Holds the lock of a file; yields False where the file system has none.

    timeout: seconds to wait for whoever holds it, then TimeoutError. shared: with others that
    share it. create: make the file, mode 0600, where there is none; else FileNotFoundError.
    """
    # read-only is enough for flock: whoever may read a checkpoint may hold it
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    descriptor = os.open(path, flags, 0o600)
    try:
        yield _taken(descriptor, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, timeout)
    finally:
        # by name: a process forked meanwhile has the descriptor too, and closing ours leaves its
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _taken(descriptor: int, path: Path, kind: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while True:
        try:
            # without a timeout the kernel waits for us; with one we have to ask again and again
            fcntl.flock(descriptor, kind | (fcntl.LOCK_NB if timeout < math.inf else 0))
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is held by another process") from None
            time.sleep(POLL)
        except OSError:
            return False
