"""Signals, dead and hung ranks, and two jobs in one folder: processes of launch/train.py, without a
launcher's help. All are forks of one that has imported once but the two jobs in one folder, which
are interpreters of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.integration.test_train import RECIPE, TRAIN
from tests.ranks import environment, free_port, started
from tests.zygote import Rank

pytestmark = pytest.mark.faults

Process = Rank | subprocess.Popen[str]

RUN = Path("runs") / "tiny-tram_prev-0"
BASE = [
    "algorithm={name: tram_prev, radius_scale: 5.0}",
    "tracking.enabled=false",
    "checkpoint.every_steps=2",
]


def command(*arguments: str) -> list[str]:
    return ["--recipe", "tiny.yaml", "engine=replicated", *BASE, *arguments]


def start(
    folder: Path,
    world: int,
    *arguments: str,
    script: str = TRAIN,
    port: int | None = None,
    only: int | None = None,
) -> list[Rank]:
    """One process per rank (or `only` one of them); the engine is DDP for two ranks."""
    (folder / "tiny.yaml").write_text(RECIPE)
    numbers = range(world) if only is None else [only]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    shared = {"WORLD_SIZE": str(world), **address}
    return started(
        script,
        *command(*arguments),
        cwd=folder,
        ranks=[environment(**shared, RANK=str(k), LOCAL_RANK=str(k)) for k in numbers],
        logs=[folder / f"rank{k}.log" for k in numbers],
    )


def interpreter(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process of one rank that has imported nothing yet."""
    (folder / "tiny.yaml").write_text(RECIPE)
    with (folder / "rank0.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, TRAIN, *command(*arguments)],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
            text=True,
        )


def wait_for(
    condition: Callable[[], bool],
    ranks: Sequence[Process],
    folder: Path,
    seconds: float = 120,
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "".join(p.read_text()[-2000:] for p in folder.glob("rank*.log"))
        assert time.monotonic() < deadline, logs
        assert all(r.poll() is None for r in ranks), logs
        time.sleep(0.05)


def ended(ranks: Sequence[Process], seconds: float = 120) -> list[int]:
    try:
        return [r.wait(timeout=seconds) for r in ranks]
    finally:
        for r in ranks:
            if r.poll() is None:
                r.kill()
                r.wait()


def checkpointed(folder: Path) -> bool:
    return (folder / RUN / "checkpoints" / "latest").exists()


def weights(folder: Path) -> bytes:
    return (folder / RUN / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps on 2 ranks, left alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert ended(start(folder, 2, "train.steps=40")) == [0, 0]
    return folder


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_resume_is_exact(
    number: signal.Signals, tmp_path: Path, uninterrupted: Path
) -> None:
    """Rank 1 alone is told; both save, exit 75 and, started again, end where the uninterrupted run
    ended, bit for bit."""
    ranks = start(tmp_path, 2, "train.steps=40")
    wait_for(lambda: checkpointed(tmp_path), ranks, tmp_path)
    ranks[1].send_signal(number)
    ranks[1].send_signal(number)  # a second one must not tear the save
    assert ended(ranks) == [75, 75]
    assert (tmp_path / RUN / "REQUEUE").exists() and not (tmp_path / RUN / "DONE").exists()
    assert ended(start(tmp_path, 2, "train.steps=40", "--resume")) == [0, 0]
    assert (tmp_path / RUN / "DONE").exists()
    assert weights(tmp_path) == weights(uninterrupted)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 41))


def test_stop_after_is_a_preemption(tmp_path: Path, uninterrupted: Path) -> None:
    assert ended(start(tmp_path, 2, "train.steps=40", "train.stop_after=5")) == [75, 75]
    assert (tmp_path / RUN / "checkpoints" / "latest").read_text().strip().endswith("step-00000005")
    assert ended(start(tmp_path, 2, "train.steps=40", "--resume")) == [0, 0]
    assert weights(tmp_path) == weights(uninterrupted)


def test_a_killed_rank_ends_the_job_and_the_run_resumes_exactly(
    tmp_path: Path, uninterrupted: Path
) -> None:
    """The survivor leaves with 6 as soon as its collective fails, not after the timeout."""
    ranks = start(tmp_path, 2, "train.steps=40")
    wait_for(lambda: checkpointed(tmp_path), ranks, tmp_path)
    ranks[1].kill()
    began = time.monotonic()
    assert ended(ranks) == [6, -signal.SIGKILL], (tmp_path / "rank0.log").read_text()[-3000:]
    assert time.monotonic() - began < 120  # far below the collective's timeout of half an hour
    log = (tmp_path / "rank0.log").read_text()
    assert "rank 0: " in log and ("lost a peer in step" in log or "another rank" in log)
    assert ended(start(tmp_path, 2, "train.steps=40", "--resume")) == [0, 0]
    assert weights(tmp_path) == weights(uninterrupted)


def test_a_hung_rank_ends_the_job_within_the_timeout(tmp_path: Path) -> None:
    """Rank 1 is stopped (SIGSTOP): rank 0 says where it was, within the timeout and 5 s, and exits
    6."""
    ranks = start(tmp_path, 2, "train.steps=100000", "train.timeout=15")
    try:
        wait_for(lambda: checkpointed(tmp_path), ranks, tmp_path)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert ranks[0].wait(timeout=90) == 6
    finally:
        for r in ranks:
            r.kill()
            r.wait()
    log = (tmp_path / "rank0.log").read_text()
    assert "rank 0: " in log and "in step" in log and "phase" in log


def test_an_exception_on_one_rank_ends_all_and_is_shown(tmp_path: Path) -> None:
    """Rank 1 fails in step 3 with a bug of its own: its traceback is printed, and rank 0 does not
    wait for it."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, runpy, sys\n"
        "from tram_ds.training import loop\n"
        "take = loop.Loop.take\n"
        "def broken(self, batches, step, *rest):\n"
        "    if os.environ['RANK'] == '1' and step == 2: raise KeyError('a bug on one rank')\n"
        "    return take(self, batches, step, *rest)\n"
        "loop.Loop.take = broken\n"
        f"sys.argv[0] = {TRAIN!r}\n"
        f"runpy.run_path({TRAIN!r}, run_name='__main__')\n"
    )
    ranks = start(tmp_path, 2, "train.steps=40", script=str(script))
    assert ended(ranks, 120) == [6, 1]
    log = (tmp_path / "rank1.log").read_text()
    assert "KeyError: 'a bug on one rank'" in log and "Traceback" in log


def test_a_port_that_is_taken_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ranks = start(tmp_path, 2, "train.timeout=5", port=taken.getsockname()[1])
        assert ended(ranks, 120) == [6, 6]
    assert "is the port free" in (tmp_path / "rank0.log").read_text()


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """WORLD_SIZE says 2 and one was started: bounded by train.timeout."""
    (tmp_path / "rank1.log").touch()
    ranks = start(tmp_path, 2, "train.timeout=5", only=0)
    assert ended(ranks, 90) == [6]
    assert "do they agree on WORLD_SIZE" in (tmp_path / "rank0.log").read_text()


def test_two_jobs_in_one_folder(tmp_path: Path) -> None:
    """The second leaves with 5 and names the first; the first is not disturbed."""
    first = interpreter(tmp_path, "train.steps=100000")
    try:
        wait_for(lambda: checkpointed(tmp_path), [first], tmp_path)
        assert ended([interpreter(tmp_path, "--resume")]) == [5]
        assert f"{first.pid}" in (tmp_path / "rank0.log").read_text()
        assert first.poll() is None
    finally:
        first.terminate()
        assert first.wait(timeout=60) == 75
