"""Engine for FSDP2: `fully_shard`ed modules, one mesh, fp32 sharded parameters, fp32 or bf16
working copy, CPU offload.

Collectives: a pass gathers parameters and reduce-scatters gradients (per module, FSDP2's own);
norms are summed over the SHARD group (under 2-D hybrid sharding the replicas hold the same
elements). Writing local shards needs none.

Three facts of FSDP2 shape this file. Parameters are captured once: after a no-grad forward
`parameters()` may yield unsharded tensors. The root stays gathered after a no-grad forward, so
every module is resharded before its shards change, or the next forward would read stale weights.
Only in-place writes reach the all-gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from tram_ds.engines import filling, layout, optimizer_refusals, replicas
from tram_ds.engines.filling import Fill
from tram_ds.engines.fsdp2_units import shard
from tram_ds.engines.optimizer_state import Extras
from tram_ds.engines.protocol import Engine
from tram_ds.engines.schedule import Schedule
from tram_ds.engines.shards import Lazy, Shards, Span
from tram_ds.engines.torch_weights import TorchWeights, local

# state that NAdam and ASGD keep as one number for every parameter: Extras has a place for these
NUMBERS = ("mu_product", "eta", "mu")


class FSDP2:
    """masters: the sharded fp32 parameters. They are the working copy too, so a move overwrites
    and puts them back."""

    whole_gradients, separate, group = False, False, None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reduce_every_micro_batch: bool = True,
    ):
        self.model: Any = model
        self._every = reduce_every_micro_batch
        self.module: nn.Module = replicas.unwrapped(model)
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        # a forward pass before wrap() may have left whole tensors in place of the shards
        self._reshard()
        names = layout.parameter_names(self.module)
        layout.refuse_parameters(names)
        optimizer_refusals.refuse_optimizer(optimizer, sharded=True, allowed=NUMBERS)
        self.optimizer = optimizer
        kinds = layout.kinds_of(self.module)
        spans = tuple(
            replace(_span(name, p), kind=kinds.get(name, "")) for p, name in names.items()
        )
        # flat views of FSDP2's own memory, which is what an all-gather reads
        self.torch = TorchWeights(optimizer, names, spans, lambda t: local(t).view(-1))
        layout.refuse_optimizer_of_others(self.torch.held(), names)
        self._signature, self._state_seen = layout.signature(self.module, optimizer), False
        self.mesh: DeviceMesh = _dtensor(next(iter(names)), "").device_mesh
        # of a 2-D mesh the last dimension shards, the first replicates
        self.shard_group = self.mesh.get_group(mesh_dim=self.mesh.ndim - 1)
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if _on_gpu(self.mesh)
            else torch.device("cpu")
        )
        self._offloaded = self.device.type == "cuda" and local(next(iter(names))).device != (
            self.device
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.replicas = self.world_size // self.mesh.size(self.mesh.ndim - 1)
        self.writes = self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0
        self.dtype = _working_dtype(self._units)
        if self.mesh.ndim > 1:
            # over the replicas alone: ranks of one shard group hold different pieces
            replicas.refuse_unlike(self.masters(), self.mesh.get_group(0), self.device)

    def _reshard(self) -> None:
        # each by itself: FSDP2's reshard() does not go down into other units
        for unit in self._units:
            unit.reshard()

    def follow(self) -> bool:
        self._reshard()  # or a forward pass outside the step left unsharded tensors
        if layout.signature(self.module, self.optimizer) != self._signature:
            raise ValueError(
                "the trainable parameters, or those of the optimizer, changed after fully_shard, "
                "which has fixed what it gathers and reduces: freeze, unfreeze or replace before "
                "fully_shard and wrap()"
            )
        return False

    def masters(self) -> Shards:
        return self.torch.masters()

    def gradient(self) -> Shards:
        return self.torch.gradient()

    def working(self) -> Lazy:
        # computed, not read: the gathered cast is gone when a module is resharded
        return Lazy(lambda x: x.rounded(self.dtype), self.masters())

    def put(self, gradient: Shards | Lazy) -> None:
        self.torch.put(gradient)

    def write(self, values: Shards | Lazy) -> None:
        self._reshard()
        if self._offloaded:
            # An all-gather copies the pinned shards to the GPU without waiting: they must not be
            # overwritten before it has, and after a forward pass without a gradient nobody waits.
            torch.cuda.current_stream(self.device).synchronize()
        self.masters().copy_(values)

    def restore(self, theta: Shards) -> None:
        self.write(theta)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # MixedPrecisionPolicy casts at the all-gather

    def clear(self) -> None:
        self.torch.clear()
        if not self._every:
            # of a pass that raised before its last micro-batch
            # FSDP2 adds a micro-batch's to what it holds unreduced, and neither zero_grad() nor its
            # reset_iter_state() (torch 2.13) drops that
            for p in (p for unit in self._units for p in _unit_parameters(unit)):
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):  # only once it has been gathered
                    p._unsharded_param.grad = None

    def ahead(self, last: bool, local_only: bool) -> None:
        if not self._every:
            for unit in self._units:
                # read in FSDP2's post-backward; _units has every unit, so none need recurse
                unit.set_requires_gradient_sync(last, recurse=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    # The optimizer holds the shards; a module left gathered would keep the weights of before.
    def step(self) -> None:
        self._reshard()
        self.torch.step()
        if not self._state_seen:
            optimizer_refusals.refuse_state(self.optimizer, list(self.torch.names), NUMBERS)
            self._state_seen = True

    def moments(self) -> dict[str, Shards]:
        return self.torch.moments()

    def extras(self, steps: int) -> Extras:
        return self.torch.extras(steps)

    def load(self, params: Shards, moments: dict[str, Shards], steps: int, extras: Extras) -> None:
        self.write(params)
        self.torch.load(params, moments, steps, extras)

    def frozen(self) -> Shards:
        # or a parameter left gathered would be whole on every rank, and be written by each
        self._reshard()
        return layout.frozen(
            self.module,
            lambda name, p: (
                (_span(name, p), local(p.detach()).view(-1)) if isinstance(p, DTensor) else None
            ),
            self.rank,
        )


def over(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
    reduce_every_micro_batch: bool = True,
) -> Engine:
    """An engine over a fully_shard'ed model. Collective.

    reduce_every_micro_batch: False reduce-scatters a pass's gradient once, after its last
    micro-batch, and until then every rank holds it unsharded, in fp32.
    """
    weights = FSDP2(model, optimizer, reduce_every_micro_batch)
    return Engine(weights, clip_norm=clip_norm, schedule=schedule)


def _on_gpu(mesh: DeviceMesh) -> bool:
    return mesh.device_type == "cuda"


def _dtensor(p: nn.Parameter, name: str) -> DTensor:
    if not isinstance(p, DTensor):
        raise ValueError(
            f"parameter {name} is not sharded: fully_shard the root module too, without "
            "ignored_params"
        )
    return p


def _span(name: str, parameter: nn.Parameter) -> Span:
    """FSDP2 shards dimension 0 into equal chunks, the last ones short or empty: contiguous in the
    flattened parameter."""
    p = _dtensor(parameter, name)
    *outer, placement = p.placements
    whole = all(isinstance(x, Replicate) for x in outer)  # else another parallelism is beside it
    if not (whole and isinstance(placement, Shard) and placement.dim == 0):
        raise ValueError(
            f"parameter {name} is placed {p.placements}: only sharding of dimension 0 is supported"
        )
    # p.shape of a DTensor is the whole parameter's, the same on every rank
    rows, per_row = p.shape[0] if p.dim() else 1, p.numel() // max(p.shape[0] if p.dim() else 1, 1)
    mesh = p.device_mesh
    chunk = -(-rows // mesh.size(mesh.ndim - 1))
    # torch.chunk's rule, which FSDP2 cuts by: a rank past the end has an empty piece at it
    start = min(mesh.get_local_rank(mesh.ndim - 1) * chunk, rows)
    return Span(name, start * per_row, local(p).numel(), tuple(p.shape))


def _working_dtype(units: Sequence[FSDPModule]) -> torch.dtype:
    return units[0]._get_fsdp_state()._mp_policy.param_dtype or torch.float32


def _unit_parameters(unit: FSDPModule) -> list[Any]:
    return [p for group in unit._get_fsdp_state()._fsdp_param_groups for p in group.fsdp_params]


def _fill(model: nn.Module, fill: Fill, device: torch.device | str) -> None:
    """This rank's shards of what was on meta: read, and nothing else of it."""
    # Buffers were never on meta. FSDP2 looks for new parameters at its first forward.
    names = filling.materialise(model, lambda p: torch.empty_like(p, device=device))
    for name in names:
        p = model.get_parameter(name)
        with torch.no_grad():
            fill(name, _span(name, p).start, local(p).view(-1))


def build(model: nn.Module, settings: Any) -> Engine:
    """See tram_ds.engines.build: shards block by block from the CPU, so a GPU never holds the whole
    model; from meta where `settings.fill` reads the values, so that the host never does."""
    # reduce_every_micro_batch is ours, and no keyword of shard()
    config = dict(settings.config)
    every = config.pop("reduce_every_micro_batch", True)
    sharded = shard(model, dtype=settings.dtype, device_type=settings.job.device.type, **config)
    assert isinstance(sharded, nn.Module)
    if settings.fill is not None:
        # offloaded shards are the CPU's; FSDP2 pins what it finds there in its first forward
        device = "cpu" if settings.config.get("offload") else settings.job.device
        _fill(sharded, settings.fill, device)
    # last: fully_shard and _fill each put other Parameters in the place of those before
    optimizer = settings.optimizer(sharded)
    return over(
        sharded,
        optimizer,
        clip_norm=settings.clip_norm,
        schedule=settings.schedule,
        reduce_every_micro_batch=every,
    )
