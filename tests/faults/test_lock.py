"""Two jobs, one run folder: who gets in, who is named, and when a dead holder is overruled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ranks
from tram_ds.runtime.exits import LOCKED, RunLocked, code_of
from tram_ds.runtime.run_lock import RunLock

pytestmark = pytest.mark.faults

HOLD = (
    "import sys, time; from tram_ds.runtime.run_lock import RunLock\n"
    "with RunLock(sys.argv[1]): print('in', flush=True); time.sleep(60)"
)
RACE = """
import sys, time
from tram_ds.runtime.run_lock import RunLock
from tram_ds.runtime.exits import RunLocked
while time.time() < float(sys.argv[2]): pass
try:
    with RunLock(sys.argv[1]): time.sleep(2); print('in')
except RunLocked: print('out')
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=ranks.environment(), stdout=subprocess.PIPE, text=True)


def foreign(run_dir: Path, seconds_ago: float, **changes: object) -> Path:
    """A lock left by a job on another host."""
    run_dir.mkdir(exist_ok=True)
    holder = {
        "host": "node7",
        "boot": "b",
        "namespace": "n",
        "pid": 1,
        "started": 1,
        "job": "41",
        "token": "t",
    }
    (run_dir / "lock").write_text(json.dumps(holder | changes))
    then = time.time() - seconds_ago
    os.utime(run_dir / "lock", (then, then))
    return run_dir


def test_the_second_job_is_told_who_is_inside(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "in\n"
    with (
        pytest.raises(RunLocked, match=f"in use by process {holder.pid} on ") as caught,
        RunLock(tmp_path),
    ):
        pass
    assert code_of(caught.value) == LOCKED and "\n" not in str(caught.value)
    os.kill(holder.pid, signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(RunLocked), RunLock(tmp_path, stale_after=0.0):
        pass
    holder.kill()
    holder.wait()
    with RunLock(tmp_path):  # a dead holder on this host is overruled at once
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock.mutex"]


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        ours = dict(lock.holder)
    foreign(tmp_path, 0, **ours | {"started": ours["started"] - 5, "token": "t"})
    with RunLock(tmp_path) as lock:
        assert json.loads((tmp_path / "lock").read_text())["token"] == lock.holder["token"] != "t"


@pytest.mark.parametrize("changes", [{}, {"pid": os.getpid(), "boot": "before the reboot"}])
def test_another_host_is_respected_until_its_heartbeat_lapses(
    tmp_path: Path, changes: dict
) -> None:
    with (
        pytest.raises(RunLocked, match=r"process \d+ on node7, job 41.*heartbeat (29|30|31) s ago"),
        RunLock(foreign(tmp_path, 30, **changes)),
    ):
        pass
    with RunLock(foreign(tmp_path, 130, **changes)):
        pass


def test_a_requeued_job_waits_for_its_own_predecessor(tmp_path: Path) -> None:
    begin = time.monotonic()
    with RunLock(foreign(tmp_path, 0), job="41", stale_after=2.0, beat=0.5):
        assert 1.0 < time.monotonic() - begin < 10


def test_heartbeat_and_loss(tmp_path: Path) -> None:
    with RunLock(tmp_path, beat=0.1) as lock:
        os.utime(lock.path, (1, 1))
        time.sleep(0.5)
        assert time.time() - lock.path.stat().st_mtime < 5
        lock.check()
        foreign(tmp_path, 0)
        with pytest.raises(RunLocked, match="taken over by process 1 on node7, job 41"):
            lock.check()
    assert (tmp_path / "lock").exists(), "the new holder's lock is not removed"


def test_an_unreadable_lock_counts_by_its_age(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    with pytest.raises(RunLocked, match="a job that left no name"), RunLock(tmp_path):
        pass
    os.utime(tmp_path / "lock", (1, 1))
    with RunLock(tmp_path):
        pass


def test_of_many_that_find_a_stale_lock_one_gets_in(tmp_path: Path) -> None:
    foreign(tmp_path, 500)
    jobs = [start(RACE, tmp_path, time.time() + 2.5) for _ in range(4)]
    answers = [job.communicate()[0].strip() for job in jobs]
    assert sorted(answers) == ["in", "out", "out", "out"]
