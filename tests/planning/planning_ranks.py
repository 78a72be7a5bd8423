"""Bytes of the real tensors of every sharded engine on this rank: python -m
tests.planning.planning_ranks OUT, on 2 ranks."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from tests.parity.build import leave
from tram_ds.bench.contenders import Work, build_engine, ours
from tram_ds.checkpoint import tensors
from tram_ds.checkpoint.resume import Saver
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
    """In pass 2 of a step of tram_prev that looks ahead; theta_{t-1}, after a step that could not;
    and what is left of that in the passes beside a background save."""
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
    for key, asynchronous in (("saved", True), ("saved at once", False)):
        found[key] = after_a_save(stepper, step, asynchronous)
        stepper.step([batch], Chunked(lambda batch: batch, next_tokens))
    if hasattr(engine.model, "destroy"):
        engine.model.destroy()
    return found


def after_a_save(stepper: Any, step: Callable[[], Any], asynchronous: bool) -> int:
    """Bytes of theta_{t-1} that are still there in the last pass of the next step, while its save,
    if asynchronous, waits to be written. Nothing of them is held here."""
    engine, passed, left = stepper.engine, threading.Event(), 0
    there = {
        StorageWeakRef(p.untyped_storage()): p.untyped_storage().nbytes()
        for p in stepper.state().references["previous"]
    }
    original, write = engine.backward, tensors.write

    def backward(*args: Any) -> Any:
        nonlocal left
        left = sum(count for storage, count in there.items() if not storage.expired())
        return original(*args)

    def descend(*args: Any) -> Any:
        passed.set()  # the descent waits for the save
        return descent(*args)

    def waits(*args: Any) -> None:
        if asynchronous:
            passed.wait()
        write(*args)

    descent, engine.descend, engine.backward = engine.descend, descend, backward
    with mock.patch.object(tensors, "write", waits), tempfile.TemporaryDirectory() as own:
        run = shared(own)
        with Saver(run, stepper) as saver:
            saver.save(asynchronous)
            step()
            saver.wait()
    del engine.backward, engine.descend
    return left


def shared(folder: str) -> str:
    """Rank 0's."""
    box = [folder]
    dist.broadcast_object_list(box)
    return box[0]


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
