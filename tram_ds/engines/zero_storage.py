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
    def parameters(self) -> list[Any]:
        """Every parameter that the optimizer moves, on whatever rank its elements are."""
        ...

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
        if optimizer.cpu_offload:
            requires(
                optimizer,
                "accumulated_grads_in_cpu",
                "norm_for_param_grads",
                "_finalize_cpu_offload_gradient_accumulation",
                "_offload_accumulated_param_ids",
                "_wait_for_offload_copies",
            )
        self.o, self.all_gather, self.group = optimizer, all_gather, optimizer.dp_process_group

    def masters(self) -> list[Tensor]:
        # detached: they are leaves with a gradient, which torch lets nobody write in place
        return [m.detach() for m in self.o.single_partition_of_fp32_groups]

    def working(self) -> list[Tensor]:
        groups = zip(
            self.o.parallel_partitioned_bit16_groups, self.o.real_dp_process_group, strict=True
        )
        # a view of the flat memory that the model's parameters are views of
        return [parts[dist.get_rank(group)].detach() for parts, group in groups]

    def gradient(self) -> list[list[Tensor]]:
        o = self.o
        if o.cpu_offload:
            # In the last micro-batch DeepSpeed copies what that one reached, and takes its norm;
            # what only earlier ones did is still where they are added up.
            if not o._offload_accumulated_param_ids <= o.norm_for_param_grads.keys():
                o._finalize_cpu_offload_gradient_accumulation()
            # the last copies to the host may be under way: DeepSpeed itself waits in its step
            o._wait_for_offload_copies()
            return [[m.grad] for m in o.single_partition_of_fp32_groups]
        return [self._pieces(i) for i in range(len(self.o.bit16_groups))]

    def _pieces(self, i: int) -> list[Tensor]:
        pieces = self.o.averaged_gradients[i]
        # bf16 parameters with fp32 accumulation keep one flat buffer
        flat = getattr(pieces, "flat_partition", None)
        return [flat] if flat is not None else list(pieces)

    def fragments(self) -> list[Fragment]:
        return _mapped(self.o.bit16_groups)

    def parameters(self) -> list[Any]:
        return [p for group in self.o.bit16_groups for p in group]

    def state_keys(self) -> list[Tensor]:
        return list(self.o.single_partition_of_fp32_groups)

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        return states

    def clear(self) -> None:
        """DeepSpeed's own overflow path plus the start of its step; the dict objects must stay,
        DeepSpeed holds them."""
        o = self.o
        # it numbers the micro-batches of an accumulation; the first of the next pass has to be 0
        o.micro_step_id = -1
        o.zero_grad(set_to_none=True)
        # first: it finds the buffers by the entries that are dropped below
        o._release_preflattened_grad_buffers()
        if o.cpu_offload:
            o.reset_cpu_buffers()
            o._offload_accumulated_param_ids = set()
            # A parameter that the next pass does not reach would keep this pass's gradient; one
            # that its first micro-batch does not reach would be added to this pass's.
            for m in o.single_partition_of_fp32_groups:
                m.grad.zero_()
            for added_up in o.accumulated_grads_in_cpu.values():
                added_up.zero_()
        for k in list(o.averaged_gradients):
            o.averaged_gradients[k] = None
        # of a pass that stopped short of its boundary: the next one's would be added to these
        for k in list(o.all_grad_tensors):
            o.all_grad_tensors[k] = None

    def publish(self) -> None:
        # into the flat memory itself: the model's parameters are views of it
        self.all_gather(
            groups_flat=self.o.bit16_groups_flat,
            partitioned_param_groups=self.o.parallel_partitioned_bit16_groups,
            dp_process_group=self.o.real_dp_process_group,
            start_alignment_factor=self.o.nccl_start_alignment_factor,
            allgather_bucket_size=self.o.allgather_bucket_size,
        )

    def restore(self) -> None:
        # masters cast and gathered, as the end of DeepSpeed's own step does it: so bit for bit
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

    def parameters(self) -> list[Any]:
        return [p for group in self.o.bf16_groups for p in group]

    def state_keys(self) -> list[Tensor]:
        return list(self.o.fp32_groups_flat_partition)

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        return states

    def clear(self) -> None:
        # the fp32 sums too, and which parameters have any
        self.o.zero_grad()

    @torch.no_grad()  # its flat weights are made of parameters, with a history
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


def _mapped(groups: Sequence[Sequence[Any]]) -> list[Fragment]:
    """Fragments from DeepSpeed's own map of low-precision parameters to this rank's high-precision
    flat partition."""
    found = []
    for index, group in enumerate(groups):
        for p in group:
            mapping = getattr(p, "_hp_mapping", None)
            if mapping is not None:  # None: none of it is in this rank's partition
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Fragment(p, index, high.start, low.start, low.numel))
    return found
