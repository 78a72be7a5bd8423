"""Engines are found by name: `engine: zero` is tram_ds.engines.zero.build, imported only when asked
for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tram_ds.engines.protocol import Engine, Schedule
from tram_ds.runtime.ranks import Job


@dataclass(frozen=True)
class Settings:
    """What every engine's `build` gets. optimizer: model -> torch optimizer over it. config: the
    engine's config file."""

    job: Job
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    config: dict[str, Any]
    dtype: torch.dtype
    micro_batch: int
    accumulation: int
    clip_norm: float | None = None
    schedule: Schedule | None = None


def choose(name: str, job: Job) -> str:
    """`auto` resolved: zero under the deepspeed launcher, fsdp2 for several GPUs, replicated
    otherwise."""
    if name != "auto":
        return name
    if job.launcher == "deepspeed":
        return "zero"
    return "fsdp2" if job.world_size > 1 and job.device.type == "cuda" else "replicated"


def build(name: str, model: nn.Module, settings: Settings) -> Engine:
    """The engine `name` around `model` (fp32, on CPU). Collective."""
    return importlib.import_module(f"tram_ds.engines.{name}").build(model, settings)
