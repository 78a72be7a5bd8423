"""The page's scripts under accelerate's FSDP2 plugin, on every rank of a job, beside the plain loop
over fully_shard: rank 0 says how far apart they are, and what a lost file of one rank does."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.integrations import plain
from tests.integrations.ddp_worker import EXAMPLES, of_accelerate, of_trainer, ran
from tests.wrap.hand import batches, forward, mlp, sgd
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations import causal_lm, saved
from tram_ds.integrations.own_loss import refuse_other_loss
from tram_ds.integrations.same_run import made

HALF = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)


def main(out: str, folder: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    shard_on_cpu()
    found = {
        "accelerate": of_loop(f"{folder}/accelerate"),
        "Trainer, sharded files": of_arguments(f"{folder}/shards", "SHARDED_STATE_DICT"),
        "Trainer, whole files": of_arguments(f"{folder}/whole", "FULL_STATE_DICT"),
        "Trainer, bf16": of_arguments(
            f"{folder}/half", "SHARDED_STATE_DICT", use_cpu=True, bf16=True
        ),
        "Trainer, recomputed": of_arguments(
            f"{folder}/recomputed", "FULL_STATE_DICT", gradient_checkpointing=True
        ),
    }
    found["damaged"] = of_damage(Path(folder) / "damaged")
    found["another loss"] = said(of_another_loss)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def of_arguments(folder: str, kind: str, **more: Any) -> dict[str, Any]:
    """hf_trainer.py with a user's lines for FSDP2."""
    more |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind}}
    script, told = EXAMPLES / "hf_trainer.py", transformers.TrainingArguments
    parallel = functools.partial(sharded, policy=HALF) if "bf16" in more else sharded
    with mock.patch.object(transformers, "TrainingArguments", functools.partial(told, **more)):
        found = of_trainer(script, folder, parallel)
        return found | of_files(script, f"{folder}/checkpoint-2")


def of_loop(folder: str) -> dict[str, Any]:
    """accelerate_loop.py with the plugin that `accelerate config` would make."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    script, bare = EXAMPLES / "accelerate_loop.py", accelerate.Accelerator
    with mock.patch.object(accelerate, "Accelerator", functools.partial(bare, fsdp_plugin=plugin)):
        found = of_accelerate(script, folder, sharded)
        return found | of_files(script, folder)


def of_files(script: Path, checkpoint: str) -> dict[str, Any]:
    """Which files hold the references, and what each rank says where rank 1 has lost its own."""
    files = sorted(path.name for path in Path(checkpoint).glob("tram*"))
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(checkpoint) / files[1]).unlink()
    dist.barrier()
    return {"files": files, "lost": said(lambda: ran(script, f"{checkpoint}-lost", checkpoint))}


def of_damage(folder: Path) -> dict[str, Any]:
    """What each rank says where the file of rank 1 is another."""
    model = fully_shard(mlp())
    optimizer = sgd(model)
    stepper, kept = wrap(model, optimizer, "tram_prev"), made(optimizer)
    mine = saved.place(stepper.engine, folder)
    files = []
    for _ in range(2):
        stepper.step(batches(1), forward)
        saved.save(stepper, folder, kept)
        files.append(mine.read_bytes())
    then, now = files
    pieces = load_file(mine)
    damage: dict[str, bytes] = {
        "by something else": save(pieces),
        "of nothing": save(pieces, {"tram": "{}"}),
        "cut": now[:-8],
        "of the step before": then,
        "whole": now,
    }
    found = {}
    for name, spoiled in damage.items():
        if dist.get_rank() == 1:
            mine.write_bytes(spoiled)
        found[name] = said(lambda: saved.load(stepper, folder, kept))
    return found


def of_another_loss() -> None:
    """Rank 1's model adds something to the loss of its labels."""
    model, rows = plain.made()
    if dist.get_rank() == 1:
        model.loss_function = lambda logits, labels, **_: logits.square().mean()  # type: ignore
    ids = torch.stack([row["input_ids"] for row in rows[:2]])
    batch = {"input_ids": ids, "labels": ids}
    refuse_other_loss(causal_lm, model, batch, dist.get_world_size())


def said(action: Callable[[], Any]) -> list[str]:
    """What each rank is refused with."""
    mine = ""
    try:
        action()
    except ValueError as error:
        mine = str(error)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def shard_on_cpu() -> None:
    """accelerate shards on devices alone: what it sets there, on the CPU."""
    begin = AcceleratorState.__init__

    def init(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            kind = DistributedType.FSDP
            self.distributed_type = PartialState._shared_state["distributed_type"] = kind
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def sharded(model: Any, policy: MixedPrecisionPolicy | None = None) -> torch.nn.Module:
    policy = policy or MixedPrecisionPolicy()
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


if __name__ == "__main__":
    main(*sys.argv[1:])
