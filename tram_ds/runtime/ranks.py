"""Which process of which job this is, under any launcher, and the process group it joins."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tram_ds.runtime.launchers import place
from tram_ds.runtime.rendezvous import meet

# of a collective: longer than any step, shorter than a night of waiting for a dead rank
TIMEOUT = timedelta(minutes=10)
# NCCL ends the process at its timeout and says neither rank nor step: ours has spoken by then
NCCL_GRACE = timedelta(seconds=60)


T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """This process's place in the job. launcher: "deepspeed", "torchrun", "srun" or "python"."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str
    device: torch.device


def detect(local_rank: int | None = None) -> Job:
    """Reads the launcher's environment; ValueError where it is incomplete or contradicts itself.

    local_rank: the --local_rank that the deepspeed launcher passes. Under srun with one task per
    rank, RANK, LOCAL_RANK and WORLD_SIZE are set from SLURM's variables for the libraries that read
    them, and MASTER_ADDR and MASTER_PORT on one node.
    """
    found = place(os.environ, local_rank)
    # torch's rendezvous, DeepSpeed and Hugging Face read them from there
    os.environ.update(found.variables)
    device = _device(found.local_rank)
    return Job(found.rank, found.local_rank, found.world_size, found.launcher, device)


def threads_per_rank(job: Job) -> int:
    """Cores of this node shared by its ranks; OMP_NUM_THREADS wins where it is set."""
    ranks = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or job.world_size
    )
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // ranks))


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this node shows {count} GPUs to it: start {count} ranks "
            "per node, or look at CUDA_VISIBLE_DEVICES"
        )
    # a launcher may show each rank its own GPU alone, as number 0
    return torch.device("cuda", local_rank if count > 1 else 0)


@contextmanager
def joined(job: Job, engine: str, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """The process group of the job, left again at the end: gloo on CPU; NCCL on GPU, with gloo for
    tensors that stay on CPU.

    A single process joins one only for engines that shard (fsdp2, zero). Collective at both ends.
    PeerLost where not all ranks come within `timeout`; who is missing is said while it waits.
    """
    if job.device.type == "cuda":
        # before the group: NCCL and bare "cuda" tensors take the current device, else all GPU 0
        torch.cuda.set_device(job.device)
    if job.world_size == 1 and engine == "replicated":
        yield
        return
    if job.world_size == 1:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        # in this process: one rank needs no port, which another job could have taken
        store = dist.HashStore()
        dist.init_process_group(_backend(job), store=store, rank=0, world_size=1, timeout=timeout)
    else:
        store = meet(job.rank, job.world_size, timeout)
        if job.device.type == "cuda":
            timeout += NCCL_GRACE
        dist.init_process_group(
            _backend(job), store=store, rank=job.rank, world_size=job.world_size, timeout=timeout
        )
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
    # both on a GPU: object collectives and gathers of small facts stay on the CPU
    return "gloo" if job.device.type == "cpu" else "cpu:gloo,cuda:nccl"


def barrier() -> None:
    """Waits for every rank; nothing in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def highest(wish: int) -> int:
    """The largest of the ranks' numbers: all get the same answer at the same point. Collective,
    synchronises the host."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return wish
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    # NCCL alone sums nothing that lies on the CPU
    box = torch.tensor(wish, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def agreed(flag: bool) -> bool:
    """Whether any rank raises `flag`, as `highest`."""
    return bool(highest(int(flag)))


def from_rank_0(look: Callable[[], T]) -> T:
    """look() on rank 0 alone, its result, or its error, on every rank: for what decides a
    collective path, such as a file, which other nodes may see later or not at all. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return look()
    # the error travels too: rank 0 raising alone would leave the others in the broadcast
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = look()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]
