"""The job scripts of a submission, as text."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from tram_ds.jobs.shell import expanded, word
from tram_ds.jobs.slurm_config import Slurm
from tram_ds.runtime.git import git_commit
from tram_ds.runtime.wording import short

JOB, AFTER = "job.sbatch", "after.sbatch"
# of the job script, and what the image of a container must not replace
OURS = ("PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", "TRAM_DS_GIT_COMMIT")


def job_script(name: str, slurm: Slurm, folder: Path, cells: int | None) -> str:
    """The batch script of a run or, with a number of cells, of an array."""
    # the deepspeed launcher starts the ranks of a node itself, srun one task for each
    per_node = 1 if slurm.launcher == "deepspeed" else slurm.ranks
    # its one task has the cores of all ranks that it starts
    cpus = slurm.cpus_per_task * (slurm.ranks if slurm.launcher == "deepspeed" else 1)
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    options = {
        **_who(slurm, slurm.partition),
        "job-name": plain(name),
        "nodes": slurm.nodes,
        "ntasks-per-node": per_node,
        "cpus-per-task": cpus,
        "gpus-per-node": f"{kind}{slurm.gpus_per_node}" if slurm.gpus_per_node else None,
        "mem": slurm.mem,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "exclusive": slurm.exclusive or None,
        "array": cells
        and f"0-{cells - 1}" + (f"%{slurm.array_limit}" if slurm.array_limit else ""),
        # B: to the batch script alone, which asks every rank again until it has heard
        "signal": f"B:USR2@{slurm.signal_seconds}",
        "requeue": True,
        "open-mode": "append",
        "output": "%x-%A_%a.log" if cells else "%x-%j.log",
    }
    values = {
        **slurm.model_dump(),
        "cpus_per_task": cpus,
        "ranks": slurm.ranks,
        "command": f"sbatch {JOB}",
        "commit": git_commit(),
    }
    return _render(
        "job.sbatch.j2", f"{_ranks(slurm)} of {short(name)}", slurm, folder, options, values
    )


def after_command(slurm: Slurm) -> str | None:
    """The shell command that follows an array, if any."""
    if slurm.after.command is not None:
        return None if slurm.after.command == "none" else slurm.after.command
    inside = '"${inside[@]}" ' if slurm.container else ""
    return f'{inside}"$python" "$submitted/code/launch/compare.py" "$@"'


def after_script(name: str, slurm: Slurm, folder: Path, command: str, runs: Sequence[Path]) -> str:
    """The batch script of the job that starts when an array is done."""
    options = {
        **_who(slurm, slurm.after.partition or slurm.partition),
        "job-name": f"{plain(name)}-after",
        "ntasks": 1,
        "cpus-per-task": slurm.after.cpus,
        "mem": slurm.after.mem,
        "time": slurm.after.time,
        "requeue": True,
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    values = {**slurm.model_dump(), "after": command, "runs": runs}
    return _render(
        "after.sbatch.j2", f"after the runs of {short(name)}", slurm, folder, options, values
    )


def _who(slurm: Slurm, partition: str | None) -> dict[str, Any]:
    return {"partition": partition, "account": slurm.account, "qos": slurm.qos}


def _ranks(slurm: Slurm) -> str:
    return f"{slurm.nodes} node(s) x {slurm.ranks} ranks ({slurm.launcher})"


def plain(name: str) -> str:
    """A name for SLURM and for folders: letters, digits, _ . -"""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"


def _render(
    template: str,
    title: str,
    slurm: Slurm,
    folder: Path,
    options: Mapping[str, Any],
    values: Mapping[str, Any],
) -> str:
    lines = [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in options.items()
        if value is not None
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # a name misspelt in the template would else be an empty word of a job script
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"q": word, "expanded": expanded}
    folders, box = (Path.cwd(), folder.parent), slurm.container
    given = {
        "title": title,
        "folder": folder,
        "cwd": folders[0],
        "options": [*lines, *slurm.sbatch_options],
        "inside": box.inside(slurm.gpus_per_node > 0, folders) if box else [],
        "srun_container": box.srun_options(folders, [*OURS, *slurm.env]) if box else [],
        "python": slurm.python or ("python3" if box else sys.executable),
    }
    return environment.get_template(template).render({**values, **given})
