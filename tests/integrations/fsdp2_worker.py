"""The page's scripts under accelerate's FSDP2 plugin, on every rank of a job, beside the plain loop
over fully_shard: rank 0 says how far apart they are, and what a lost file of one rank does."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.integrations.ddp_worker import EXAMPLES, of_accelerate, of_trainer, ran

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
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def of_arguments(folder: str, kind: str, **more: Any) -> dict[str, Any]:
    """hf_trainer.py with a user's lines for FSDP2."""
    more |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind}}
    script, made = EXAMPLES / "hf_trainer.py", transformers.TrainingArguments
    parallel = functools.partial(sharded, policy=HALF) if "bf16" in more else sharded
    with mock.patch.object(transformers, "TrainingArguments", functools.partial(made, **more)):
        found = of_trainer(script, folder, parallel)
        return found | of_files(script, f"{folder}/checkpoint-2")


def of_loop(folder: str) -> dict[str, Any]:
    """accelerate_loop.py with the plugin that `accelerate config` would make."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    script, made = EXAMPLES / "accelerate_loop.py", accelerate.Accelerator
    with mock.patch.object(accelerate, "Accelerator", functools.partial(made, fsdp_plugin=plugin)):
        found = of_accelerate(script, folder, sharded)
        return found | of_files(script, folder)


def of_files(script: Path, checkpoint: str) -> dict[str, Any]:
    """Which files hold the references, and what each rank says where rank 1 has lost its own."""
    files = sorted(path.name for path in Path(checkpoint).glob("tram*"))
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(checkpoint) / files[1]).unlink()
    dist.barrier()
    said = ""
    try:
        ran(script, f"{checkpoint}-lost", checkpoint)
    except ValueError as error:
        said = str(error)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, said)
    return {"files": files, "lost": every}


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
