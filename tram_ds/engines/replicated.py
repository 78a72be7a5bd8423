"""Engine for replicated weights: one process, or DistributedDataParallel. Every rank owns every
parameter whole.

Collectives: `backward` all-reduces the gradient over the job on its last micro-batch (DDP) and the
four sums; `data_sum` all-reduces its argument; `norm`, `moved` and `descend` need none, because
weights and reduced gradients are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tram_ds.engines import protocol as base
from tram_ds.engines.shards import Lazy, Shards, Span


class Replicated:
    """masters: the model's own fp32 parameters; with dtype bfloat16 the working copy is autocast's
    cast of them."""

    displaced, undivided = False, True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        clip_norm: float | None = None,
        schedule: base.Schedule | None = None,
    ):
        self.model: Any = model
        self.module: nn.Module = (
            model.module if isinstance(model, DistributedDataParallel) else model
        )
        base.refuse_half_precision(self.module)
        names = base.parameter_names(self.module)
        self.parameters = list(names)
        self.layout = tuple(Span(names[p], 0, p.numel(), tuple(p.shape)) for p in self.parameters)
        self.optimizer, self.dtype, self.clip_norm, self.schedule = (
            optimizer,
            dtype,
            clip_norm,
            schedule,
        )
        self.device = self.parameters[0].device
        distributed = isinstance(model, DistributedDataParallel)
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        )
        self.shard_group, self.owns, self.replicas = None, self.rank == 0, self.world_size
        self.steps = base.optimizer_steps(optimizer)
        self.targets = torch.ones((), dtype=torch.float64, device=self.device)
        self._theta: Shards | None = None

    def _live(self) -> Shards:
        return Shards((p.detach() for p in self.parameters), self.layout)

    def params(self, keep: bool = False) -> Shards:
        """A snapshot: the masters are also the working copy, which `moved` overwrites. Taken once a
        step."""
        if self._theta is None:
            self._theta = self._live().clone()
        return self._theta

    def raw_gradient(self) -> Shards:
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return Shards((p.grad.detach() for p in self.parameters if p.grad is not None), self.layout)

    def grads(self) -> Lazy:
        return base.mean_gradient(self)

    def put_gradient(self, g: Shards | Lazy) -> None:
        self.raw_gradient().copy_(g)
        self.targets = torch.ones_like(self.targets)

    def working(self) -> Lazy:
        return Lazy(lambda x: x.rounded(self.dtype), self._live())

    def norm(self, x: Shards | Lazy) -> Tensor:
        return x.square_sum(self.device).sqrt()

    def data_sum(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    @contextmanager
    def moved(self, to: Shards | Lazy, until_descent: bool = False) -> Iterator[None]:
        theta, self.displaced = self.params(), True
        self._live().copy_(to)
        del to  # it may hold the gradient it was computed from
        try:
            yield
        finally:
            self._live().copy_(theta)
            self.displaced = False

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward_one(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def backward(
        self,
        batches: Sequence[Any],
        objective: base.Objective,
        weighted: base.Weighted | None = None,
        alone: bool = False,
    ) -> base.Means:
        if self.world_size == 1:
            return base.run_pass(self, batches, objective, weighted, alone)

        # DDP reads the flag in forward, so it is set before it
        def synchronised(index: int, batch: Any) -> base.Terms:
            self.model.require_backward_grad_sync = not alone and index == len(batches) - 1
            return objective(index, batch)

        try:
            return base.run_pass(self, batches, synchronised, weighted, alone)
        finally:
            self.model.require_backward_grad_sync = True

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def descend(self, finite: Tensor, grad_norm: Tensor) -> base.StepInfo:
        info = base.take_step(self, finite, grad_norm)
        self._theta = None
        return info

    def moments(self) -> dict[str, Shards]:
        found = base.named_moments(self.optimizer, self.parameters)
        return {key: Shards(tensors, self.layout) for key, tensors in found.items()}

    def load(self, params: Shards, moments: dict[str, Shards], steps: int) -> None:
        self._theta, self.steps = None, steps
        self._live().copy_(params)
        base.load_moments(self.optimizer, self.parameters, moments, steps)


def build(model: nn.Module, settings: Any) -> Replicated:
    """See tram_ds.engines.build: DDP over the job's ranks, or the bare model in a single
    process."""
    job = settings.job
    model = model.to(job.device)
    wrapped: nn.Module = model
    if job.world_size > 1:
        ids = [job.device.index] if job.device.type == "cuda" else None
        # Buffers of a transformer never change; broadcasting them would rewrite tensors that a live
        # graph still needs.
        wrapped = DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    optimizer = settings.optimizer(model)
    return Replicated(
        wrapped,
        optimizer,
        dtype=settings.dtype,
        clip_norm=settings.clip_norm,
        schedule=settings.schedule,
    )
