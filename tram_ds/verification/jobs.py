"""Ranks of this machine, each a process started without a launcher: the end of every one is known,
and one of them can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tram_ds.recipe.file import ROOT
from tram_ds.runtime.launchers import rank_variables
from tram_ds.runtime.redact import redact

# what says that a process belongs to a launcher's job: a job of ours is none of it
LAUNCHERS = ("TORCHELASTIC_", "SLURM_", "PMI", "OMPI_", "MV2_", "GROUP_", "ROLE_")
QUIET = {"TOKENIZERS_PARALLELISM": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
GRACE = 20.0  # seconds for the peers of a rank that failed to say what they saw
TAIL = 2000  # characters of what a rank said last


class JobFailed(RuntimeError):
    """A rank ended with an error, or not in time (`over`)."""

    def __init__(self, text: str, over: bool = False):
        super().__init__(text)
        self.over = over


@dataclass
class Ranks:
    """A job that runs. folder: where rank k writes all it says, rank<k>.log."""

    processes: list[subprocess.Popen[bytes]]
    folder: Path

    def said(self, rank: int) -> str:
        """All that a rank has said so far."""
        return (self.folder / f"rank{rank}.log").read_text(errors="replace")

    def wait(self, seconds: float, grace: float = GRACE) -> list[int | None]:
        """Exit codes; None for a rank that had to be killed, `seconds` from now, or `grace` after
        another one ended badly. No process is left."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                codes = [process.poll() for process in self.processes]
                if None not in codes:
                    return codes
                if any(codes):  # the first of them: later looks are nearer to its end
                    end, grace = min(end, time.monotonic() + grace), float("inf")
                time.sleep(0.1)
            return [process.poll() for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends every rank that is left, and what it has started."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    # the group: a rank leads a session of its own, with all that it started
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start(module: str, arguments: Sequence[str], world: int, folder: Path) -> Ranks:
    """`python -m module arguments` on `world` ranks of this machine."""
    port = str(_free_port())
    processes = []
    for rank in range(world):
        with (folder / f"rank{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    cwd=folder,  # where no folder is called as a package of ours
                    env=_environment() | rank_variables(rank, world, port),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return Ranks(processes, folder)


def measure(module: str, *arguments: str, world: int, timeout: float) -> Any:
    """What rank 0 of `python -m module OUT arguments` writes as JSON to OUT. JobFailed."""
    with tempfile.TemporaryDirectory(prefix="tram_ds-verify-") as name:
        folder = Path(name)
        out = folder / "out.json"
        ranks = start(module, [str(out), *arguments], world, folder)
        codes = ranks.wait(timeout)
        if codes == [0] * world and out.exists():
            return json.loads(out.read_text())
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            last = _last(ranks.said(failed))
            raise JobFailed(f"rank {failed} ended with {codes[failed]}: {last}")
        late = f"no end after {timeout:.0f} s" if None in codes else "no result"
        raise JobFailed(f"{late}: {_last(ranks.said(0))}", over=None in codes)


def _last(said: str) -> str:
    """The last lines of a rank, as one."""
    lines = said[-TAIL:].strip().splitlines()
    return redact(" | ".join(line.strip() for line in lines[-3:])) or "it said nothing"


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in rank_variables(0, 1, "") and not name.startswith(LAUNCHERS)
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | QUIET | {"PYTHONPATH": path}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
