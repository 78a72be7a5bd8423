"""Checks before a run is queued. Each gives one line: ok or problem, what was found, and how to fix
it.

Every check is a function of the context that returns what it found, or raises Problem. Under a
launcher all ranks run the same checks in the same order, so that those with a collective in them
meet.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from tram_ds.jobs import slurm
from tram_ds.jobs.slurm_config import Slurm
from tram_ds.planning import states
from tram_ds.planning.plan import rank_bytes
from tram_ds.recipe.file import LAUNCH
from tram_ds.recipe.recipe import Recipe, accumulation
from tram_ds.runtime import ranks as distributed
from tram_ds.runtime.files import remove_file, remove_tree
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import Job, agreed, barrier
from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_folder import refuse
from tram_ds.tasks import choose as tasks
from tram_ds.tracking.address import address, sqlite_path

SMOKE_SECONDS = 180
SERVER_SECONDS = 3


class Problem(Exception):
    """Something that would end the run, and the way out."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.found, self.fix = found, fix


@dataclass
class Context:
    """What is checked. world: ranks of the run, which may be more than those of this job (see
    slurm)."""

    recipe: Recipe
    job: Job
    slurm: Slurm | None = None
    recipe_arguments: list[str] = field(default_factory=list)

    @property
    def planned(self) -> Job:
        """A rank of the job the run will be: SLURM's, where one is planned, else this one."""
        if self.slurm is None:
            return self.job
        device = torch.device("cuda") if self.slurm.gpus_per_node else self.job.device
        return Job(0, 0, self.slurm.world_size, self.slurm.launcher, device)

    @property
    def world(self) -> int:
        """Ranks the run will have, as far as is known here."""
        return self.planned.world_size

    @cached_property
    def parameters(self) -> int:
        """Of the model, those that train, without reading its weights."""
        return states.parameters(self.recipe, tasks.build(self.recipe))


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    found: str
    fix: str = ""

    def text(self) -> str:
        """`ok` or `problem`, the name, what was found; below it how to fix it."""
        line = f"{'ok' if self.ok else 'problem':8} {self.name:14} {self.found}"
        return line if self.ok else f"{line}\n{'':23} fix: {self.fix}"


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
    return f"{context.recipe.task.name}: {len(task.train_rows()):,} training rows"


def run_folder(context: Context) -> str:
    """A run may have the folder. Rank 0 writes a file in it, or in the one above; every rank, so
    every node, must be able to read it."""
    folder = _existing(context.recipe.resolved_run_dir().absolute())
    word = secrets.token_hex(8) if context.job.rank == 0 else ""
    file = folder / ".tram_ds-doctor"
    problem = None
    try:
        if context.job.rank == 0:
            refuse(context.recipe.resolved_run_dir(), resume=True, overwrite=False)
            file.write_text(word)
    except ValueError as error:
        problem = Problem(str(error), "set run_dir to a folder that is new or a run's")
    except OSError as error:
        problem = Problem(
            f"{folder} cannot be written: {error.strerror}", "set run_dir to a folder of yours"
        )
    barrier()
    if problem is None and not file.is_file():
        where = f"rank {context.job.rank} on {os.uname().nodename}"
        problem = Problem(
            f"{folder}: {where} does not see what rank 0 wrote",
            "set run_dir to a file system all nodes share",
        )
    barrier()
    if context.job.rank == 0:
        remove_file(file)
    if problem:
        raise problem
    return f"{folder} is writable" + (
        f" and shared by {context.job.world_size} ranks" if context.job.world_size > 1 else ""
    )


def disk(context: Context) -> str:
    """Room for the checkpoints: those kept and the one being written."""
    folder = _existing(context.recipe.resolved_run_dir().absolute())
    one = states.checkpoint_bytes(context.recipe, context.parameters)
    needed, free = one * (context.recipe.checkpoint.keep + 1), shutil.disk_usage(folder).free
    found = (
        f"{_size(free)} free, {context.recipe.checkpoint.keep} + 1 checkpoints of "
        f"{_size(one)} need {_size(needed)}"
    )
    if free < needed:
        raise Problem(
            found, "free some, set checkpoint.keep=1, or set run_dir to a larger file system"
        )
    return found


def tracking(context: Context) -> str:
    """The MLflow server answers, or the database's folder is writable."""
    section = context.recipe.tracking
    if not section.enabled:
        return "off"
    where = address(section.uri, section.experiment, context.recipe.name, os.environ)
    uri, shown = where.uri, redact(where.uri)
    database = sqlite_path(uri)
    if database is not None:
        if not os.access(_existing(database.absolute().parent), os.W_OK):
            raise Problem(
                f"{shown}: the folder cannot be written",
                "set tracking.uri, or tracking.enabled=false",
            )
        return where.told
    if not uri.startswith(("http://", "https://")):
        return f"{where.told}: not asked, MLflow's own client knows the way"
    try:
        health = f"{uri.rstrip('/')}/health"
        with urllib.request.urlopen(health, timeout=SERVER_SECONDS, context=_tls()) as answer:
            answer.read(64)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            return f"{shown} answers ({error.code})"
        fix = (
            "start it, correct tracking.uri, or train anyway: launch/sync.py uploads the run later"
        )
        raise Problem(
            f"{shown} does not answer within {SERVER_SECONDS} s: {redact(str(error))}", fix
        ) from None
    return f"{where.told}: it answers"


def _tls() -> ssl.SSLContext:
    """What MLflow's client would trust."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return ssl._create_unverified_context()
    return ssl.create_default_context(
        cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None
    )


def launcher(context: Context) -> str:
    """What the recipe's engine and the launcher need is installed."""
    if context.recipe.engine.name == "zero":
        if (
            not all(shutil.which(tool) for tool in ("g++", "ninja"))
            and context.job.device.type == "cpu"
        ):
            raise Problem(
                "DeepSpeed compiles an operator at its first start: no g++ or ninja",
                "install g++, pip install ninja",
            )
        version = f", deepspeed {metadata.version('deepspeed')}"
    else:
        version = ""
    if context.slurm is not None:
        slurm.test(context.recipe.name, context.slurm)
        return f"SLURM accepts the job{version}"
    return f"started by {context.job.launcher}{version}"


def communication(context: Context) -> str:
    """An all-reduce over the world, on the devices the run will use."""
    if context.job.world_size == 1:
        return (
            "one process: nothing to reduce (start doctor.py as you would train.py to check more)"
        )
    start, world = time.monotonic(), context.job.world_size
    # in one order on all ranks: a set's is its process's own, and two ranks in two orders hang
    for device in dict.fromkeys(("cpu", context.job.device.type)):
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones)
        if int(ones) != world:
            raise Problem(
                f"the sum of ones over {world} ranks is {int(ones)} on {device}",
                "look at NCCL_DEBUG=INFO",
            )
    return (
        f"all-reduce over {world} ranks in {time.monotonic() - start:.2f} s ({dist.get_backend()})"
    )


def builds(_: Context) -> str:
    """No lock of a dead process: DeepSpeed compiles operators at its first start, and waits for
    such a lock for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    for lock in folder.glob("**/lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > STALE:
            found = (
                f"{lock} is {minutes:.0f} minutes old: its process probably died, and every "
                "start waits for it"
            )
            raise Problem(found, "remove that file, unless something is compiling right now")
    return f"nothing is being compiled in {folder}"


def memory(context: Context) -> str:
    """The parts that do not depend on the batch against the GPU: activations and logits come on
    top."""
    needed = rank_bytes(context.recipe, context.world)
    found = f"{_size(needed)} of states per rank on {context.world} rank(s), activations on top"
    if context.job.device.type == "cpu":
        return f"{found}; no GPU here to compare with"
    free, total = torch.cuda.mem_get_info(context.job.device)
    if needed > 0.9 * total:
        way = (
            "engine=fsdp2 or zero with config zero3.json, more ranks, model.dtype=bfloat16, or "
            "offload"
        )
        raise Problem(f"{found}, of {_size(total)}", way)
    if free < 0.9 * total:
        raise Problem(
            f"only {_size(free)} of the GPU's {_size(total)} are free",
            "see nvidia-smi: another job is on it",
        )
    return f"{found}, of {_size(total)}"


def smoke(context: Context) -> str:
    """One step of the same recipe with a tiny model, in a process of its own per rank, in a folder
    beside the run's that is thrown away. Collective."""
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
    "smoke": smoke,
}
STALE = 10  # minutes: compiling DeepSpeed's largest operator takes less
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


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _agreed_place(context: Context) -> Path:
    """A path that nobody has, the same on every rank and on storage that all nodes share, as the
    run's own has to be. Collective."""
    peers = Peers(context.job.world_size)
    word = peers.gather(secrets.token_hex(8))[0]
    peers.close()
    run_dir = context.recipe.resolved_run_dir().absolute()
    return _existing(run_dir.parent) / f".tram_ds-doctor-{word}"


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


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
