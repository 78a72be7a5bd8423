"""ZeRO-3 with its hooks on every module, and on whole blocks: python -m tests.parity.leaf_worker
OUT. OUT: row -> [digests of all ranks' masters after two steps, per way]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.stored_worker import digest, settings
from tests.parity.build import leave
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.stepper import Stepper
from tram_ds.engines import choose as engines
from tram_ds.models.chunked import Chunked
from tram_ds.runtime.ranks import detect, joined
from tram_ds.tasks.causal import counts, inputs, next_tokens

TINY = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 49, "n_positions": 16}
# row: bf16, activation checkpointing, part of every block frozen as adapters have it
ROWS = {
    "tram_prev": (True, False, False),
    "tram_x": (False, True, False),
    "tram_init": (False, False, True),
}


def batches(rank: int, step: int) -> list[Any]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [{"input_ids": torch.randint(0, 49, (2, 16), generator=generator)} for _ in range(2)]


def steps(job: Any, row: str, whole: bool) -> str:
    half, checkpointing, frozen = ROWS[row]
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **TINY, bos_token_id=0, eos_token_id=0, use_cache=False)
    model: Any = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or ".mlp." in name)
    settled = settings(job, "zero3", half, None, accumulation=2, one_backward=whole)
    engine = engines.build("zero", model, settled)
    options: Any = {"radius_scale": 10.0}
    if row == "tram_x":
        options["noise_site"] = "embedding"
    stepper = Stepper(engine, algorithm(row, **options), 0)
    forward = Chunked(inputs, next_tokens)
    for step in range(2):
        stepper.step(batches(job.rank, step), forward, counts)
    found = digest(engine.params())
    engine.model.destroy()
    return found


def main(out: str) -> None:
    job, found = detect(), {}
    torch.set_num_threads(1)
    with joined(job, "zero"):
        for row in ROWS:
            mine = [steps(job, row, whole) for whole in (False, True)]
            every: list[Any] = [None] * job.world_size
            dist.all_gather_object(every, mine)
            found[row] = [list(way) for way in zip(*every, strict=True)]
        if job.rank == 0:
            Path(out).write_text(json.dumps(found))
        dist.barrier()
        leave()


if __name__ == "__main__":
    main(sys.argv[1])
