"""DeepSpeed's memory where parameters have pieces of their own: stage 3, and stage 0. See
zero_storage. This file does not import deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tram_ds.engines.zero_storage import Fragment, requires


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
        if optimizer.offload_optimizer:
            requires(
                optimizer,
                "get_param_id",
                "norm_for_param_grads",
                "_finalize_offload_gradient_accumulation",
                "_offload_boundary_param_ids",
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
        # fp32 may share one memory: then a move needs a copy of theta to come back to
        self.separate = all(m.data_ptr() != w.data_ptr() for m, w in pairs)
        # both: DeepSpeed's step casts a whole flat master into the working copy, padding and all
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
        o = self.o
        if o.offload_optimizer:
            # in the last micro-batch DeepSpeed copies what that one reached, and takes its norm;
            # what only earlier ones did is still where they are added up
            reached = (p for p in self.parameters() if p.ds_id in o._offload_boundary_param_ids)
            if any(o.get_param_id(p) not in o.norm_for_param_grads for p in reached):
                o._finalize_offload_gradient_accumulation()
            return [[m.grad] for m in o.fp32_partitioned_groups_flat]
        # DeepSpeed pads what it reduce-scatters with torch.empty, in every pass: the step would
        # take that into the masters' padding
        for group, paddings in enumerate(o.groups_padding):
            for piece, padding in zip(o.averaged_gradients[group], paddings, strict=True):
                if padding:
                    piece.view(-1)[-padding:].zero_()
        return [list(o.averaged_gradients[group]) for group in range(len(o.fp16_groups))]

    def fragments(self) -> list[Fragment]:
        found = []
        for index, group in enumerate(self.o.fp16_groups):
            offset = 0
            for p in group:
                size = p.partition_numel()
                start = size * self.o._get_param_partition_rank(p)
                length = max(0, min(size, p.ds_numel - start))
                # a rank past the end keeps its empty piece: all ranks have one layout of names
                found.append(Fragment(p, index, offset, min(start, p.ds_numel), length))
                offset += size
        return found

    def parameters(self) -> list[Any]:
        return [p for group in self.o.fp16_groups for p in group]

    def state_keys(self) -> list[Tensor]:
        return list(self.o.fp32_partitioned_groups_flat)  # param_groups are empty but during a step

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        return states

    def clear(self) -> None:
        o = self.o
        o.micro_step_id = 0
        o.zero_grad(set_to_none=True)
        # DeepSpeed's step forgets them, and pass 1 ends without one
        o._offload_boundary_param_ids = set()
        # or the next forward would count on from this pass, and its first backward add to it
        o._epilogue_ran_this_backward = False
        if o.offload_optimizer:
            o.reset_cpu_buffers()
            for m in o.fp32_partitioned_groups_flat:
                if m.grad is not None:
                    m.grad.zero_()
        else:
            # a new dict here, as its own overflow path has it: stage 3 keeps no other hold of it
            o.averaged_gradients = {}
        # a parameter unused in the next pass would keep this pass's gradient
        o.grad_partitions_flat_buffer.zero_()

    def release(self) -> None:
        """Before the working copy changes: persistent and prefetched parameters are gathered
        copies, stale afterwards."""
        self.o.empty_partition_cache()

    def publish(self) -> None:
        working = self.working()[0]
        if working.is_cuda:
            # With overlap_comm DeepSpeed gathers on a stream of its own that waits for nobody: the
            # next pass could gather the weights of before.
            torch.cuda.current_stream(working.device).synchronize()
        persistent = self.o.persistent_parameters
        if len(persistent):
            # all at once, as the end of DeepSpeed's own step gathers them, and not module by module
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
            # as DeepSpeed's own all-reduce fills them in, so that ranks reduce the same sizes
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [[p.grad] for _, p in self.pairs if p.grad is not None]

    def fragments(self) -> list[Fragment]:
        return [Fragment(p, i, 0, 0, p.numel()) for i, (_, p) in enumerate(self.pairs)]

    def parameters(self) -> list[Any]:
        return [p for _, p in self.pairs]

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
        # every rank has all masters: a cast is all, and no rank waits
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
