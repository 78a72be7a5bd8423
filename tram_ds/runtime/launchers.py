"""What a launcher's environment says about this process; one that contradicts itself is refused,
with the command that would work."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tram_ds.runtime.exits import MEANING

ANNOUNCED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# what Flux and MPI launchers call the number of processes that they started, and a process's own
MPI = {
    "FLUX_JOB_SIZE": "FLUX_TASK_RANK",  # before PMI's, which Flux sets too
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
}
FIRST_NODE = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


@dataclass(frozen=True)
class Place:
    """Where a process is in its job. variables: what its libraries read and the launcher did not
    set."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str
    variables: dict[str, str] = field(default_factory=dict[str, str])


def tell_launcher(said: str, code: int) -> None:
    """Makes this line, and what the exit code means, the last thing on the screen of a job that
    fails. torchrun ends with 1 whatever its ranks end with, and its last words are what the first
    of them that failed left in a file. The deepspeed launcher keeps the code, and prints lines of
    its own: rank 0's are said after it has ended."""
    meaning = f": {MEANING[code]}" if code in MEANING else ""
    line = f"{said} (exit {code}{meaning})"
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"message": line, "timestamp": int(time.time())}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(told), encoding="utf-8")
    elif os.environ.get("RANK") == "0" and _of_deepspeed(os.getppid()):
        with contextlib.suppress(OSError):
            _say_after(os.getppid(), line)


def _of_deepspeed(pid: int) -> bool:
    """Whether a process is the deepspeed launcher's own of this node."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # no Linux, or gone
        return False
    return b"deepspeed.launcher.launch" in words


def _say_after(pid: int, line: str) -> None:
    """On this process's stderr, once process `pid` has ended; not at all where that takes more than
    a minute. By a process that is nobody's child: the launcher stops the children of its ranks,
    and waits for them. OSError where no shell can be started."""
    there = '[ -e "/proc/$1/exe" ]'  # not for one that has ended and nobody has waited for
    wait = f"i=0; while {there} && [ $i -lt 1200 ]; do sleep 0.05; i=$((i+1)); done"
    say = there + ' || printf "%s\\n" "$2" >&3'
    script = f"({wait}; {say}) 3>&2 2>/dev/null &"
    subprocess.run(
        ["sh", "-c", script, "sh", str(pid), line],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )


def rank_variables(rank: int, world_size: int, port: str) -> dict[str, str]:
    """What torchrun's variables say to a rank where all of them are on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def place(env: Mapping[str, str], local_rank: int | None = None) -> Place:
    """Reads an environment. ValueError where it is incomplete or contradicts itself.

    local_rank: the --local_rank of the command line, which the deepspeed launcher adds.
    """
    tasks = _tasks(env)
    if "RANK" not in env and "TORCHELASTIC_RUN_ID" not in env and tasks > 1:
        return _of_srun(env, tasks)
    launcher = _launcher(env, local_rank, tasks)
    _refuse_several_launchers(env, launcher, tasks)
    world_size = _number(env, "WORLD_SIZE", 1)
    if world_size > 1 or "RANK" in env:
        _refuse_incomplete(env, launcher, world_size)
    rank = _number(env, "RANK", 0)
    local = _number(env, "LOCAL_RANK", local_rank or 0)
    local_size = _number(env, "LOCAL_WORLD_SIZE", world_size)
    wrong = [
        (rank >= world_size, f"RANK={rank} of WORLD_SIZE={world_size}"),
        (local >= local_size, f"LOCAL_RANK={local} of LOCAL_WORLD_SIZE={local_size}"),
        (local_size > world_size, f"LOCAL_WORLD_SIZE={local_size} of WORLD_SIZE={world_size}"),
        (local > rank, f"LOCAL_RANK={local}, but RANK={rank}"),
        (local_rank not in (None, local), f"LOCAL_RANK={local}, but --local_rank={local_rank}"),
    ]
    for bad, text in wrong:
        if bad:
            raise ValueError(f"{launcher} announces {text}: {_ways(world_size)}")
    return Place(rank, local, world_size, launcher)


def _tasks(env: Mapping[str, str]) -> int:
    """Tasks of the srun step that this process is one of; 1 outside of one.

    A shell of salloc and a notebook's step are steps of one task in a job of several. A batch
    script is in no step.
    """
    if "SLURM_STEP_NUM_TASKS" in env:
        return _number(env, "SLURM_STEP_NUM_TASKS", 1)
    if "SLURM_PROCID" not in env:
        return 1
    tasks = _number(env, "SLURM_NTASKS", 1)
    in_step = "SLURM_STEP_ID" in env or env["SLURM_PROCID"] != "0"
    if in_step or tasks == 1 or "RANK" in env or "WORLD_SIZE" in env:
        return tasks if in_step else 1
    raise ValueError(
        f"this SLURM job has {tasks} tasks, and this process was started by none of them: "
        f"`srun {_command()}` starts {tasks} ranks, `srun --ntasks=1 {_command()}` one"
    )


def _of_srun(env: Mapping[str, str], tasks: int) -> Place:
    rank, local = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID")
    if rank >= tasks or local > rank:
        raise ValueError(
            f"srun announces SLURM_PROCID={rank} and SLURM_LOCALID={local} of {tasks} tasks: "
            f"`srun --ntasks={tasks} {_command()}` in a fresh shell sets them"
        )
    found = {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(tasks)}
    nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
    if nodes == 1:
        found["MASTER_ADDR"] = env.get("MASTER_ADDR", "127.0.0.1")
        # from the job's number: all its ranks get the same without asking, two jobs mostly do not
        port = 20000 + _number(env, "SLURM_JOB_ID", 0) % 10000
        found["MASTER_PORT"] = env.get("MASTER_PORT", str(port))
    _refuse_incomplete({**env, **found}, "srun", tasks)
    return Place(rank, local, tasks, "srun", found)


def _launcher(env: Mapping[str, str], local_rank: int | None, tasks: int) -> str:
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "RANK" not in env:
        return "python"
    if local_rank is not None or "CROSS_SIZE" in env:
        return "deepspeed"
    return "srun" if tasks > 1 else "torchrun"


def _refuse_several_launchers(env: Mapping[str, str], launcher: str, tasks: int) -> None:
    """Where one launcher started several processes and another, or nothing, tells them apart."""
    if launcher == "torchrun" and 1 < tasks != _number(env, "GROUP_WORLD_SIZE", tasks):
        raise ValueError(
            f"srun started {tasks} torchrun agents, each with a job of its own "
            f"(GROUP_WORLD_SIZE={env['GROUP_WORLD_SIZE']}): `srun {_command()}` starts a rank per "
            "task without torchrun, which needs --ntasks-per-node=1, --nnodes and --rdzv-endpoint"
        )
    same = env.get("RANK") == env.get("SLURM_PROCID") and env.get("WORLD_SIZE") == str(tasks)
    if launcher == "srun" and not same:
        raise ValueError(
            f"srun started task {env.get('SLURM_PROCID')} of {tasks}, but RANK={env['RANK']} and "
            f"WORLD_SIZE={env.get('WORLD_SIZE')} were exported before it: `unset "
            f"{' '.join(ANNOUNCED[:3])}` and start it again"
        )
    if tasks == 1:
        _refuse_mpi(env, launcher)


def _refuse_mpi(env: Mapping[str, str], launcher: str) -> None:
    """Where Flux or an MPI launcher started several processes that do not all have a rank of one
    job."""
    mpi = next((name for name in MPI if _number(env, name, 1) > 1), None)
    if mpi is None:
        return
    count = _number(env, mpi)
    who = "Flux" if mpi.startswith("FLUX_") else "an MPI launcher"
    if launcher == "python":
        raise ValueError(
            f"{who} started {count} processes ({mpi}), which would each train "
            f"the same run: `torchrun --nproc_per_node {count} {_script()}`"
        )
    if "TORCHELASTIC_RUN_ID" in env:
        if (agents := _number(env, "GROUP_WORLD_SIZE", count)) != count:
            raise ValueError(
                f"{who} started {count} torchrun agents ({mpi}), each with a job of its "
                f"own (GROUP_WORLD_SIZE={agents}): `torchrun --nproc_per_node "
                f"{env.get('LOCAL_WORLD_SIZE', count)} {_script()}` without it"
            )
        return
    own = env.get(MPI[mpi])
    if own is not None and (env["RANK"], env.get("WORLD_SIZE")) != (own, str(count)):
        raise ValueError(
            f"{who} started process {own} of {count} ({mpi}), but RANK={env['RANK']} and "
            f"WORLD_SIZE={env.get('WORLD_SIZE')} were exported before it: `unset "
            f"{' '.join(ANNOUNCED[:3])}`, and `torchrun --nproc_per_node {count} {_script()}`"
        )


def _refuse_incomplete(env: Mapping[str, str], launcher: str, world_size: int) -> None:
    needed = ANNOUNCED if world_size > 1 else ("RANK", "WORLD_SIZE")
    if missing := [name for name in needed if not env.get(name)]:
        if launcher == "srun":
            port = env.get("MASTER_PORT", "20000")
            way = f"`export MASTER_ADDR={FIRST_NODE} MASTER_PORT={port}` before srun"
        else:
            way = _ways(world_size)
        raise ValueError(
            f"{launcher} announces {world_size} ranks but not {', '.join(missing)}: {way}"
        )
    if world_size > 1 and not 0 < _number(env, "MASTER_PORT") < 65536:
        raise ValueError(f"MASTER_PORT={env['MASTER_PORT']}: expected 1 to 65535, e.g. 29500")


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """ValueError where the variable is no whole number, or is missing and has no default."""
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit():
        shown = "is not set" if text is None else f"= {text!r}: expected a whole number"
        raise ValueError(f"environment variable {name} {shown}; `unset {name}` or start again")
    return int(text)


def _ways(world_size: int) -> str:
    return (
        f"`torchrun --nproc_per_node {max(world_size, 2)} {_script()}` sets them all; for one "
        f"process `unset {' '.join(ANNOUNCED)}`"
    )


def _command() -> str:
    return f"python {_script()}"


def _script() -> str:
    module = sys.argv[0].endswith("tram_ds/__main__.py")  # -m tram_ds
    return shlex.join(["-m", "tram_ds", *sys.argv[1:]] if module else sys.argv)
