"""metrics.jsonl: the record of a run, one JSON object per line; everything else about metrics is
derived from it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tram_ds.runtime.files import private_dir, write_whole
from tram_ds.runtime.jsonl import decode, encode
from tram_ds.runtime.run_layout import RunFolder, superseded


class MetricsLog:
    """Appends records to `<run_dir>/metrics.jsonl` (or `name`). Construct it on rank 0 only; one
    writer per file.

    A record is strict JSON: non-finite numbers become null and their (dotted) keys are listed under
    `nonfinite`. `append` costs about 0.1 ms; lines reach the file at most about `flush_seconds`
    after the append, at `flush` and at `close`. The file is readable by its owner only, because
    recipes and metrics may be confidential.
    """

    def __init__(
        self, run_dir: str | Path, flush_seconds: float = 2.0, name: str = RunFolder.metrics
    ) -> None:
        self.path = Path(run_dir) / name
        self._flush_seconds = flush_seconds
        self._pending: list[str] = []
        self._lock = threading.Lock()  # the pending lines: held for list operations only
        self._file_lock = threading.Lock()  # the file: held while writing
        self._closed = threading.Event()
        private_dir(self.path.parent)
        # before the first append, which would go on with half a line
        _drop_torn_line(self.path)
        self._flusher = threading.Thread(
            target=self._flush_regularly, name="metrics-flush", daemon=True
        )
        self._flusher.start()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record. `step` (int) is required; `time` (unix seconds) is added; 0-d tensors
        are read."""
        if self._closed.is_set():
            raise ValueError(f"{self.path}: append after close")
        if "step" not in record:
            raise ValueError(f"{self.path}: a record needs `step`; got the keys {sorted(record)}")
        # encoded at once: the caller may go on changing what it gave
        line = encode({"step": int(record["step"]), "time": round(time.time(), 3), **record})
        with self._lock:
            self._pending.append(line)

    def flush(self) -> None:
        """Writes what is pending. Raises OSError if the disk refuses; the lines are kept for the
        next attempt."""
        with self._file_lock:
            with self._lock:
                lines, self._pending = self._pending, []
            try:
                _append_text(self.path, "".join(lines))
            except OSError:
                with self._lock:
                    self._pending[:0] = lines  # before what was appended meanwhile
                raise

    def truncate_after(self, step: int) -> None:
        """On resume from the checkpoint of `step`: records of later steps go to
        metrics.superseded.jsonl, for whoever wants to know how the run that died went on; so no
        step is written twice here, and nothing measured is lost."""
        self.flush()
        with self._file_lock:
            if not self.path.exists():
                return
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(
                keepends=True
            )
            kept = [
                line
                for line in lines
                if (record := decode(line)) is not None and record.get("step", 0) <= step
            ]
            if len(kept) < len(lines):
                dropped = [
                    line
                    for line in lines
                    if (record := decode(line)) is not None and record.get("step", 0) > step
                ]
                # before they go from here: a crash between the two leaves them twice, never nowhere
                _append_text(superseded(self.path), "".join(dropped))
                write_whole(self.path, "".join(kept))

    def close(self) -> None:
        """Writes what is pending and ends the log. A second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._flusher.join(timeout=10.0)
        self.flush()

    def _flush_regularly(self) -> None:
        while not self._closed.wait(self._flush_seconds):
            try:
                self.flush()
            except OSError:
                continue  # disk full or file server away: kept in memory, and close() reports it


def read(run_dir: str | Path, name: str = RunFolder.metrics) -> list[dict[str, Any]]:
    """All records of a run folder in order; an unreadable (torn) line is left out. No file means no
    records."""
    path = Path(run_dir) / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [record for record in map(decode, lines) if record is not None]


def _append_text(path: Path, text: str) -> None:
    """Appends whole lines: on a short write (disk full) the file goes back to its old length before
    the error."""
    if not text:
        return
    # unbuffered: a refused write is known here, and nothing is left to be written at close
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0
    ) as file:
        size = os.fstat(file.fileno()).st_size
        data = memoryview(text.encode())
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            # the lines are tried again as a whole: what half went in would stand twice
            os.ftruncate(file.fileno(), size)
            raise


def _drop_torn_line(path: Path) -> None:
    """Cuts off a last line without its newline: what a killed process was writing."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            # rfind gives -1 where there is no whole line: then all of it goes
            file.truncate(data.rfind(b"\n") + 1)
