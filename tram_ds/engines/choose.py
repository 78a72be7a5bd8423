"""Engines are found by name (`engine: zero` is tram_ds.engines.zero.build, imported only when asked
for), or by what a user has wrapped already."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from tram_ds.engines import replicas
from tram_ds.engines.filling import Fill
from tram_ds.engines.protocol import Engine
from tram_ds.engines.schedule import Schedule
from tram_ds.runtime.ranks import Job


@dataclass(frozen=True)
class Settings:
    """What every engine's `build` gets. optimizer: model -> torch optimizer over it. config: the
    engine's config file. fill: reads the values of parameters on meta; None: none are there.
    one_backward: no loss has a gradient through two forward passes, so that an engine may take each
    block as one."""

    job: Job
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    config: dict[str, Any]
    dtype: torch.dtype
    micro_batch: int
    accumulation: int
    clip_norm: float | None = None
    schedule: Schedule | None = None
    fill: Fill | None = None
    one_backward: bool = False


def choose(name: str, job: Job) -> str:
    """`auto` resolved: zero under the deepspeed launcher, fsdp2 for several GPUs, replicated
    otherwise."""
    if name != "auto":
        return name
    if job.launcher == "deepspeed":
        return "zero"
    return "fsdp2" if job.world_size > 1 and job.device.type == "cuda" else "replicated"


def build(name: str, model: nn.Module, settings: Settings) -> Engine:
    """The engine `name` around `model` (fp32, on CPU, or on meta for `settings.fill`).
    Collective."""
    return importlib.import_module(f"tram_ds.engines.{name}").build(model, settings)


def over(model: Any, optimizer: Any, clip_norm: float | None, schedule: Schedule | None) -> Engine:
    """The engine around what a user hands to wrap(), seen through torch.compile. Collective.

    ValueError names what cannot be trained right, and the way out.
    """
    inner = replicas.uncompiled(model)
    # by the module's name: importing deepspeed to ask takes seconds, and it may not be there
    if any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(inner).__mro__):
        from tram_ds.engines import zero

        if optimizer is not None and optimizer is not inner.optimizer:
            _refuse_second_optimizer(inner, optimizer)
        return zero.over(inner, clip_norm=clip_norm, schedule=schedule)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"cannot wrap a {type(model).__name__}: pass a DeepSpeed engine or an nn.Module"
        )
    # not `inner`: DDP or FSDP2 may stand inside or outside what torch.compile wraps
    parts = list(model.modules())
    if any(isinstance(m, FullyShardedDataParallel) for m in parts):
        raise ValueError(
            "FSDP1 (FullyShardedDataParallel) cannot run two backward passes a step: use "
            "fully_shard (FSDP2)"
        )
    if optimizer is None:
        raise ValueError(
            f"wrapping a {type(model).__name__} needs optimizer=<a torch optimizer over its "
            "parameters>"
        )
    if any(isinstance(m, FSDPModule) for m in parts):
        from tram_ds.engines import fsdp2

        return fsdp2.over(model, optimizer, clip_norm=clip_norm, schedule=schedule)
    from tram_ds.engines import replicated

    return replicated.over(model, optimizer, clip_norm=clip_norm, schedule=schedule)


def _refuse_second_optimizer(engine: Any, optimizer: Any) -> None:
    # the bare torch optimizer inside DeepSpeed's wrapper is the one that it was built with
    if optimizer is not getattr(engine.optimizer, "optimizer", None):
        raise ValueError(
            "a DeepSpeed engine brings its own optimizer, and another one was given: leave "
            "optimizer= out, or pass it to deepspeed.initialize"
        )
