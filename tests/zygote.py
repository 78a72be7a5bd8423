"""Starts Python programs in forks of one process that has imported once: the imports cost more
than most jobs do.

    python -m tests.zygote        a job a line on stdin (JSON), its end a line on stdout

The server imports and does nothing else: no process group, no gradient, no thread of Python's. Each
rank is a session of its own with the environment, folder, arguments and output of its job; whatever
it leaves running is killed at its end, and everything ends with the process that asked.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

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
LIBRARIES = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "deepspeed",
    # of each first engine of DeepSpeed's in a process; the optimizer brings torch's compiler along
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.cpp_extension",
    "transformers.models.gpt2.modeling_gpt2",
    "mlflow.store.tracking.sqlalchemy_store",
    "matplotlib.pyplot",
    "tram_ds.engines.fsdp2",
    "tram_ds.engines.zero",
    "tram_ds.training.run",
)
RANK_HERE = "%rank%"
GRACE = 10.0  # seconds for the peers of a rank that has failed to say what they saw


@dataclass(frozen=True)
class Job:
    """`python program arguments` on each of `ranks`, one environment each. program: a script's path
    or a module's name; RANK_HERE in an argument stands for the rank's number. alone: the end of
    rank 0 is the job's, its peers are meant to die."""

    program: str
    arguments: list[str]
    ranks: list[dict[str, str]]
    cwd: str
    folder: str = ""  # where the output of rank k goes: k.out and k.err
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
        end = End(**server().ask(Job(**{**vars(job), "folder": folder})))
        for name in ("stdout", "stderr"):
            files = [Path(folder) / f"{rank}.{name[3:]}" for rank in range(len(job.ranks))]
            text = "".join(file.read_text(errors="replace") for file in files)
            setattr(end, name, text)
    if end.timed_out:
        raise subprocess.TimeoutExpired(job.program, job.timeout, end.stdout, end.stderr)
    return end


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
    """A process of `main`, and the way to ask it."""

    def __init__(self) -> None:
        self.environment = {**START, **QUIET}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.process.communicate)  # closes its stdin, which ends it

    def ask(self, job: Job) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(asdict(job)) + "\n")
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


def main() -> None:
    """Serves until stdin ends."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in LIBRARIES:
        importlib.import_module(name)
    # or every ZeRO-3 engine that DeepSpeed builds would have all that was imported looked through
    gc.collect()
    gc.freeze()
    while line := sys.stdin.readline():
        assert threading.active_count() == 1, threading.enumerate()  # a fork would lose the others
        answers.write(json.dumps(_serve(Job(**json.loads(line)))) + "\n")
        answers.flush()


def _serve(job: Job) -> dict[str, Any]:
    sys.stdout.flush()
    sys.stderr.flush()
    pids = []
    for rank in range(len(job.ranks)):
        pid = os.fork()
        if pid == 0:
            _become(job, rank)
        pids.append(pid)
    return _wait(job, pids)


def _wait(job: Job, pids: list[int]) -> dict[str, Any]:
    """The ends of all ranks. Those that outlive the timeout, or by GRACE a peer that failed, are
    killed."""
    codes: dict[int, int] = {}
    end, timed_out = time.monotonic() + job.timeout, False
    while len(codes) < len(pids):
        time.sleep(0.005)
        now = time.monotonic()
        for pid in pids:
            # not reaped yet: until its session is killed, its number can be nobody else's
            if pid not in codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if codes[pid] and not job.alone:
                    end = min(end, now + GRACE)
        if now > end:
            timed_out = not any(codes.values()) or job.alone
            for pid in set(pids) - set(codes):
                _kill(pid)
            end = float("inf")
    return {"codes": [codes[pid] for pid in pids], "timed_out": timed_out}


def _kill(pid: int) -> None:
    """The rank and its session, which it may not have made yet."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _become(job: Job, rank: int) -> NoReturn:
    """This fork becomes rank `rank` of the job, as if the interpreter had started it."""
    code: Any = 1
    try:
        os.setsid()
        _end_with_parent()
        files = [os.open(f"{job.folder}/{rank}.{name}", os.O_RDWR | os.O_CREAT) for name in OUTPUT]
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
            os.dup2(file, number)
            os.close(file)
        # or what a rank said would be lost with it when it is killed
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.chdir(job.cwd)
        os.environ.clear()
        os.environ.update(job.ranks[rank])
        random.seed()  # or all forks would draw the same names
        importlib.import_module("numpy").random.seed()
        _program(job)
        code = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code if isinstance(code, int) else int(code is not None))


OUTPUT = ("out", "err")


def _program(job: Job) -> None:
    rank = os.environ.get("RANK", "0")
    sys.argv = [job.program, *(word.replace(RANK_HERE, rank) for word in job.arguments)]
    if job.program.endswith(".py"):
        sys.path[0] = str(Path(job.program).parent)
        runpy.run_path(job.program, run_name="__main__")
    else:
        runpy.run_module(job.program, run_name="__main__", alter_sys=True)


def _leave(code: int) -> NoReturn:
    """What an interpreter does at its end, but for taking itself apart."""
    try:
        threading._shutdown()  # type: ignore[attr-defined] # waits for threads that are no daemons
        atexit._run_exitfuncs()  # type: ignore[attr-defined]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    """SIGKILL to this process when the one that started it ends (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
