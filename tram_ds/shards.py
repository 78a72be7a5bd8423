"""Element-wise arithmetic over the fp32 parameter shards that one rank owns; it reads like the maths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Where a shard tensor lies: elements [start, start + length) of the flattened parameter `name` of shape `shape`."""

    name: str
    start: int
    length: int
    shape: tuple[int, ...]


class Shards(Sequence[Tensor]):
    """One tensor per span, contiguous pieces of parameters, padding excluded; all arithmetic is element-wise and local.

    Scalars may be Python numbers or () tensors; a () tensor never leaves its device for the host.
    """

    def __init__(self, tensors: Iterable[Tensor], layout: tuple[Span, ...]):
        self.tensors, self.layout = list(tensors), layout
        assert len(self.tensors) == len(layout), "one tensor per span"

    def __getitem__(self, index):  # type: ignore[override]
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def _new(self, tensors: Iterable[Tensor]) -> Shards:
        return Shards(tensors, self.layout)

    def _binary(self, op: Callable, other: Shards | Tensor | float) -> Shards:
        if not self.tensors:
            return self
        if isinstance(other, Shards):
            return self._new(op(self.tensors, other.tensors))
        return self._new(op(self.tensors, self.scalar(other)))

    def scalar(self, value: Tensor | float) -> Tensor | float:
        """A () tensor in the dtype and on the device of these shards: fp32 shards times an fp64 norm stay fp32."""
        if not isinstance(value, Tensor) or not self.tensors:
            return value
        return value.detach().to(device=self.tensors[0].device, dtype=self.tensors[0].dtype)

    def __add__(self, other: Shards | float) -> Shards:
        return self._binary(torch._foreach_add, other)

    def __sub__(self, other: Shards) -> Shards:
        return self._binary(torch._foreach_sub, other)

    def __mul__(self, other: Shards | Tensor | float) -> Shards:
        return self._binary(torch._foreach_mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Shards) -> Shards:
        return self._binary(torch._foreach_div, other)

    def __abs__(self) -> Shards:
        return self._new(torch._foreach_abs(self.tensors)) if self.tensors else self

    def reciprocal(self) -> Shards:
        """1 / x, element by element."""
        return self._new(torch._foreach_reciprocal(self.tensors)) if self.tensors else self

    def map(self, f: Callable[[Span, Tensor], Tensor]) -> Shards:
        """f(span, tensor) for every piece: where a rule depends on the parameter's name or shape."""
        return self._new(f(span, tensor) for span, tensor in zip(self.layout, self.tensors, strict=True))

    def clone(self) -> Shards:
        return self._new(tensor.detach().clone() for tensor in self.tensors)

    def scale_(self, factor: Tensor | float) -> Self:
        """Multiplies in place by one scalar."""
        if self.tensors:
            torch._foreach_mul_(self.tensors, self.scalar(factor))
        return self

    def lerp_(self, other: Shards, weight: float) -> Self:
        """self += weight * (other - self), in place."""
        if self.tensors:
            torch._foreach_lerp_(self.tensors, other.tensors, weight)
        return self

    def copy_(self, other: Shards) -> Self:
        """Overwrites in place, casting where the dtypes differ. Empty pieces are left out: foreach refuses none of them."""
        with torch.no_grad():
            if self.tensors:
                torch._foreach_copy_(self.tensors, other.tensors)
        return self

    def dot(self, other: Shards) -> Tensor:
        """() float64: the inner product of this rank's pieces."""
        parts = [(a.double() * b.double()).sum() for a, b in zip(self.tensors, other.tensors, strict=True)]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    def square_sum(self, device: torch.device | str = "cpu") -> Tensor:
        """() float64 on the shards' device: the sum of squares of this rank's pieces; sums of squares add up over ranks."""
        pieces = [tensor for tensor in self.tensors if tensor.numel()]
        if not pieces:
            return torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack(torch._foreach_norm(pieces)).double().square().sum()

    def equal(self, other: Shards) -> bool:
        """Bitwise equality of this rank's pieces (synchronises with the device: not for the step)."""
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))
