"""Bytes of the real tensors of every sharded engine on this rank: python -m
tests.planning.planning_ranks OUT, on 2 ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from tests.parity.build import leave
from tram_ds.bench.contenders import Work, build_engine, ours
from tram_ds.models.chunked import Chunked
from tram_ds.runtime.ranks import detect, joined
from tram_ds.tasks.causal import next_tokens

WORK = Work("tiny", 1, 32, "bfloat16")
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct storages."""
    there = (t for t in tree_leaves(list(tensors)) if t is not None)
    storages = {
        s._cdata: s.nbytes()
        for t in there
        if (s := getattr(t, "_local_tensor", t).untyped_storage())
    }
    return sum(storages.values())


def measure(name: str, job: Any) -> dict[str, int]:
    """In pass 2 of a step of tram_prev that looks ahead; and theta_{t-1}, after a step that could
    not."""
    engine: Any = build_engine(name, WORK, job)
    batch, found = WORK.batch(job), {}
    stepper, step = ours("tram_prev", engine, batch, WORK)
    step()
    original, reference = engine.backward, stepper.algorithm.regions[0].reference

    def backward(*args: Any) -> Any:
        found["theta_snapshot"], found["weights"] = (
            size(engine._theta or []),
            size(reference.weights or []),
        )
        found["predictions"] = size([*reference._now, *reference._next])
        means = original(*args)
        found["gradients"] = size(
            engine.weights.storage.gradient()
            if hasattr(engine.weights, "storage")
            else [p.grad for p in engine.module.parameters()]
        )
        return means

    engine.backward = backward
    step()
    engine.backward = original
    found["masters"] = size(engine.weights.masters())
    found["moments"] = size(t for shards in engine.moments().values() for t in shards)
    stepper.step([batch], Chunked(lambda batch: batch, next_tokens))
    found["previous"] = size(stepper.state().references["previous"])
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
