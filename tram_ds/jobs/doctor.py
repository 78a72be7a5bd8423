"""Checks before a run is queued. Each gives one line: ok or problem, what was found, and how to fix
it.

Here are those of the recipe itself and the table; the others lie in storage_checks and
machine_checks. Every check is a function of the context that returns what it found, or raises
Problem. Under a launcher all ranks run the same checks in the same order, so that those with a
collective in them meet.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tram_ds.data.stream import number_of
from tram_ds.jobs.check import Check, Context, Problem, existing
from tram_ds.jobs.machine_checks import builds, communication, host_memory, launcher, memory
from tram_ds.jobs.storage_checks import disk, run_folder, tracking
from tram_ds.recipe.file import LAUNCH
from tram_ds.recipe.recipe import accumulation
from tram_ds.runtime import ranks as distributed
from tram_ds.runtime.files import remove_tree
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import Job, agreed, barrier
from tram_ds.runtime.redact import redact
from tram_ds.tasks import choose as tasks

SMOKE_SECONDS = 180


def batch(context: Context) -> str:
    """The batch sizes fit the number of ranks."""
    micros = accumulation(context.recipe, context.world)
    return (
        f"{context.world} rank(s) x micro_batch {context.recipe.train.micro_batch} x {micros} "
        "accumulated"
    )


def data(context: Context) -> str:
    """Files, columns, vocabulary: what the task itself checks. The first time it also fills the
    token cache."""
    task = tasks.build(context.recipe)
    rows = number_of(task.train_rows())
    number = "training rows, streamed" if rows is None else f"{rows:,} training rows"
    return f"{context.recipe.task.name}: {number}"


def smoke(context: Context) -> str:
    """One step of the same recipe with a tiny model, in a process of its own per rank, in a folder
    beside the run's that is thrown away. Collective."""
    # another port: the ranks of this check hold theirs while the smoke run's join
    port, start = _agreed_port(context.job), time.monotonic()
    place = _agreed_place(context)
    sets = [
        "train.steps=1",
        "schedule.warmup_steps=0",
        "tracking.enabled=false",
        f"run_dir={place / 'run'}",
    ]
    script = str(LAUNCH / "train.py")
    extra = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"} if port else {}
    try:
        done = subprocess.run(
            [sys.executable, script, *context.recipe_arguments, "--smoke", *sets],
            env={**os.environ, **extra},
            capture_output=True,
            text=True,
            timeout=SMOKE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Problem(
            f"no end within {SMOKE_SECONDS} s", "a rank hangs: start again with NCCL_DEBUG=INFO"
        ) from None
    finally:
        barrier()  # no rank's process is in the folder any more
        if context.job.rank == 0:
            remove_tree(place, lambda _: True)
    if done.returncode:
        last = redact(" | ".join((done.stderr or done.stdout).strip().splitlines()[-2:]))
        raise Problem(
            f"train.py --smoke ended with {done.returncode}: {last}",
            "start it by hand to see the rest",
        )
    return f"one step in {time.monotonic() - start:.0f} s with its start"


CHECKS: dict[str, Callable[[Context], str]] = {
    "batch": batch,
    "data": data,
    "run folder": run_folder,
    "disk": disk,
    "tracking": tracking,
    "launcher": launcher,
    "communication": communication,
    "builds": builds,
    "memory": memory,
    "host memory": host_memory,
    "smoke": smoke,
}
RANK_0 = ("disk", "tracking", "launcher")  # what only rank 0 of a run does


def examine(context: Context, skip: tuple[str, ...] = ()) -> bool:
    """Runs every check, prints the lines (rank 0: all; other ranks: their problems); whether all
    ranks found all well."""
    well = True
    with distributed.joined(context.job, "replicated"):
        for name, function in CHECKS.items():
            if name in skip or (context.job.rank and name in RANK_0):
                continue
            check = _outcome(name, function, context)
            if context.job.rank == 0:
                print(check.text(), flush=True)
            elif not check.ok:
                print(f"rank {context.job.rank}: {check.text()}", flush=True)
            well = well and check.ok
        # by all: exit codes of ranks that differ confuse a launcher
        return not agreed(not well)


def _outcome(name: str, function: Callable[[Context], str], context: Context) -> Check:
    try:
        return Check(name, True, function(context))
    except Problem as problem:
        return Check(name, False, problem.found, problem.fix)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        text = redact(" ".join(str(error).split())) or type(error).__name__
        return Check(
            name, False, text, "change what it names, in the recipe or on the command line"
        )


def _agreed_place(context: Context) -> Path:
    """A path that nobody has, the same on every rank and on storage that all nodes share, as the
    run's own has to be. Collective."""
    peers = Peers(context.job.world_size)
    word = peers.gather(secrets.token_hex(8))[0]
    peers.close()
    run_dir = context.recipe.resolved_run_dir().absolute()
    return existing(run_dir.parent) / f".tram_ds-doctor-{word}"


def _agreed_port(job: Job) -> int:
    """A port that is free where rank 0 runs, the same number on every rank; 0 in a single
    process."""
    if job.world_size == 1:
        return 0
    with socket.socket() as probe:
        probe.bind(("", 0))
        box = torch.tensor(probe.getsockname()[1], device=job.device)
    dist.broadcast(box, 0)
    return int(box)
