"""Host memory that each phase of a run adds to this rank: python -m tests.bench.host_memory_worker
OUT SOURCE ENGINE WAY, on 2 ranks.

SOURCE: the model's folder, or model.init as JSON. WAY: whole, left or stored, how it is loaded; a
stored one, which is left where it is too, then takes a step, is saved, continued, exported and
scored. OUT: phase -> bytes per rank; parameters; elements of the largest.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.models.stored_worker import settings
from tests.parity.build import leave
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.stepper import Stepper
from tram_ds.checkpoint.export import export
from tram_ds.checkpoint.resume import Saver, load
from tram_ds.engines import choose as engines
from tram_ds.evaluation.score import evaluation_mode
from tram_ds.models.chunked import Chunked
from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.recipe.model_section import ModelSection
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import Job, detect, joined
from tram_ds.tasks.causal import next_tokens

TOKENS = 32


def anonymous(pid: int | str = "self") -> int:
    """Bytes of a process that no file backs. OSError, StopIteration for one that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# The kernel keeps no high-water mark of RssAnon, so it is looked at every millisecond: by another
# process, because a library that holds the interpreter's lock while it allocates is never seen by a
# thread of its own.
WATCH = """
import select, sys
print(flush=True)
most = 0
while not select.select([sys.stdin], [], [], 0.001)[0]:
    for line in open("/proc/" + sys.argv[1] + "/status"):
        if line.startswith("RssAnon"):
            most = max(most, 1024 * int(line.split()[1]))
print(most)
"""


class Peak:
    """Of RssAnon, from its making to added()."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-c", WATCH, str(os.getpid())]
        self.watch = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.watch.stdout is not None
        self.watch.stdout.readline()  # it looks from now on
        self.start_bytes = anonymous()

    def added(self) -> int:
        most, _ = self.watch.communicate()
        return max(int(most), anonymous()) - self.start_bytes


class Phases(dict[str, list[int]]):
    """Phase -> bytes that it added to each rank."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Collective: the ranks begin together, without what an earlier phase left to the
        allocator, which would hide what this one takes."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        dist.barrier()
        peak = Peak()
        yield
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, peak.added())
        self[name] = every


def main(out: str, source: str, name: str, way: str) -> None:
    job = detect()
    with joined(job, "zero" if name.startswith("zero") else "fsdp2"):
        loader = load_model if way == "whole" else load_stored
        fresh = source.startswith("{")
        section = ModelSection(init=json.loads(source)) if fresh else ModelSection(path=source)
        warm(loader)
        phases = Phases()
        with phases.phase("loading"):
            model: Any = loader(AutoModelForCausalLM, section)
            fill = None if way == "whole" else model.stored.read
            kind = "zero" if name.startswith("zero") else name
            engine = engines.build(kind, model, settings(job, name, True, fill))
        if way == "stored":
            go_on(phases, job, engine)
        shapes = {span.name: torch.Size(span.shape).numel() for span in engine.layout}
        if job.rank == 0:
            found = {"parameters": sum(shapes.values()), "largest": max(shapes.values())}
            Path(out).write_text(json.dumps({**phases, **found}))
        dist.barrier()
        leave()


def go_on(phases: Phases, job: Job, engine: Any) -> None:
    """Steps, and what stands around them, in a folder of this run's own."""
    box: list[Any] = [tempfile.mkdtemp() if job.rank == 0 else None]
    dist.broadcast_object_list(box)
    run = Path(box[0])
    stepper, forward = Stepper(engine, algorithm("sam"), 0), Chunked(lambda b: b, next_tokens)
    ids = torch.arange(TOKENS)[None] * (job.rank + 2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    step = lambda: stepper.step([batch], forward, lambda b: (TOKENS - 1, TOKENS))  # noqa: E731
    step()  # the optimizer's moments are there from now on
    with phases.phase("step"):
        step()
    with Saver(run, stepper) as saver:
        with phases.phase("saving"):
            path = saver.save()
        step()
        with phases.phase("saving in the background"):
            saver.save(asynchronous=True)
            saver.wait()
    with phases.phase("resuming"):
        load(stepper, path)
    with phases.phase("exporting"):
        export(engine, run / "export", Peers(job.world_size), dtype=torch.bfloat16)
    with phases.phase("scoring"), torch.no_grad(), evaluation_mode(engine.model):
        forward(engine.model, batch)
    dist.barrier()
    if job.rank == 0:
        shutil.rmtree(run)


def warm(loader: Any) -> None:
    """What a first model of any size costs (imports, caches, threads) is not the model's."""
    tiny = {"architecture": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    loader(AutoModelForCausalLM, ModelSection(init={**tiny, **heads}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
