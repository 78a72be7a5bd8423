"""Replicated weights: one process, or DistributedDataParallel. Every rank owns every parameter
whole.

Collectives: a pass all-reduces the gradient over the ranks on its last micro-batch (DDP) and its
sums; writing, restoring and stepping need none, because weights and reduced gradients are equal on
all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tram_ds.engines import filling, layout, optimizer_refusals, replicas
from tram_ds.engines.optimizer_state import Extras
from tram_ds.engines.protocol import Engine
from tram_ds.engines.schedule import Schedule
from tram_ds.engines.shards import Lazy, Shards, Span
from tram_ds.engines.torch_weights import TorchWeights

# Whether DDP sends rank 0's buffers before each forward; torch 2.13 warns of the older name.
BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class Replicated:
    """masters: the model's own fp32 parameters; with dtype bfloat16 the working copy is autocast's
    cast of them. ddp: the DistributedDataParallel parts of `model`, wherever they are."""

    whole_gradients, separate = True, False
    shard_group = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        ddp: Sequence[DistributedDataParallel] = (),
    ):
        self.model: Any = model
        self.module: nn.Module = replicas.unwrapped(model)
        self.optimizer, self.dtype, self.ddp = optimizer, dtype, ddp
        optimizer_refusals.refuse_optimizer(optimizer, sharded=False)
        self._adopt(())
        self._reduced = False  # whether the pass's gradient is one of all ranks
        self.device = next(iter(self.torch.names)).device
        self.group = ddp[0].process_group if ddp else None
        self.rank = dist.get_rank(self.group) if ddp else 0
        self.world_size = dist.get_world_size(self.group) if ddp else 1
        self.writes, self.replicas = self.rank == 0, self.world_size
        if ddp:
            replicas.refuse_unlike(self.masters(), self.group, self.device)

    def _adopt(self, known: Sequence[nn.Parameter]) -> None:
        """theta := the parameters that train now. known: those that did before."""
        names = layout.parameter_names(self.module)
        layout.refuse_parameters(names)
        layout.refuse_memory(names)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        layout.refuse_optimizer_of_others(held, names, known)
        kinds = layout.kinds_of(self.module)
        spans = tuple(
            Span(name, 0, p.numel(), tuple(p.shape), kinds.get(name, ""))
            for p, name in names.items()
        )
        self.torch = TorchWeights(self.optimizer, names, spans, lambda t: t)
        # all that ever trained: an optimizer that still holds a head since replaced is no mistake
        self._known = list({id(p): p for p in (*known, *names)}.values())
        self._signature = layout.signature(self.module, self.optimizer)

    def follow(self) -> bool:
        if layout.signature(self.module, self.optimizer) == self._signature:
            return False
        if self.ddp:
            raise ValueError(
                "the trainable parameters changed after DistributedDataParallel was built over "
                "them, which does not reduce the new ones: build it, and wrap(), anew"
            )
        self._adopt(self._known)
        self.device = next(iter(self.torch.names)).device  # it may have been moved as well
        return True

    def masters(self) -> Shards:
        return self.torch.masters()

    def working(self) -> Lazy:
        # computed: autocast's casts live no longer than a forward pass
        return Lazy(lambda x: x.rounded(self.dtype), self.masters())

    def gradient(self) -> Shards:
        found = self.torch.gradient()
        waits = any(not (m.find_unused_parameters or m.static_graph) for m in self.ddp)
        # a bucket with such a parameter is never reduced, and DDP says so only in its next forward,
        # when every rank has stepped by its own gradient
        if self.torch.absent and self._reduced and waits:
            first = next(n for p, n in self.torch.names.items() if p in self.torch.absent)
            raise ValueError(
                f"parameter {first} got no gradient ({len(self.torch.absent)} did not), and "
                "DistributedDataParallel waits for every one of them: build it with "
                "find_unused_parameters=True, or freeze what is not used"
            )
        return found

    def put(self, gradient: Shards | Lazy) -> None:
        self.torch.put(gradient)

    def write(self, values: Shards | Lazy) -> None:
        # in place: the optimizer and DDP hold these very tensors
        self.masters().copy_(values)

    def restore(self, theta: Shards) -> None:
        self.write(theta)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def clear(self) -> None:
        self.torch.clear()
        self._reduced = False
        # a forward pass of the caller's, outside the step, reduces as DDP does by itself
        for m in self.ddp:
            m.require_backward_grad_sync = True

    def ahead(self, last: bool, local_only: bool) -> None:
        self._reduced = last and not local_only
        for m in self.ddp:  # read in its forward
            m.require_backward_grad_sync = self._reduced

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.torch.step()

    def moments(self) -> dict[str, Shards]:
        return self.torch.moments()

    def extras(self, steps: int) -> Extras:
        return self.torch.extras(steps)

    def load(self, params: Shards, moments: dict[str, Shards], steps: int, extras: Extras) -> None:
        self.write(params)
        self.torch.load(params, moments, steps, extras)

    def frozen(self) -> Shards:
        return layout.frozen(self.module, lambda *_: None, self.rank)


def over(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    dtype: torch.dtype = torch.float32,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
) -> Engine:
    """An engine over a plain module of one process, or over DistributedDataParallel, which may be
    inside torch.compile, outside it, or a part of the module. Collective.

    ValueError for a plain module in a job of several ranks, and where ranks hold different weights.
    """
    weights = Replicated(model, optimizer, dtype=dtype, ddp=replicas.reducers(model))
    return Engine(weights, clip_norm=clip_norm, schedule=schedule)


def build(model: nn.Module, settings: Any) -> Engine:
    """See tram_ds.engines.build: DDP over the job's ranks, or the bare model in a single
    process."""
    job = settings.job
    if settings.fill is not None:
        # fp32 under bf16 too: these are the masters, and autocast casts them
        filling.fill_whole(model, settings.fill, job.device, torch.float32)
    model = model.to(job.device)
    wrapped: nn.Module = model
    if job.world_size > 1:
        # DDP refuses device_ids for a module on the CPU
        ids = [job.device.index] if job.device.type == "cuda" else None
        # Buffers of a transformer never change; broadcasting them would rewrite tensors that a live
        # graph still needs. Gradients as views of DDP's buckets: no second copy of them.
        options: dict[str, Any] = {BUFFERS: False, "gradient_as_bucket_view": True}
        wrapped = DistributedDataParallel(model, device_ids=ids, **options)
    ddp = [wrapped] if isinstance(wrapped, DistributedDataParallel) else []
    weights = Replicated(wrapped, settings.optimizer(model), dtype=settings.dtype, ddp=ddp)
    return Engine(weights, clip_norm=settings.clip_norm, schedule=settings.schedule)
