"""Runs programs on N ranks of this machine (gloo, loopback), in forks of one process that has
imported everything once (tests/fork_server.py)."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import zygote
from tests.zygote import QUIET, ROOT
from tram_ds.runtime.launchers import rank_variables

PORTS = range(24000, 32000)  # below those that the kernel gives to clients


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, **QUIET, **extra}


def run(
    module: str, *arguments: str, world: int = 2, timeout: float = 600, alone: bool = False
) -> Any:
    """`python -m module OUT arguments...` on `world` ranks; rank 0 writes JSON to OUT. A failing
    rank fails with its output. alone: only rank 0 must end well."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        job = zygote.Job(
            module, [str(out), *arguments], places(world), str(ROOT), timeout=timeout, alone=alone
        )
        end = zygote.run(job)
        if any(end.codes[: 1 if alone else None]) or not out.exists():
            raise AssertionError(
                f"{module} {' '.join(arguments)} exited {end.codes}\n{end.stdout[-4000:]}\n"
                f"{end.stderr[-8000:]}"
            )
        return json.loads(out.read_text())


def script(
    program: Path | str,
    *arguments: str,
    cwd: Path | str | None = None,
    world: int = 1,
    timeout: float = 300,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """`python program arguments...`, on several ranks as torchrun places them; the return code is
    that of the first rank that failed. New interpreters where `extra` or the environment of the
    test could change what the libraries do when imported."""
    env = environment(**extra)
    folder = str(cwd or Path.cwd())
    if extra or not zygote.same_start(env):
        assert zygote.RANK_HERE not in arguments
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [sys.executable, *(torchrun if world > 1 else []), str(program), *arguments]
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
        )
    job = zygote.Job(str(program), list(arguments), places(world), folder, timeout=timeout)
    end = zygote.run(job)
    code = next((code for code in end.codes if code), 0)
    return subprocess.CompletedProcess([str(program), *arguments], code, end.stdout, end.stderr)


def started(
    program: Path | str,
    *arguments: str,
    cwd: Path,
    ranks: list[dict[str, str]],
    logs: Sequence[Path],
) -> list[zygote.Rank]:
    """`python program arguments...` once in each environment of `ranks`, beside the test, which
    ends them; what one prints is added to its file of `logs`."""
    assert all(zygote.same_start(rank) for rank in ranks), "a fork is not what they would be"
    found = []
    for rank, log in zip(ranks, logs, strict=True):
        streams = (os.devnull, str(log), str(log))
        job = zygote.Job(str(program), list(arguments), [rank], str(cwd), streams)
        found += zygote.started(job)
    return found


def store(folder: Path) -> None:
    """An empty mlflow.db in `folder`, as a run there would make it: MLflow's migrations take longer
    than most runs of the tests."""
    shutil.copy(_store(), folder / "mlflow.db")


@functools.cache
def _store() -> Path:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = Path(tempfile.mkdtemp(prefix="store"))
    atexit.register(shutil.rmtree, folder)
    SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder / "artifacts")).engine.dispose()
    return folder / "mlflow.db"


def places(world: int) -> list[dict[str, str]]:
    """One environment for each of `world` ranks; a single one is told nothing."""
    if world == 1:
        return [environment()]
    port = str(free_port())
    return [environment(**rank_variables(rank, world, port)) for rank in range(world)]


def free_port() -> int:
    """A port that nobody listens on, and that neither this process nor a test worker beside it
    gives out again soon."""
    for port in _ports:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise AssertionError("unreachable")


def _own_ports() -> Iterator[int]:
    """PORTS in turns from a random one on; of pytest-xdist's workers each has its own part."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = PORTS[int(worker) :: count]
    start = random.SystemRandom().randrange(len(own))
    return itertools.cycle([*own[start:], *own[:start]])


_ports = _own_ports()
