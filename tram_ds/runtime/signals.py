"""Stopping on time: a signal sets a flag, all ranks agree on it at a step boundary; a watchdog ends
ranks that hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from tram_ds.runtime.exits import PEER

# SIGHUP: the terminal is gone
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclass
class StopRequest:
    """received: the first signal received, or None. A second signal changes nothing, so it cannot
    tear a save."""

    received: signal.Signals | None = None

    def _handle(self, number: int, _: FrameType | None) -> None:
        # nothing but this: a handler runs between any two bytecodes, inside a save too
        self.received = self.received or signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handles SIGNALS inside; afterwards they are ignored, not restored to killing: a launcher
        that signals a job which is just finishing must not make it look failed.

        SIGHUP ignored by whoever started us (nohup) stays ignored. The others are heard even then:
        a job script has them ignored while we import, so that an early one does not kill us.
        """
        # tests and notebooks: signals are the main thread's
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        heard = [n for n in SIGNALS if n not in kept]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if handler is signal.SIG_DFL else handler)


@dataclass
class Watchdog:
    """Ends this process with exit code 6 when nothing has happened for `timeout` seconds, saying
    where it was.

    A rank whose peer is dead or stopped hangs in a collective, or a launcher waits on it: every
    rank runs its own watchdog.
    """

    rank: int
    timeout: float
    step: int = 0
    phase: str = "start"
    _beat: float = field(default_factory=time.monotonic)
    _done: threading.Event = field(default_factory=threading.Event)

    def beat(self, phase: str, step: int | None = None) -> None:
        """Something happened: the clock starts again."""
        self.phase = phase
        self.step = self.step if step is None else step
        self._beat = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches inside, from a daemon thread."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        # a quarter at most, so that a short timeout is not overrun by much
        while not self._done.wait(min(1.0, self.timeout / 4)):
            idle = time.monotonic() - self._beat
            if idle > self.timeout:
                print(
                    f"rank {self.rank}: no progress for {idle:.0f} s in step {self.step}, phase "
                    f"{self.phase}: a peer is dead "
                    f"or hangs; giving up with exit code {PEER} (stacks below)",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr)
                # not sys.exit: that ends this thread alone, and the main one hangs in a collective
                os._exit(PEER)
