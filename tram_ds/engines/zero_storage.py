"""Where each DeepSpeed optimizer wrapper keeps masters, reduced gradients and working weights
(verified on DeepSpeed 0.19).

DeepSpeed has no public access to these shards that is local, cheap and the same for every stage:
the safe_get_* functions cost a collective per parameter or exist at stage 3 only. Everything
internal that the engine touches is therefore confined to the four storages below; each checks what
it relies on when it is built. This file does not import deepspeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Fragment(NamedTuple):
    """Elements [start, start + length) of `parameter` lie at [offset, offset + length) of this
    rank's tensor number `flat`."""

    parameter: nn.Parameter
    flat: int
    offset: int
    start: int
    length: int


class Storage(Protocol):
    """Flat tensors, one per DeepSpeed group or sub-group. `publish` and `restore` are collective,
    the rest is local."""

    # process group over which the masters are partitioned; None: replicated on every rank
    group: Any
    # masters and working copy are different memory: nothing needs to be saved before publish
    separate: bool

    def masters(self) -> list[Tensor]: ...
    def working(self) -> list[Tensor]:
        """This rank's part of the working copy, aligned with masters(); written in place by the
        caller of publish()."""
        ...

    def gradient(self) -> list[list[Tensor]]:
        """The reduced gradient in place: for each of masters() the pieces that laid end to end are
        aligned with it."""
        ...

    def fragments(self) -> list[Fragment]: ...
    def state_keys(self) -> list[Tensor]:
        """The tensors under which the base optimizer files its state."""
        ...

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        """One state tensor per key -> views aligned with masters()."""
        ...

    def clear(self) -> None: ...
    def publish(self) -> None:
        """Every rank's next forward pass reads what now stands in working()."""
        ...

    def restore(self) -> None:
        """Every rank's next forward pass reads the masters again, bit for bit what the last step
        published."""
        ...


def requires(owner: Any, *names: str) -> None:
    """Fails at build time, not in the middle of a step, where another DeepSpeed version moved what
    we rely on."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise ValueError(
            f"this DeepSpeed's {type(owner).__name__} lacks {', '.join(missing)}: tram_ds is "
            "verified with deepspeed 0.19"
        )


class Partitioned:
    """Stages 1 and 2 (DeepSpeedZeroOptimizer), any precision, with or without optimizer offload."""

    separate = True

    def __init__(self, optimizer: Any, all_gather: Callable[..., None]):
        requires(
            optimizer,
            "single_partition_of_fp32_groups",
            "averaged_gradients",
            "all_grad_tensors",
            "bit16_groups",
            "parallel_partitioned_bit16_groups",
            "real_dp_process_group",
            "update_lp_params",
            "cpu_offload",
            "_release_preflattened_grad_buffers",
            "micro_step_id",
            "bit16_groups_flat",
        )
        self.o, self.all_gather, self.group = optimizer, all_gather, optimizer.dp_process_group

    def masters(self) -> list[Tensor]:
        return [m.detach() for m in self.o.single_partition_of_fp32_groups]

    def working(self) -> list[Tensor]:
        groups = zip(
            self.o.parallel_partitioned_bit16_groups, self.o.real_dp_process_group, strict=True
        )
        return [parts[dist.get_rank(group)].detach() for parts, group in groups]

    def gradient(self) -> list[list[Tensor]]:
        if self.o.cpu_offload:
            self.o._wait_for_offload_copies()
            return [[m.grad] for m in self.o.single_partition_of_fp32_groups]
        return [self._pieces(i) for i in range(len(self.o.bit16_groups))]

    def _pieces(self, i: int) -> list[Tensor]:
        pieces = self.o.averaged_gradients[i]
        # bf16 parameters with fp32 accumulation keep one flat buffer
        flat = getattr(pieces, "flat_partition", None)
        return [flat] if flat is not None else list(pieces)

    def fragments(self) -> list[Fragment]:
        return _mapped(self.o.bit16_groups)

    def state_keys(self) -> list[Tensor]:
        return list(self.o.single_partition_of_fp32_groups)

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        return states

    def clear(self) -> None:
        """DeepSpeed's own overflow path plus the start of its step; the dict objects must stay,
        DeepSpeed holds them."""
        o = self.o
        o.micro_step_id = -1
        o.zero_grad(set_to_none=True)
        o._release_preflattened_grad_buffers()
        if o.cpu_offload:
            o.reset_cpu_buffers()
            o._offload_accumulated_param_ids = set()
        for k in list(o.averaged_gradients):
            o.averaged_gradients[k] = None
        for k in list(o.all_grad_tensors):
            o.all_grad_tensors[k] = None

    def publish(self) -> None:
        self.all_gather(
            groups_flat=self.o.bit16_groups_flat,
            partitioned_param_groups=self.o.parallel_partitioned_bit16_groups,
            dp_process_group=self.o.real_dp_process_group,
            start_alignment_factor=self.o.nccl_start_alignment_factor,
            allgather_bucket_size=self.o.allgather_bucket_size,
        )

    def restore(self) -> None:
        self.o.update_lp_params()


class Bf16Partitioned:
    """BF16_Optimizer: stage 1, bf16, fp32 gradient accumulation, no offload."""

    separate = True

    def __init__(self, optimizer: Any, all_gather: Callable[..., None]):
        requires(
            optimizer,
            "fp32_groups_flat_partition",
            "fp32_groups_gradient_flat_partition",
            "bf16_groups",
            "bf16_partitioned_groups",
            "real_dp_process_group",
            "update_lp_params",
        )
        self.o, self.all_gather, self.group = optimizer, all_gather, optimizer.dp_process_group

    def masters(self) -> list[Tensor]:
        return [m.detach() for m in self.o.fp32_groups_flat_partition]

    def working(self) -> list[Tensor]:
        groups = zip(self.o.bf16_partitioned_groups, self.o.real_dp_process_group, strict=True)
        return [parts[dist.get_rank(group)].detach() for parts, group in groups]

    def gradient(self) -> list[list[Tensor]]:
        return [[flat] for flat in self.o.fp32_groups_gradient_flat_partition]

    def fragments(self) -> list[Fragment]:
        return _mapped(self.o.bf16_groups)

    def state_keys(self) -> list[Tensor]:
        return list(self.o.fp32_groups_flat_partition)

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        return states

    def clear(self) -> None:
        self.o.zero_grad()

    def publish(self) -> None:
        self.all_gather(
            groups_flat=self.o.bf16_groups_flat,
            partitioned_param_groups=self.o.bf16_partitioned_groups,
            dp_process_group=self.o.real_dp_process_group,
            start_alignment_factor=self.o.nccl_start_alignment_factor,
            allgather_bucket_size=self.o.allgather_bucket_size,
        )

    def restore(self) -> None:
        self.o.update_lp_params()


class Stage3:
    """DeepSpeedZeroOptimizer_Stage3, with or without optimizer and parameter offload (to the
    CPU)."""

    def __init__(self, optimizer: Any):
        requires(
            optimizer,
            "fp32_partitioned_groups_flat",
            "fp16_partitioned_groups_flat",
            "fp16_groups",
            "groups_padding",
            "averaged_gradients",
            "persistent_parameters",
            "grad_partitions_flat_buffer",
            "offload_optimizer",
            "empty_partition_cache",
            "_get_param_partition_rank",
        )
        if any(flat is None for flat in optimizer.fp16_partitioned_groups_flat):
            raise ValueError(
                "parameters offloaded to NVMe cannot be perturbed: set offload_param.device to cpu"
            )
        self.o, self.group = optimizer, optimizer.dp_process_group
        pairs = zip(
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups_flat,
            strict=True,
        )
        self.separate = all(m.data_ptr() != w.data_ptr() for m, w in pairs)
        for tensors in (self.masters(), self.working()):
            self._zero_padding(tensors)

    def _zero_padding(self, tensors: Sequence[Tensor]) -> None:
        """The last rank's padding is uninitialised memory: one NaN there and every norm is NaN."""
        for group, (tensor, paddings) in enumerate(
            zip(tensors, self.o.groups_padding, strict=True)
        ):
            offset = 0
            for p, padding in zip(self.o.fp16_groups[group], paddings, strict=True):
                offset += p.partition_numel()
                if padding:
                    tensor[offset - padding : offset].zero_()

    def masters(self) -> list[Tensor]:
        return [m.detach() for m in self.o.fp32_partitioned_groups_flat]

    def working(self) -> list[Tensor]:
        return [w.detach() for w in self.o.fp16_partitioned_groups_flat]

    def gradient(self) -> list[list[Tensor]]:
        if self.o.offload_optimizer:
            return [[m.grad] for m in self.o.fp32_partitioned_groups_flat]
        for group, paddings in enumerate(self.o.groups_padding):
            for piece, padding in zip(self.o.averaged_gradients[group], paddings, strict=True):
                if padding:
                    piece.view(-1)[-padding:].zero_()
        return [list(self.o.averaged_gradients[group]) for group in range(len(self.o.fp16_groups))]

    def fragments(self) -> list[Fragment]:
        found = []
        for index, group in enumerate(self.o.fp16_groups):
            offset = 0
            for p in group:
                size = p.partition_numel()
                start = size * self.o._get_param_partition_rank(p)
                length = max(0, min(size, p.ds_numel - start))
                found.append(Fragment(p, index, offset, min(start, p.ds_numel), length))
                offset += size
        return found

    def state_keys(self) -> list[Tensor]:
        return list(self.o.fp32_partitioned_groups_flat)  # param_groups are empty but during a step

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        return states

    def clear(self) -> None:
        o = self.o
        o.micro_step_id = 0
        o.zero_grad(set_to_none=True)
        o._offload_boundary_param_ids = set()
        o._epilogue_ran_this_backward = False
        if o.offload_optimizer:
            o.reset_cpu_buffers()
            for m in o.fp32_partitioned_groups_flat:
                if m.grad is not None:
                    m.grad.zero_()
        else:
            o.averaged_gradients = {}
        # a parameter unused in the next pass would keep this pass's gradient
        o.grad_partitions_flat_buffer.zero_()

    def release(self) -> None:
        """Before the working copy changes: persistent and prefetched parameters are gathered
        copies, stale afterwards."""
        self.o.empty_partition_cache()

    def publish(self) -> None:
        persistent = self.o.persistent_parameters
        if len(persistent):
            persistent[0].all_gather(persistent)

    def restore(self) -> None:
        self.release()
        for w, m in zip(self.working(), self.masters(), strict=True):
            w.copy_(m)
        self.publish()


class Whole:
    """Stage 0: every rank holds everything. fp32: a plain torch optimizer; bf16: FP16_Optimizer or
    FP16_UnfusedOptimizer."""

    group = None

    def __init__(self, engine: Any, optimizer: Any):
        self.engine, self.o = engine, optimizer
        self.separate = hasattr(optimizer, "fp16_groups")
        if self.separate:
            self.pairs = [(m, p) for p, m in _half_and_master(optimizer)]
        else:
            self.pairs = [
                (p, p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad
            ]

    def masters(self) -> list[Tensor]:
        return [m.detach().view(-1) for m, _ in self.pairs]

    def working(self) -> list[Tensor]:
        return [p.detach().view(-1) for _, p in self.pairs]

    def gradient(self) -> list[list[Tensor]]:
        for _, p in self.pairs:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [[p.grad] for _, p in self.pairs if p.grad is not None]

    def fragments(self) -> list[Fragment]:
        return [Fragment(p, i, 0, 0, p.numel()) for i, (_, p) in enumerate(self.pairs)]

    def state_keys(self) -> list[Tensor]:
        if hasattr(self.o, "fp32_groups_flat"):  # FP16_Optimizer: one flat master per group
            return list(self.o.fp32_groups_flat)
        return [m for m, _ in self.pairs]

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        if not hasattr(self.o, "fp32_groups_flat"):
            return states
        return [
            piece
            for half, flat in zip(self.o.fp16_groups, states, strict=True)
            for _, piece in _cut(half, flat)
        ]

    def clear(self) -> None:
        self.o.zero_grad(set_to_none=True)
        for _, p in self.pairs:
            p.grad = None

    def publish(self) -> None:
        pass

    def restore(self) -> None:
        for w, m in zip(self.working(), self.masters(), strict=True):
            w.copy_(m)


def _half_and_master(optimizer: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """(bf16 parameter, fp32 master with its elements) at stage 0, from per-parameter or flat
    masters."""
    if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return [pair for half, master in groups for pair in zip(half, master, strict=True)]
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
    return [pair for half, flat in groups for pair in _cut(half, flat)]


def _cut(parameters: Sequence[nn.Parameter], flat: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, its elements of the flat tensor they were concatenated into)."""
    sizes = [p.numel() for p in parameters]
    return list(zip(parameters, flat.detach()[: sum(sizes)].split(sizes), strict=True))


def _mapped(groups: Sequence[Sequence[Any]]) -> list[Fragment]:
    """Fragments from DeepSpeed's own map of low-precision parameters to this rank's high-precision
    flat partition."""
    found = []
    for index, group in enumerate(groups):
        for p in group:
            mapping = getattr(p, "_hp_mapping", None)
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Fragment(p, index, high.start, low.start, low.numel))
    return found
