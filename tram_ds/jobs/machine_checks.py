"""The doctor's checks of what a run works on: launcher, network, compiler and memory."""

from __future__ import annotations

import os
import shutil
import time
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from tram_ds.jobs import slurm
from tram_ds.jobs.check import Context, Problem, size
from tram_ds.planning.plan import plan, rank_bytes
from tram_ds.planning.without_gpu import machine_memory, ranks_here

UNITS = " KMGT"  # of SLURM's amounts of memory, by powers of 1024


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
    found = f"{size(needed)} of states per rank on {context.world} rank(s), activations on top"
    if context.job.device.type == "cpu":
        return f"{found}; no GPU here to compare with"
    free, total = torch.cuda.mem_get_info(context.job.device)
    if needed > 0.9 * total:
        way = (
            "engine=fsdp2 or zero with config zero3.json, more ranks, model.dtype=bfloat16, or "
            "offload"
        )
        raise Problem(f"{found}, of {size(total)}", way)
    if free < 0.9 * total:
        raise Problem(
            f"only {size(free)} of the GPU's {size(total)} are free",
            "see nvidia-smi: another job is on it",
        )
    return f"{found}, of {size(total)}"


def host_memory(context: Context) -> str:
    """What the ranks of one node take of its CPU memory, against what there is: of this machine, or
    of what SLURM is asked for."""
    planned = plan(context.recipe, context.world)
    on_cpu = context.planned.device.type == "cpu"
    each = planned.memory.total if on_cpu else planned.host.peak
    ranks, there = _node(context)
    found = f"{size(each)} for each of a node's {ranks} rank(s)"
    if there is None:
        return f"{found}; how much a node has is not known here (`mem` of the SLURM config)"
    if each * ranks <= there:
        return f"{found}, of {size(there)}"
    if on_cpu:
        way = "a smaller train.micro_batch, fewer ranks a node, or GPUs"
    elif planned.host.drawn > planned.host.offloaded:
        way = "model.path in place of model.init, of which a rank reads what it holds"
    else:
        way = "an engine.config that does not offload (shard.yaml, zero3.json), or more nodes"
    raise Problem(f"{found}, of {size(there)}", way)


def _node(context: Context) -> tuple[int, float | None]:
    """(ranks of the run on one node, bytes of its memory, None where that is not known)."""
    if context.slurm is None:
        return ranks_here(context.job), machine_memory()
    asked = context.slurm.mem
    if not asked or not asked.strip("0"):  # the cluster's default, or all that a node has
        return context.slurm.ranks, None
    unit = asked[-1] if asked[-1] in UNITS else "M"  # as SLURM has it
    return context.slurm.ranks, int(asked.rstrip("KMGT")) * 1024.0 ** UNITS.index(unit)


STALE = 10  # minutes: compiling DeepSpeed's largest operator takes less
