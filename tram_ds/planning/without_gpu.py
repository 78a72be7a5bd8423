"""A large model on a machine without a GPU: what it would need there, before anything is waited
for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from tram_ds.planning.outline import PATHS
from tram_ds.planning.plan import Plan, plan
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.ranks import Job

GB = 1e9
LARGE = 0.2 * GB  # bytes of weights: below, a run on CPUs is a trial that ends
SLOW = 1e13  # FLOPs of a step: above, a CPU takes many seconds for it


def check(recipe: Recipe, job: Job) -> None:
    """On CPUs: ValueError where the ranks of this machine need more memory than it has; a line on
    rank 0 where they do not and a step is long. Asks no hub: of models that are not known by their
    path it says nothing."""
    if job.device.type != "cpu" or not _large(recipe.model.path):
        return
    found = plan(recipe, job.world_size)
    here = ranks_here(job)
    total = machine_memory()
    if found.memory.total * here > total:
        raise ValueError(
            f"recipe {recipe.name}: no GPU here, and {_needs(found)} for each of {here} "
            f"rank{'s' * (here != 1)}, of {total / GB:.0f} GB in this machine: {_ways(recipe)}"
        )
    flops = found.cost.model_flops
    if flops > SLOW and job.rank == 0:
        print(
            f"no GPU here: {_needs(found)} a rank, and at 1 TFLOP/s a step takes "
            f"{flops / 1e12 / 60:.1f} minutes: {_ways(recipe)}",
            file=sys.stderr,
            flush=True,
        )


def ranks_here(job: Job) -> int:
    """Ranks of the job on this machine, as the launcher says it; all of them where it does not."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(local or job.world_size)


def machine_memory() -> float:
    """Bytes that the processes of this machine may use: a container's limit where it has one."""
    try:
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such file, or `max`
        limit = float("inf")
    return min(limit, psutil.virtual_memory().total)


def _large(path: str | None) -> bool:
    if path is None or not Path(path).is_dir():
        return path in PATHS
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) > LARGE


def _needs(found: Plan) -> str:
    return (
        f"{found.size.parameters / 1e9:.2f} billion parameters need about "
        f"{found.memory.total / GB:.1f} GB"
    )


def _ways(recipe: Recipe) -> str:
    return (
        f"`tram plan --recipe {recipe.name} --gpus 1,4` says how many GPUs it takes, `--smoke` "
        "runs the same code on a tiny model here"
    )
