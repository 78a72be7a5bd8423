"""Two jobs, one run folder: who gets in, who is named, and when a dead holder is overruled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import ranks
from tram_ds.runtime.exits import LOCKED, RunLocked, code_of
from tram_ds.runtime.locks import locked
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
print('ready', flush=True)
begin = float(sys.stdin.readline())
while time.time() < begin: pass
try:
    with RunLock(sys.argv[1]):
        print('in', flush=True)
        sys.stdin.read()  # inside until every other job has its answer
except RunLocked: print('out', flush=True)
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ranks.environment(), stdin=pipe, stdout=pipe, text=True)


def said(job: subprocess.Popen) -> str:
    assert job.stdout is not None
    return job.stdout.readline().strip()


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
    assert said(holder) == "in"
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
        pytest.raises(RunLocked, match=r"process \d+ on node7, job 41.*heartbeat 3[0-9] s ago"),
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
        deadline = time.monotonic() + 60
        while lock.path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert time.time() - lock.path.stat().st_mtime < 60, "no heartbeat"
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
    jobs = [start(RACE, tmp_path) for _ in range(4)]
    assert [said(job) for job in jobs] == ["ready"] * 4
    begin = time.time() + 0.3  # all of them at once
    for job in jobs:
        assert job.stdin is not None
        print(begin, file=job.stdin, flush=True)
    answers = [said(job) for job in jobs]
    for job in jobs:
        job.communicate()
    assert sorted(answers) == ["in", "out", "out", "out"]


def test_a_lock_that_goes_while_one_looks_is_not_a_holder_without_a_name(tmp_path: Path) -> None:
    """A requeued job that comes while its predecessor leaves gets in; nobody is ever told of a
    holder that has no name."""
    coming, leaving = RunLock(tmp_path, job="41"), RunLock(tmp_path, job="41")
    leaving.__enter__()
    with locked(tmp_path / "lock.mutex"):  # someone looks
        leaver = threading.Thread(target=leaving.__exit__)
        leaver.start()
        leaver.join(0.3)
        assert (tmp_path / "lock").exists(), "it left under the eyes of the one who looks"
    leaver.join()
    with coming:
        assert json.loads((tmp_path / "lock").read_text())["token"] == coming.holder["token"]


def test_to_leave_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
    assert not (tmp_path / "run").exists()
