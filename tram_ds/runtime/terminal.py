"""The terminal is not the run: what cannot be shown is dropped, and the work goes on.

Standard descriptors that came closed are opened on /dev/null, so that no checkpoint becomes
somebody's stdout. A reader that went away (`| head -1`), a full disk under the log or a terminal
that hung up raises nothing, in no print, progress bar, logging handler or last flush.
"""

from __future__ import annotations

import errno
import io
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# seconds that a pipe may take: to be read where it was made non-blocking and is full, to be left by
# what a launcher leaves behind
PATIENCE = 10.0


class Tolerant(io.RawIOBase):
    """The raw stream of an open descriptor, whose writes never fail.

    lost: why text was dropped, but for a reader that went away, who wants no more of it; else None.
    After that reader, the descriptor leads to /dev/null, also for compiled code and children.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Bytes taken: those written, or all of them where they cannot be."""
        try:
            return self._write(data)
        except BrokenPipeError:
            _lead_nowhere(self._descriptor)
        except OSError as error:
            self.lost = error
        return memoryview(data).nbytes

    def _write(self, data: ReadableBuffer) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                if not select.select([], [self._descriptor], [], PATIENCE)[1]:
                    raise


def guard() -> None:
    """The first thing a program does: it then needs no stdin, stdout or stderr to go on.

    A stream that somebody has put in place of sys.stdout or sys.stderr (a test, a notebook) stays.
    """
    for descriptor in (0, 1, 2):
        if not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so this very one
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.stderr)


def reported(code: int = 0) -> int:
    """The exit code of a command whose work is what it prints: `code`, but 2 where a part of the
    text could not be written for another reason than that its reader went away."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    sys.stdout.flush()
    if not isinstance(raw, Tolerant) or raw.lost is None:
        return code
    print(f"error: not all of this report could be written: {raw.lost}", file=sys.stderr)
    return code or 2


class Relay:
    """A running program that does not know how to lose its terminal, such as a launcher: its stdout
    and stderr go through ours. Where ours are terminals it has them itself: progress bars are for
    terminals. OSError where it cannot be started."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        ours = (sys.stdout, sys.stderr)
        outputs = [None if stream.isatty() else subprocess.PIPE for stream in ours]
        self.process = subprocess.Popen(command, env=env, stdout=outputs[0], stderr=outputs[1])
        pairs = zip((self.process.stdout, self.process.stderr), ours, strict=True)
        self._copying = [threading.Thread(target=_copy, args=p, daemon=True) for p in pairs if p[0]]
        for thread in self._copying:
            thread.start()

    def wait(self) -> int:
        """Its exit code, as subprocess gives it, when it has ended."""
        code = self.process.wait()
        for thread in self._copying:
            thread.join(PATIENCE)
        return code


def _copy(source: IO[bytes], to: TextIO) -> None:
    """Bytes as they come; as text where a test or a notebook took the stream's place."""
    assert isinstance(source, io.BufferedReader)
    while data := source.read1(1 << 16):
        if (buffer := getattr(to, "buffer", None)) is None:
            to.write(data.decode(errors="replace"))
        else:
            buffer.write(data)
        to.flush()


def _stream(descriptor: int, before: TextIO | None) -> TextIO:
    """A text stream as `before` is one; what an encoding lacks is written as an escape."""
    assert before is None or isinstance(before, io.TextIOWrapper)
    if before is not None:
        before.flush()
    errors = before.errors if before is not None else "strict"
    return io.TextIOWrapper(
        io.BufferedWriter(Tolerant(descriptor)),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace" if errors == "strict" else errors,
        line_buffering=before is None or before.line_buffering or before.write_through,
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return False
    return True


def _lead_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
