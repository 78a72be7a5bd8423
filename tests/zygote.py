"""Starts Python programs in forks of one process that has imported once (tests/fork_server.py):
the imports cost more than most jobs do."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START = dict(os.environ)  # before any test has changed it
# What may differ from START: no library reads these when it is imported.
CHANGES = {
    "PYTEST_CURRENT_TEST",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHINDUCTOR_CACHE_DIR",  # torch sets these two itself, in the process that runs the tests
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "KMP_DUPLICATE_LIB_OK",  # scikit-learn, for its own OpenMP
    "KMP_INIT_AT_FORK",
}
QUIET = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "GLOO_SOCKET_IFNAME": "lo",
}
RANK_HERE = "%rank%"
CLOSED, LEFT = "", "|"  # a stream that is not open; a pipe whose reader has gone away


@dataclass(frozen=True)
class Job:
    """`python program arguments` on each of `ranks`, one environment each. program: a script's path
    or a module's name; RANK_HERE in an argument or a stream stands for the rank's number. streams:
    what stdin, stdout and stderr lead to: a path, CLOSED or LEFT. alone: the end of rank 0 is the
    job's, its peers are meant to die."""

    program: str
    arguments: list[str]
    ranks: list[dict[str, str]]
    cwd: str
    streams: tuple[str, str, str] = (os.devnull, os.devnull, os.devnull)
    timeout: float = 300.0
    alone: bool = False


@dataclass
class End:
    """Exit codes, as subprocess has them; output of all ranks together, one after the other."""

    codes: list[int] = field(default_factory=list)
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False


def run(job: Job) -> End:
    """Runs the job to its end. TimeoutExpired, with its output, where it takes longer than its
    timeout."""
    with tempfile.TemporaryDirectory() as folder:
        streams = (os.devnull, f"{folder}/{RANK_HERE}.out", f"{folder}/{RANK_HERE}.err")
        end = ended(replace(job, streams=streams))
        for name in ("stdout", "stderr"):
            files = [Path(folder) / f"{rank}.{name[3:]}" for rank in range(len(job.ranks))]
            text = "".join(file.read_text(errors="replace") for file in files)
            setattr(end, name, text)
    if end.timed_out:
        raise subprocess.TimeoutExpired(job.program, job.timeout, end.stdout, end.stderr)
    return end


def ended(job: Job) -> End:
    """Runs the job to its end, its streams where the job says; what they got is not in it."""
    return End(**server().ask(run=asdict(job)))


def started(job: Job) -> list[Rank]:
    """The ranks of the job, which run beside the test that asks. `timeout` and `alone` are not
    read: who starts them ends them."""
    return [Rank(pid) for pid in server().ask(start=asdict(job))]


class Rank:
    """A process of `started`, as subprocess.Popen has it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = server().ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 300.0) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # not reaped, so its number is nobody else's
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def same_start(environment: dict[str, str]) -> bool:
    """Whether a fork of the server is what a new process of this environment would be: libraries
    read some variables when they are imported."""
    changed = set(environment.items()) ^ set(server().environment.items())
    return {key for key, _ in changed} <= CHANGES


@functools.cache
def server() -> Server:
    """The server of this process, started when it is first asked for."""
    return Server()


class Server:
    """A process of tests/fork_server.py, and the way to ask it."""

    def __init__(self) -> None:
        self.environment = {**START, **QUIET}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.process.communicate)  # closes its stdin, which ends it

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BaseException:  # interrupted: its answer would be taken for that of the next job
            self._give_up()
            raise
        if not answer:
            self._give_up()
            raise AssertionError(f"the fork server ended with {self.process.wait()}")
        return json.loads(answer)

    def _give_up(self) -> None:
        server.cache_clear()
        self.process.kill()
