"""Host memory that building an engine adds to this rank: python -m tests.bench.loading_worker OUT
FOLDER ENGINE WAY, on 2 ranks. WAY: whole or stored. OUT: bytes per rank, parameters, largest."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.models.stored_worker import settings
from tests.parity.build import leave
from tram_ds.engines import choose as engines
from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.recipe.model_section import ModelSection
from tram_ds.runtime.ranks import detect, joined


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The kernel keeps no high-water mark of RssAnon, so it is looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes, self.most, self.over = anonymous(), 0, False

    def run(self) -> None:
        while not self.over:
            self.most = max(self.most, anonymous())
            time.sleep(0.001)

    def added(self) -> int:
        self.over = True
        self.join()
        return max(self.most, anonymous()) - self.start_bytes


def main(out: str, folder: str, name: str, way: str) -> None:
    job = detect()
    with joined(job, "zero" if name.startswith("zero") else "fsdp2"):
        load = {"whole": load_model, "stored": load_stored}[way]
        warm(load)
        dist.barrier()
        peak = Peak()
        peak.start()
        model: Any = load(AutoModelForCausalLM, ModelSection(path=folder))
        fill = model.stored.read if way == "stored" else None
        kind = "zero" if name.startswith("zero") else name
        engine = engines.build(kind, model, settings(job, name, True, fill))
        every: list[Any] = [None] * job.world_size
        dist.all_gather_object(every, peak.added())
        shapes = {span.name: torch.Size(span.shape).numel() for span in engine.layout}
        dist.barrier()
        if job.rank == 0:
            found = {"added": every, "parameters": sum(shapes.values())}
            Path(out).write_text(json.dumps({**found, "largest": max(shapes.values())}))
        dist.barrier()
        leave()


def warm(load: Any) -> None:
    """What a first model of any size costs (imports, caches, threads) is not the model's."""
    tiny = {"architecture": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    load(AutoModelForCausalLM, ModelSection(init={**tiny, **heads}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
