"""The engines under test, as their users build them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.parity import problem
from tram_ds.algorithms.bound import algorithm as build_algorithm
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.engines.fsdp2_units import shard
from tram_ds.engines.protocol import Engine
from tram_ds.engines.replicated import Replicated

CPU = torch.device("cpu")
MATRIX = ("single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
ADAPTED = ("single", "ddp", "fsdp2", "zero2", "zero3")  # also with adapters
VARIANTS = (
    "fsdp2_offload",
    "zero1_offload",
    "zero2_offload",
    "zero3_offload",
    "zero3_param_offload",
    "zero3_persistent",
)


def stepper(
    engine: str,
    model: nn.Module,
    algorithm: str,
    micros: int,
    *,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype = torch.float32,
    clip_norm: float | None = None,
    device: torch.device = CPU,
    **options: Any,
) -> Stepper:
    """`engine` is a member of MATRIX or VARIANTS, or fsdp2_hybrid (4 ranks), or fsdp2_untied, whose
    model has an output head of its own. device: where the model, which is on the CPU, goes as each
    engine's users put it there."""
    optimizer = optimizer or problem.optimizer(algorithm)
    if engine in ("single", "ddp"):
        model.to(device)
    if engine.startswith("zero"):
        wrapped = deepspeed_engine(engine, model, micros, optimizer, dtype)
        return wrap(wrapped, algorithm=algorithm, seed=problem.SEED, clip_norm=clip_norm, **options)
    if engine == "single" and dist.is_initialized():
        # every rank a model of its own, beside an engine under test: wrap() refuses that
        alone = Engine(Replicated(model, optimizer(model.parameters())), clip_norm=clip_norm)
        return Stepper(alone, build_algorithm(algorithm, **options), problem.SEED)
    if engine == "ddp":
        model = DistributedDataParallel(
            model,
            device_ids=None if device == CPU else [device.index],
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    elif engine.startswith("fsdp2"):
        model = shard(
            model,
            dtype=dtype,
            offload="offload" in engine,
            shard_size=2 if "hybrid" in engine else None,
            device_type=device.type,
        )
    return wrap(
        model,
        optimizer(model.parameters()),
        algorithm,
        seed=problem.SEED,
        clip_norm=clip_norm,
        **options,
    )


def deepspeed_engine(
    engine: str, model: nn.Module, micros: int, optimizer: Any, dtype: torch.dtype
) -> Any:
    import deepspeed

    zero: dict[str, Any] = {"stage": int(engine[4])}
    if "offload" in engine:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "param_offload" in engine:
        zero["offload_param"] = {"device": "cpu"}
    # every parameter partitioned, or every one also kept gathered ("persistent")
    if engine[4] == "3":
        zero["stage3_param_persistence_threshold"] = 10**6 if "persistent" in engine else 50
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micros,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
    }
    return deepspeed.initialize(
        model=model, optimizer=optimizer(model.parameters()), config=config
    )[0]


def start(engine: str) -> tuple[int, int]:
    """Joins the process group; (rank, world size)."""
    torch.set_num_threads(1)
    if engine == "single":
        return 0, 1
    if engine.startswith("zero"):
        import logging

        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def stop(built: Stepper) -> None:
    """Frees a DeepSpeed engine's hooks and buffers before the next is built."""
    if hasattr(built.engine.model, "destroy"):
        built.engine.model.destroy()


def gather(value: float) -> float:
    """The largest value over ranks."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box)


def leave() -> None:
    """Ends a worker at once: threads of DeepSpeed's and gloo's can abort the interpreter's own way
    out, after all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
