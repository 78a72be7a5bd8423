"""`python -m tests.fork_server`: a process that has imported once and forks what it is asked for, a
request a line on stdin (JSON), its answer a line on stdout. Asked by tests/zygote.py.

It imports and does nothing else: no process group, no gradient, no thread of Python's. Each rank is
a session of its own with the environment, folder, arguments and streams of its job; whatever it
leaves running is killed at its end, and everything ends with the process that asked.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import signal
import stat
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tests.zygote import CLOSED, LEFT, RANK_HERE, Job

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
GRACE = 10.0  # seconds for the peers of a rank that has failed to say what they saw


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
        answers.write(json.dumps(_serve(**json.loads(line))) + "\n")
        answers.flush()


def _serve(run: Any = None, start: Any = None, poll: int | None = None) -> Any:
    """The answer to a request: one of these three."""
    if poll is not None:
        return _code(poll)
    job = Job(**(run or start))
    pids = _forked(job)
    return _wait(job, pids) if run else pids


def _forked(job: Job) -> list[int]:
    sys.stdout.flush()
    sys.stderr.flush()
    pids = []
    for rank in range(len(job.ranks)):
        pid = os.fork()
        if pid == 0:
            _become(job, rank)
        pids.append(pid)
    return pids


def _wait(job: Job, pids: list[int]) -> dict[str, Any]:
    """The ends of all ranks. Those that outlive the timeout, or by GRACE a peer that failed, are
    killed."""
    codes: dict[int, int] = {}
    end, timed_out = time.monotonic() + job.timeout, False
    while len(codes) < len(pids):
        time.sleep(0.005)
        now = time.monotonic()
        for pid in set(pids) - set(codes):
            if (code := _code(pid)) is not None:
                codes[pid] = code
                if code and not job.alone:
                    end = min(end, now + GRACE)
        if now > end:
            timed_out = not any(codes.values()) or job.alone
            for pid in set(pids) - set(codes):
                _kill(pid)
            end = float("inf")
    return {"codes": [codes[pid] for pid in pids], "timed_out": timed_out}


def _code(pid: int) -> int | None:
    """The exit code of a rank that has ended; what it left running is killed."""
    # not reaped yet: until its session is killed, its number can be nobody else's
    if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
        for number, stream in enumerate(job.streams):
            _lead(number, stream.replace(RANK_HERE, str(rank)))
        if sys.stdout is not None and stat.S_ISREG(os.fstat(1).st_mode):
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


def _lead(number: int, to: str) -> None:
    """A standard stream to where the job says, as an interpreter would find it."""
    name = ("stdin", "stdout", "stderr")[number]
    if to == CLOSED:
        os.close(number)
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
        return
    if to == LEFT:
        reader, file = os.pipe()
        os.close(reader)
    else:
        file = os.open(to, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(file, number)
    os.close(file)


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
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        code = 120  # as an interpreter's whose last flush fails
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    """SIGKILL to this process when the one that started it ends (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
