"""Runs many small jobs on forked ranks: the imports, which cost more than the jobs, are paid once.

`forked([("peer_killed", 2, []), ...])` starts one fresh process that imports everything and trains
nothing; it forks the ranks of one job after another, each calling `<name>(*arguments)` of
tests.faults.jobs or jobs_kill. The result is what rank 0 returns.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests import ranks

Job = tuple[str, int, list[Any]]  # (function of tests.faults.jobs, number of ranks, JSON arguments)


def forked(jobs: list[Job], timeout: float = 300) -> list[Any]:
    """The results of `jobs`, in order; a job that failed is an AssertionError with all its ranks'
    tracebacks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "tests.faults.zygote", str(out), json.dumps(jobs)]
        done = subprocess.run(
            command,
            cwd=ranks.ROOT,
            env=ranks.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode or not out.exists():
            raise AssertionError(
                f"exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-9000:]}"
            )
        return json.loads(out.read_text())


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(job: Job, rank: int, port: int, out: Path) -> None:
    """Never returns."""
    name, world, arguments = job
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    status = 1
    try:
        from tests.faults import jobs, jobs_kill

        action = getattr(jobs, name, None) or getattr(jobs_kill, name)
        result = action(*arguments)
        if rank == 0:
            out.write_text(json.dumps(result))
        status = 0
    except BaseException:
        sys.stderr.write(f"rank {rank} of {job}\n{traceback.format_exc()}")
    finally:
        sys.stderr.flush()
        os._exit(status)


def main(out: str, jobs: str) -> None:
    import tests.faults.jobs_kill  # noqa: F401 - everything the ranks need, before they are forked

    results = []
    for job in json.loads(jobs):
        port, file = _free_port(), Path(out).with_suffix(f".{len(results)}")
        children = []
        for rank in range(job[1]):
            pid = os.fork()
            if pid == 0:
                _rank(job, rank, port, file)
            children.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        # A job called ..._killed kills its other ranks: only rank 0's end counts.
        if any(statuses[:1] if job[0].endswith("_killed") else statuses):
            sys.exit(f"{job} ended with {statuses}")
        results.append(json.loads(file.read_text()))
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
