"""Peak bytes per rank of one step under torch's FSDP2 memory tracker: fake process group, fake tensors, our own engine and step.

python -m tests.unit.planning_tracker OUT WORLD ROW CHECKPOINTING ROWS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GPT2Config, GPT2LMHeadModel

from tram_ds.algorithm import algorithm
from tram_ds.engines.fsdp2 import FSDP2, transformer_blocks
from tram_ds.forward import Pass
from tram_ds.randomness import Draws
from tram_ds.step import climb
from tram_ds.tasks.base import Output

MODEL = {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 8192, "n_positions": 256}
TOKENS = 256


def main(out: str, world: str, row: str, checkpointing: str, rows: str) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(world))
    mesh = init_device_mesh("cpu", (int(world),))  # outside the fake mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = GPT2LMHeadModel(
            GPT2Config(**MODEL, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa")
        )
        if checkpointing == "1":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        engine = FSDP2(model, optimizer)
        for p in model.parameters():  # warmed up outside the tracker, which else counts whole moments
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        batch = {"input_ids": torch.zeros(int(rows), TOKENS, dtype=torch.long)}
        tracker = FSDPMemTracker(model, optimizer)

        def forward(m: Any, b: Any) -> Output:
            tracker.reset_mod_stats()  # it refuses a second forward otherwise
            logits = m(input_ids=b["input_ids"]).logits.flatten(0, 1)
            loss = F.cross_entropy(logits.float(), b["input_ids"].flatten(), reduction="sum")
            return Output(loss, torch.tensor(len(logits)), logits, rows=int(rows))

        run, rule = Pass(engine, forward, Draws(0, 0, 0)), algorithm(row)
        tracker.track_inputs((batch["input_ids"],))
        with tracker:
            for region in rule.regions:
                region.reference.load({name: engine.params().clone() for name in region.reference.names()})  # as after a step
                region.reference.prepare(run, [batch], None)
            climb(run, rule, [batch], None, None)
            optimizer.step()
            engine.clear()
        peak = tracker.get_tracker_snapshot("peak")
    found = {str(k): v for device, parts in peak.items() if str(device) == "cpu" for k, v in parts.items()}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
