"""What fully_shard makes of a transformer: its units, their mesh and their precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from tram_ds.engines import layout


def shard(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    offload: bool = False,
    shard_size: int | None = None,
    device_type: str = "cpu",
) -> FSDPModule:
    """fully_shard over the whole job: every transformer block a unit, and so the embedding and the
    output head where they are not tied; the rest in the root. Collective.

    dtype: of the working copy; gradients are reduced in fp32. offload: masters, gradients and
    moments live on the CPU.
    shard_size: ranks per shard group (2-D hybrid sharding: replicated across groups); None shards
    over all ranks. ValueError where shard_size does not divide the number of ranks.
    """
    world = dist.get_world_size()
    if shard_size is not None and world % shard_size:
        raise ValueError(
            f"engine config shard_size={shard_size} does not divide {world} ranks: choose one of "
            f"{_divisors(world)}"
        )
    # fp32 named in a policy would cast what is float64, and every input, to it
    half = dtype != torch.float32
    pinned = device_type == "cuda"  # pinning needs an accelerator
    options: dict[str, Any] = {
        "mesh": _mesh(device_type, world, shard_size or world),
        # reduced in fp32: in bf16 every rank's addition would round the gradient once more
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32) if half else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    # inner units before the root: fully_shard leaves out what another unit has already
    for part in [*layout.transformer_blocks(model), *layout.vocabulary_units(model)]:
        fully_shard(part, reshard_after_forward=reshard_after_forward, **options)
    # The root is resharded explicitly: FSDP2's default leaves it gathered, and stale after the
    # weights move.
    return fully_shard(model, reshard_after_forward=True, **options)


def _mesh(device_type: str, world: int, shard_size: int) -> DeviceMesh:
    """2-D only where there is something to replicate."""
    if shard_size == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    # in this order: of a 2-D mesh fully_shard replicates over dimension 0, shards over 1
    names = ("replicate", "shard")
    return init_device_mesh(device_type, (world // shard_size, shard_size), mesh_dim_names=names)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
