"""Which process of which job this is, under any launcher, and the process group it joins."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tram_ds.runtime.exits import PeerLost

# of a collective: longer than any step, shorter than a night of waiting for a dead rank
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Job:
    """This process's place in the job. launcher: "deepspeed", "torchrun", "srun" or "python"."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str
    device: torch.device


def detect(local_rank: int | None = None) -> Job:
    """Reads the launcher's environment; ValueError where it is incomplete.

    local_rank: the --local_rank that the deepspeed launcher passes. Under srun with one task per
    rank, RANK, LOCAL_RANK and WORLD_SIZE are set from SLURM's variables for the libraries that read
    them, and MASTER_ADDR and MASTER_PORT on one node.
    """
    if (
        "RANK" not in os.environ
        and int(os.environ.get("SLURM_NTASKS", "1")) > 1
        and "SLURM_PROCID" in os.environ
    ):
        names = {
            "RANK": "SLURM_PROCID",
            "LOCAL_RANK": "SLURM_LOCALID",
            "WORLD_SIZE": "SLURM_NTASKS",
        }
        os.environ.update({name: os.environ[slurm] for name, slurm in names.items()})
        if os.environ.get("SLURM_NNODES", "1") == "1":
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault(
                "MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000)
            )
        launcher = "srun"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun"
    elif "RANK" in os.environ:
        launcher = (
            "deepspeed" if local_rank is not None or "CROSS_SIZE" in os.environ else "torchrun"
        )
    else:
        launcher = "python"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        missing = [
            name
            for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            if name not in os.environ
        ]
        if missing:
            raise ValueError(
                f"{launcher} announces {world_size} ranks but not {', '.join(missing)}: export "
                "them before srun"
            )
    local = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    return Job(int(os.environ.get("RANK", "0")), local, world_size, launcher, _device(local))


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


@contextmanager
def joined(job: Job, engine: str, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """The process group of the job, left again at the end: gloo on CPU; NCCL on GPU, with gloo for
    tensors that stay on CPU.

    A single process joins one only for engines that shard (fsdp2, zero). Collective at both ends.
    """
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    if job.world_size == 1 and engine == "replicated":
        yield
        return
    if job.world_size == 1:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        store = dist.HashStore()
        dist.init_process_group(_backend(job), store=store, rank=0, world_size=1, timeout=timeout)
    else:
        try:
            dist.init_process_group(_backend(job), timeout=timeout)
        except (dist.DistError, RuntimeError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise PeerLost(
                f"rank {job.rank} of {job.world_size} could not join its peers at {where} "
                f"({str(error).splitlines()[0]}): is the "
                "port free, were all ranks started, and do they agree on WORLD_SIZE?"
            ) from error
    try:
        yield
    finally:
        if dist.is_initialized():
            # DDP's reducer holds the GIL while it dies. As the last owner of a gloo group it would
            # wait for threads that wait for the GIL, for ever; so the group gets an owner in
            # Python, which lets go of it, at the end of the process.
            atexit.register(id, dist.group.WORLD)
            dist.destroy_process_group()


def _backend(job: Job) -> str:
    return "gloo" if job.device.type == "cpu" else "cpu:gloo,cuda:nccl"


def barrier() -> None:
    """Waits for every rank; nothing in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def agreed(flag: bool) -> bool:
    """Whether any rank raises `flag`: all ranks get the same answer at the same point. Collective,
    synchronises the host."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    box = torch.tensor(int(flag), device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box)
