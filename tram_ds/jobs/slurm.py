"""Submission to SLURM: a folder with a snapshot of code and recipes, a readable job script in it,
and sbatch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tram_ds.jobs.cells import Cell
from tram_ds.jobs.slurm_config import Slurm
from tram_ds.jobs.slurm_script import AFTER, JOB, after_command, after_script, job_script, plain
from tram_ds.recipe.file import CONFIGS, LAUNCH, PACKAGE, RECIPES
from tram_ds.recipe.recipe import accumulation, dump
from tram_ds.runtime.files import private_dir, remove_tree, write_whole

BESIDE = (LAUNCH, CONFIGS, RECIPES)  # of the package, in a snapshot as in a checkout
NO_SLURM = "sbatch: not found; submit from a login node of the cluster (--dry-run shows the job)"


class SlurmError(RuntimeError):
    """A SLURM command that is missing or failed, with what it said."""


@dataclass(frozen=True)
class Plan:
    """A submission, not yet written: `files` by name inside `folder`, and the sbatch commands to
    run there."""

    folder: Path
    files: Mapping[str, str]
    finished: Sequence[Cell]
    cells: Sequence[Cell]
    array: bool

    @property
    def scripts(self) -> list[str]:
        """The job scripts among `files`: that of the runs, and where there is one, that of the job
        after them."""
        return [name for name in (JOB, AFTER) if name in self.files]

    def commands(self, job_id: str = "JOB_ID") -> list[list[str]]:
        """sbatch for the runs and, where there is one, for the job after them."""
        commands = [["sbatch", "--parsable", JOB]]
        if AFTER in self.files:
            commands.append(
                [
                    "sbatch",
                    "--parsable",
                    f"--dependency=afterok:{job_id}",
                    "--kill-on-invalid-dep=yes",
                    AFTER,
                ]
            )
        return commands


@dataclass(frozen=True)
class Submitted:
    """What SLURM answered: the ids of the job (or array) and of the one after it, and when it
    expects to start."""

    plan: Plan
    job: str
    after: str | None = None
    start: str | None = None

    def text(self) -> str:
        """How to watch, stop and cancel it."""
        folder = shlex.quote(str(self.plan.folder))
        name = "*" if self.plan.array else f"*-{self.job}"
        one = f"{self.job}_0" if self.plan.array else self.job
        when = f", expected to start {self.start}" if self.start else ""
        lines = [f"job {self.job}: {len(self.plan.cells)} run(s), submitted from {folder}{when}"]
        if self.after:
            lines.append(f"job {self.after}: starts when all of them are done")
        lines += [
            f"  watch      squeue --job {','.join(filter(None, (self.job, self.after)))} --start",
            f"  log        tail -F {folder}/{name}.log",
            f"  preempt    scancel --batch --signal=USR2 {one}    # save, requeue, go on",
            f"  stop       touch {folder}/STOP    # save, do not requeue; submit again to go on",
            f"  cancel     scancel {self.job}    # SIGTERM, and SIGKILL soon after",
        ]
        return "\n".join(lines)


def plan(cells: Sequence[Cell], slurm: Slurm, array: bool = False, name: str | None = None) -> Plan:
    """What submitting `cells` would write and run. Finished runs are left out.

    array: one job with a task per cell, needed for several. name: of the job; None = the recipe's.
    Raises RecipeError for batch sizes that do not fit the ranks.
    """
    key = "gpus_per_node" if slurm.gpus_per_node == slurm.ranks else "ranks_per_node"
    fewer = f"slurm.{key}={{}}" if slurm.nodes == 1 else "slurm.nodes and ranks of {} in all"
    for cell in cells:
        # all cells before anything is written: a batch that these ranks cannot share
        accumulation(cell.recipe, slurm.world_size, fewer)
    finished = [cell for cell in cells if cell.finished]
    todo = [cell for cell in cells if not cell.finished]
    array = array or len(cells) > 1
    name = name or cells[0].recipe.name
    # UTC and pid: two submissions, from two login nodes too, get folders of their own
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
    place = (
        Path(os.path.commonpath([cell.run_dir.parent for cell in cells]))
        if array
        else cells[0].run_dir
    )
    folder = place / (f"slurm-{plain(name)}-{stamp}" if array else f"slurm-{stamp}")
    files = {f"cells/{index:04d}.yaml": dump(cell.recipe) for index, cell in enumerate(todo)}
    for index, cell in enumerate(todo):
        files[f"cells/{index:04d}.folder"] = f"{cell.run_dir}\n"
    files[JOB] = job_script(name, slurm, folder, len(todo) if array else None)
    if array and (command := after_command(slurm)):
        files[AFTER] = after_script(name, slurm, folder, command, [cell.run_dir for cell in cells])
    return Plan(folder, files, finished, todo, array)


def write(plan: Plan) -> None:
    """Makes the submission's folder (0700) with its files (0600) and the snapshot of the code."""
    private_dir(plan.folder.parent)
    plan.folder.mkdir(mode=0o700)
    private_dir(plan.folder / "cells")
    for name, text in plan.files.items():
        write_whole(plan.folder / name, text)
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(PACKAGE, plan.folder / "code" / PACKAGE.name, ignore=skipped)
    for part in BESIDE:
        shutil.copytree(part, plan.folder / "code" / part.name, ignore=skipped)


def submit(plan: Plan) -> Submitted:
    """Writes the folder and hands it to SLURM. SlurmError, with SLURM's words, if it refuses."""
    if not plan.cells:
        raise SlurmError("every run is finished: nothing to submit")
    if shutil.which("sbatch") is None:
        raise SlurmError(NO_SLURM)
    write(plan)
    try:
        # both scripts before the first is submitted: else a job would run with none after it
        tests = [
            _sbatch(["sbatch", "--test-only", script], plan.folder)[1] for script in plan.scripts
        ]
    except SlurmError:
        remove_tree(plan.folder, ours=lambda _: True)  # made a moment ago, by write()
        raise
    job = _sbatch(plan.commands()[0], plan.folder)[0].partition(";")[0]
    try:
        after = [
            _sbatch(command, plan.folder)[0].partition(";")[0] for command in plan.commands(job)[1:]
        ]
    except SlurmError as error:
        raise SlurmError(
            f"job {job} is submitted (scancel {job} takes it back), but not the one after it: "
            f"{error}"
        ) from None
    starts = [found[1] for found in [re.search(r"to start at (\S+)", tests[0])] if found]
    return Submitted(plan, job, after[0] if after else None, starts[0] if starts else None)


def test(name: str, slurm: Slurm) -> str:
    """Asks SLURM whether it would take a run of recipe `name`; its answer. Nothing is submitted.
    SlurmError if not."""
    with tempfile.TemporaryDirectory(prefix="tram_ds-") as folder:
        (Path(folder) / JOB).write_text(job_script(name, slurm, Path(folder), None))
        return _sbatch(["sbatch", "--test-only", JOB], Path(folder))[1]


def _sbatch(command: Sequence[str], folder: Path) -> tuple[str, str]:
    """Output and error text. Runs in `folder`, without the variables of a job this shell may itself
    be in."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    try:
        done = subprocess.run(
            command, cwd=folder, env=kept, capture_output=True, text=True, timeout=120
        )
    except FileNotFoundError:
        raise SlurmError(NO_SLURM) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            "sbatch: no answer within 120 s; is the SLURM controller up (scontrol ping)?"
        ) from None
    if done.returncode:
        raise SlurmError(
            f"{shlex.join(command)} in {folder}: "
            f"{done.stderr.strip() or f'status {done.returncode}'}"
        )
    return done.stdout.strip(), done.stderr.strip()
