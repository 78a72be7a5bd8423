"""Bytes of the real tensors of every sharded engine on this rank: python -m tests.unit.planning_ranks OUT, on 2 ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parity.build import leave
from tram_ds.bench.contenders import Work, build_engine, forward, ours
from tram_ds.distributed import detect, joined
from tram_ds.shards import Shards

WORK = Work("tiny", 1, 32, "bfloat16")
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct storages."""
    storages = {s._cdata: s.nbytes() for t in tensors if (s := getattr(t, "_local_tensor", t).untyped_storage())}
    return sum(storages.values())


def measure(name: str, job: Any) -> dict[str, int]:
    engine: Any = build_engine(name, WORK, job)
    batch, found = WORK.batch(job.rank), {}
    stepper, step = ours("tram_prev", engine, batch, 0)
    step()
    original = engine.backward

    def backward(*args: Any) -> Any:
        means = original(*args)
        gradient: list[Tensor] = engine.storage.gradient() if hasattr(engine, "storage") else [p.grad for p in engine.parameters]
        found["gradients"] = size(gradient)
        return means

    def probe(_: Any, epsilon: Shards) -> None:
        found["epsilon"] = size(epsilon)

    engine.backward = backward
    stepper.step([batch], forward, probe=probe)
    found["masters"] = size(engine.storage.masters() if hasattr(engine, "storage") else engine.parameters)
    found["moments"] = size(t for shards in engine.moments().values() for t in shards)
    found["references"] = size(stepper.state().references["previous"])
    if hasattr(engine.model, "destroy"):
        engine.model.destroy()
    return found


def main(out: str) -> None:
    torch.set_num_threads(1)
    job = detect()
    with joined(job, "sharded"):
        found = {name: measure(name, job) for name in ENGINES}
        if job.rank == 0:
            Path(out).write_text(json.dumps(found))
        dist.barrier()
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
