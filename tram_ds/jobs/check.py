"""What a check of the doctor is given, and what it gives: a line, or a Problem with its way out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from tram_ds.jobs.slurm_config import Slurm
from tram_ds.planning import states
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.ranks import Job
from tram_ds.tasks import choose as tasks


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


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
