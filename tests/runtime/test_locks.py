"""Locks between processes, shared and not, and where there are none."""

from __future__ import annotations

import errno
import fcntl
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tram_ds.runtime.locks import locked

HOLDER = """
import sys
from pathlib import Path
from tram_ds.runtime.locks import locked
with locked(Path(sys.argv[1]), shared=sys.argv[2] == "shared") as taken:
    print(taken, flush=True)
    sys.stdin.read()
"""


def holder(path: Path, kind: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


@pytest.mark.parametrize("theirs", ["shared", "alone"])
@pytest.mark.parametrize("ours", ["shared", "alone"])
def test_only_sharers_hold_a_lock_together(tmp_path: Path, theirs: str, ours: str) -> None:
    path = tmp_path / "lock"
    other = holder(path, theirs)
    try:
        with locked(path, timeout=0, shared=ours == "shared") as taken:
            together = taken
    except TimeoutError:
        together = False
    assert together == (theirs == ours == "shared")
    other.kill()
    other.wait()
    with locked(path, timeout=0) as taken:
        assert taken, "a lock ends with its holder, however that ended"


def test_it_is_waited_for_as_long_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="held by another process"), locked(path, 0.3):
            pass
        assert time.monotonic() - began >= 0.3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_lock_file_is_made_only_where_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none", create=False):
        pass
    assert not list(tmp_path.iterdir())


def test_without_locks_everybody_goes_on_and_knows(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", timeout=0) as taken, locked(tmp_path / "lock", timeout=0):
        assert not taken
