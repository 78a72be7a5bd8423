"""Peak bytes per rank of one step under torch's FSDP2 memory tracker: fake process group, fake
tensors, our own engine and step.

python -m tests.planning.planning_tracker OUT WORLD ROW CHECKPOINTING ROWS VOCABULARY LOGITS

It is the step after a checkpoint, which holds the most: theta_{t-1} is moved to, and the next batch
is looked at ahead.
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

from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.objective import Losses
from tram_ds.algorithms.step import climb
from tram_ds.engines.fsdp2 import over
from tram_ds.engines.layout import transformer_blocks
from tram_ds.engines.shards import PART
from tram_ds.models.chunked import Chunked
from tram_ds.models.logit_chunks import CHUNK_ELEMENTS
from tram_ds.models.output import Output
from tram_ds.models.passes import ForwardContext
from tram_ds.models.randomness import StepRandomness
from tram_ds.tasks.causal import next_tokens

MODEL = {"n_layer": 6, "n_embd": 512, "n_head": 8, "n_positions": 256}
TOKENS = 256


def build(mesh: Any, checkpointing: bool, vocabulary: int) -> tuple[Any, torch.optim.Optimizer]:
    """A sharded bf16 GPT-2, and an AdamW that has taken a step."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    model: Any = GPT2LMHeadModel(
        GPT2Config(**MODEL, **dropout, **tokens, use_cache=False, attn_implementation="sdpa")
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for p in model.parameters():  # warmed up outside the tracker, which else counts whole moments
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


class Tracked(Chunked):
    """Chunked, for a tracker that refuses a second forward pass unless told."""

    def __init__(self, tracker: FSDPMemTracker):
        super().__init__(lambda batch: batch, next_tokens)
        self.tracker, self.verified = tracker, True  # fake tensors have no values to compare

    def __call__(self, *args: Any) -> Output:
        self.tracker.reset_mod_stats()
        return super().__call__(*args)

    def predict(self, *args: Any) -> Any:
        self.tracker.reset_mod_stats()
        return super().predict(*args)


def whole(tracker: FSDPMemTracker) -> Any:
    """The same with whole logits."""

    def forward(model: Any, batch: Any) -> Output:
        tracker.reset_mod_stats()
        logits, targets = model(**batch).logits.flatten(0, 1), next_tokens(batch)
        loss = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
        return Output(loss, torch.tensor(len(targets)), logits, rows=len(batch["input_ids"]))

    return forward


def main(
    out: str, world: str, row: str, checkpointing: str, rows: str, vocabulary: str, logits: str
) -> None:
    for sizes in (PART, CHUNK_ELEMENTS):  # a GPU's, which is what is planned
        sizes["cpu"] = sizes["cuda"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(world))
    mesh = init_device_mesh("cpu", (int(world),))  # outside the fake mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizer = build(mesh, checkpointing == "1", int(vocabulary))
        engine: Any = over(model, optimizer)
        now, after = (
            {"input_ids": torch.zeros(int(rows), TOKENS, dtype=torch.long)} for _ in range(2)
        )
        tracker = FSDPMemTracker(model, optimizer)
        forward = Tracked(tracker) if logits == "chunks" else whole(tracker)
        run, rule = ForwardContext.over(engine, forward, StepRandomness(0, 0, 0)), algorithm(row)
        tracker.track_inputs((now["input_ids"], after["input_ids"]))
        with tracker:
            for region in rule.regions:
                region.reference.load(
                    {name: engine.params().clone() for name in region.reference.names()}
                )
                region.reference.prepare(run, [now], [after])
            climb(Losses(run, rule), [now])
            for region in rule.regions:
                region.advance(engine, torch.zeros(()))
            optimizer.step()
            engine.clear()
        peak = tracker.get_tracker_snapshot("peak")
    found = {
        str(k): v
        for device, parts in peak.items()
        if str(device) == "cpu"
        for k, v in parts.items()
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
