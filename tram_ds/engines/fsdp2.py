"""Engine for FSDP2: `fully_shard`ed modules, one mesh, fp32 sharded parameters, fp32 or bf16
working copy, CPU offload.

Collectives: `backward` gathers parameters and reduce-scatters gradients (per module, FSDP2's own)
and all-reduces four sums; `norm` all-reduces one scalar over the SHARD group (under 2-D hybrid
sharding the replicas hold the same elements); `data_sum` all-reduces over the job. `moved` writes
local shards and needs none.

Three facts of FSDP2 shape this file. Parameters are captured once: after a no-grad forward
`parameters()` may yield unsharded tensors. The root stays gathered after a no-grad forward, so
every module is resharded before its shards change, or the next forward would read stale weights.
Only in-place writes reach the all-gather.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from tram_ds.engines import protocol as base
from tram_ds.engines.shards import Lazy, Shards, Span


class FSDP2:
    """masters: the sharded fp32 parameters. They are the working copy too, so `moved` overwrites
    and puts them back."""

    displaced, undivided = False, False

    def __init__(
        self,
        model: FSDPModule,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        schedule: base.Schedule | None = None,
    ):
        assert isinstance(model, nn.Module)
        self.model: Any = model
        self.module: nn.Module = model
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in self._units:
            unit.reshard()
        base.refuse_half_precision(model)
        names = base.parameter_names(model)
        self.parameters = [_dtensor(p, names[p]) for p in names]
        self.mesh: DeviceMesh = self.parameters[0].device_mesh
        self.shard_group = self.mesh.get_group(mesh_dim=self.mesh.ndim - 1)
        self.layout = tuple(_span(names[p], p) for p in names)
        self.optimizer, self.clip_norm, self.schedule = optimizer, clip_norm, schedule
        _refuse_stale_optimizer(optimizer, self.parameters)
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if _on_gpu(self.mesh)
            else torch.device("cpu")
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.replicas = self.world_size // self.mesh.size(self.mesh.ndim - 1)
        self.owns = self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0
        self.dtype = _working_dtype(self._units)
        self.steps = base.optimizer_steps(optimizer)
        self.targets = torch.ones((), dtype=torch.float64, device=self.device)
        self._theta: Shards | None = None

    def _live(self) -> Shards:
        return Shards((_local(p).detach().view(-1) for p in self.parameters), self.layout)

    def params(self, keep: bool = False) -> Shards:
        """A snapshot, taken once a step: `moved` overwrites the masters."""
        if self._theta is None:
            self._theta = self._live().clone()
        return self._theta

    def raw_gradient(self) -> Shards:
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return Shards(
            (_local(p.grad).detach().view(-1) for p in self.parameters if p.grad is not None),
            self.layout,
        )

    def grads(self) -> Lazy:
        return base.mean_gradient(self)

    def put_gradient(self, g: Shards | Lazy) -> None:
        self.raw_gradient().copy_(g)
        self.targets = torch.ones_like(self.targets)

    def working(self) -> Lazy:
        return Lazy(lambda x: x.rounded(self.dtype), self._live())

    def norm(self, x: Shards | Lazy) -> Tensor:
        total = x.square_sum(self.device).to(self.device)
        dist.all_reduce(total, group=self.shard_group)
        return total.sqrt()

    def data_sum(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    def _write(self, values: Shards | Lazy) -> None:
        for unit in self._units:
            unit.reshard()
        self._live().copy_(values)

    @contextmanager
    def moved(self, to: Shards | Lazy, until_descent: bool = False) -> Iterator[None]:
        theta, self.displaced = self.params(), True
        self._write(to)
        del to  # it may hold the gradient it was computed from
        try:
            yield
        finally:
            self._write(theta)
            self.displaced = False

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # MixedPrecisionPolicy casts at the all-gather

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward_one(self, loss: Tensor, last: bool) -> None:
        # Every micro-batch is reduce-scattered: waiting for the last would hold a full unsharded
        # fp32 gradient per rank.
        loss.backward()

    def backward(
        self,
        batches: Sequence[Any],
        objective: base.Objective,
        weighted: base.Weighted | None = None,
        alone: bool = False,
    ) -> base.Means:
        assert not alone, "a sharded engine has no gradient of one rank"
        return base.run_pass(self, batches, objective, weighted)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def descend(self, finite: Tensor, grad_norm: Tensor) -> base.StepInfo:
        for unit in self._units:
            unit.reshard()
        info = base.take_step(self, finite, grad_norm)
        self._theta = None
        return info

    def moments(self) -> dict[str, Shards]:
        found = base.named_moments(self.optimizer, self.parameters)
        return {
            key: Shards((_local(t).view(-1) for t in tensors), self.layout)
            for key, tensors in found.items()
        }

    def load(self, params: Shards, moments: dict[str, Shards], steps: int) -> None:
        self._theta, self.steps = None, steps
        self._write(params)
        base.load_moments(self.optimizer, self.parameters, moments, steps)


def shard(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    offload: bool = False,
    shard_size: int | None = None,
    device_type: str = "cpu",
) -> FSDPModule:
    """fully_shard over the whole job: every transformer block a unit, the rest in the root.
    Collective.

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
    hybrid = shard_size is not None and shard_size < world
    mesh = (
        init_device_mesh(
            device_type, (world // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
        )
        if hybrid and shard_size
        else init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    )
    policy = (
        MixedPrecisionPolicy()
        if dtype == torch.float32
        else MixedPrecisionPolicy(dtype, torch.float32)
    )
    pinned = device_type == "cuda"  # pinning needs an accelerator
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    for block in transformer_blocks(model):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    # The root is resharded explicitly: FSDP2's default leaves it gathered, and stale after the
    # weights move.
    return fully_shard(model, reshard_after_forward=True, **options)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face model: the members of its longest ModuleList of one
    class."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and len({type(b) for b in m}) == 1
    ]
    return list(max(lists, key=len, default=[]))


def _local(t: Tensor) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def _on_gpu(mesh: DeviceMesh) -> bool:
    return mesh.device_type == "cuda"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _dtensor(p: nn.Parameter, name: str) -> DTensor:
    if not isinstance(p, DTensor):
        raise ValueError(
            f"parameter {name} is not sharded: fully_shard the root module too, without "
            "ignored_params"
        )
    return p


def _span(name: str, p: nn.Parameter) -> Span:
    """FSDP2 shards dimension 0 into equal chunks, the last ones short or empty: contiguous in the
    flattened parameter."""
    assert isinstance(p, DTensor)
    placement = p.placements[-1]
    if not (isinstance(placement, Shard) and placement.dim == 0):
        raise ValueError(
            f"parameter {name} is placed {p.placements}: only sharding of dimension 0 is supported"
        )
    rows, per_row = p.shape[0] if p.dim() else 1, p.numel() // max(p.shape[0] if p.dim() else 1, 1)
    mesh = p.device_mesh
    chunk = -(-rows // mesh.size(mesh.ndim - 1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * chunk, rows)
    return Span(name, start * per_row, _local(p).numel(), tuple(p.shape))


def _working_dtype(units: Sequence[FSDPModule]) -> torch.dtype:
    return units[0]._get_fsdp_state()._mp_policy.param_dtype or torch.float32


def _refuse_stale_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """An optimizer made before fully_shard holds parameters that no longer exist, and would train
    nothing."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not {id(p) for p in parameters} <= held:
        raise ValueError(
            "the optimizer does not hold the sharded parameters: build it after fully_shard, over "
            "all of them"
        )


def build(model: nn.Module, settings: Any) -> FSDP2:
    """See tram_ds.engines.build: shards block by block from the CPU, so a GPU never holds the whole
    model."""
    sharded = shard(
        model, dtype=settings.dtype, device_type=settings.job.device.type, **settings.config
    )
    assert isinstance(sharded, nn.Module)
    optimizer = settings.optimizer(sharded)
    return FSDP2(sharded, optimizer, clip_norm=settings.clip_norm, schedule=settings.schedule)
