"""Buffers of a module, put back as they were: running statistics, spectral norm's vectors, counts,
whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Elements. A larger mask (bool: causal masks are the largest buffers) is copied only when torch
# says that it was written. All else always: batch norm's kernels write without saying so.
SMALL = 1 << 14


@dataclass
class Copy:
    """A tensor and what it held. version: torch's count of writes to it, then."""

    tensor: Tensor
    value: Tensor
    version: int

    @staticmethod
    def of(tensor: Tensor) -> Copy:
        return Copy(tensor, tensor.detach().clone(), _version(tensor))

    def stands(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the one that was copied, unwritten since."""
        return tensor is self.tensor and _large_mask(tensor) and _version(tensor) == self.version

    def put_back(self) -> None:
        # through .data: a graph that is still to be differentiated may have saved the buffer, and
        # what it saved is what is written back
        self.tensor.data.copy_(self.value)
        self.version = _version(self.tensor)


Snapshot = dict[tuple[int, str], tuple[dict[str, Any], Copy | None]]


class ModuleState:
    """Snapshots of the buffers of `module`, and of its small frozen parameters where `frozen`:
    some layers keep their statistics there."""

    def __init__(self, module: nn.Module, frozen: bool = False):
        self.module, self.frozen = module, frozen
        self._last: dict[int, Copy] = {}  # of large ones, by id

    def take(self) -> Snapshot:
        """What stands now. Copies only what was written since the last time."""
        return {
            (id(owner), name): (owner, None if tensor is None else self._copy(tensor))
            for owner, name, tensor in self._tensors()
        }

    def put_back(self, snapshot: Snapshot) -> None:
        """Every tensor of the snapshot holds what it held, and is the one its module has."""
        for (_, name), (owner, copy) in snapshot.items():
            if copy is not None and not copy.stands(copy.tensor):
                copy.put_back()
            tensor = None if copy is None else copy.tensor
            if owner.get(name) is not tensor:
                owner[name] = tensor

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What happens to the buffers inside is undone on the way out."""
        before = self.take()
        try:
            yield
        finally:
            self.put_back(before)

    def _tensors(self) -> Iterator[tuple[dict[str, Any], str, Tensor | None]]:
        for m in self.module.modules():
            for name, buffer in m._buffers.items():
                yield m._buffers, name, buffer
            if self.frozen:
                for name, p in m._parameters.items():
                    if p is not None and not p.requires_grad and _small(p):
                        yield m._parameters, name, p

    def _copy(self, tensor: Tensor) -> Copy:
        last = self._last.get(id(tensor))
        if last is not None and last.stands(tensor):
            return last
        copy = Copy.of(tensor)
        if _large_mask(tensor):
            self._last[id(tensor)] = copy
        return copy


def _large_mask(tensor: Tensor) -> bool:
    large = tensor.numel() > SMALL
    return large and tensor.dtype == torch.bool and not tensor.is_inference()


def _small(p: Tensor) -> bool:
    return p.numel() <= SMALL and not isinstance(p, DTensor) and not p.is_meta


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
