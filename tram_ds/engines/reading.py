"""theta_t while steps go on: for a thread that writes it somewhere."""

from __future__ import annotations

import threading

from torch import Tensor

from tram_ds.engines.shards import Shards


class Reading:
    """theta_t from the call of Engine.reading() until close(), read by another thread.

    Nothing is copied for it. Where the masters are the working copy, every move keeps a copy of
    theta_t of its own to come back to, and what is read from then on is that; the descent, which
    is the first to change masters and moments for good, waits for close(). So does a load.
    """

    def __init__(self, theta: Shards):
        self._theta: Shards | None = theta
        # one reader and the thread that trains: no move begins while a part is being copied
        self._lock, self._closed = threading.Lock(), threading.Event()

    def read(self, index: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of piece number `index`, in its logical order: a copy on the
        CPU."""
        with self._lock:
            assert self._theta is not None, "read before close()"
            # copy: of a tensor on the CPU .to() is the same memory, which the next move overwrites
            return self._theta[index].reshape(-1)[start:stop].to("cpu", copy=True)

    def keep(self, theta: Shards) -> None:
        """Reads `theta`, which holds the same values and is written by nobody, from now on."""
        with self._lock:
            if not self._closed.is_set():
                self._theta = theta

    def close(self) -> None:
        """Nothing is read any more."""
        with self._lock:
            # frees a snapshot that nobody else holds any more
            self._theta = None
        self._closed.set()

    def wait(self) -> None:
        """Returns when it is closed."""
        self._closed.wait()
