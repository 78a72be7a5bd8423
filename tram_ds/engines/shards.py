"""Element-wise arithmetic over the fp32 parameter shards that one rank owns; it reads like the
maths.

Shards hold tensors. Lazy holds a rule and computes it in parts of at most PART elements when it is
read, so that a formula of several operations passes over memory once and has no temporary of the
model's size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

# elements: what stays in a core's cache; what keeps a GPU busy
PART = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class Span:
    """Where a shard tensor lies: elements [start, start + length) of the flattened parameter `name`
    of shape `shape`. kind: one of layout.KINDS, or "": what rules by layer go by."""

    name: str
    start: int
    length: int
    shape: tuple[int, ...]
    kind: str = field(default="", compare=False)


Cut = list[tuple[int, int, int]]  # (piece, from element, to element), one part of a Shards


class Shards(Sequence[Tensor]):
    """One tensor per span, contiguous pieces of parameters, padding excluded; all arithmetic is
    element-wise and local.

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
        # A rank may own nothing of a small model, and _foreach refuses an empty list.
        if not self.tensors:
            return self
        if isinstance(other, Shards):
            return self._new(op(self.tensors, other.tensors))
        return self._new(op(self.tensors, self.scalar(other)))

    def scalar(self, value: Tensor | float) -> Tensor | float:
        """A () tensor in the dtype and on the device of these shards: fp32 shards times an fp64
        norm stay fp32."""
        if not isinstance(value, Tensor) or not self.tensors:
            return value
        # to the device: offloaded shards are on the CPU, where torch takes no () tensor of the GPU
        return value.detach().to(device=self.tensors[0].device, dtype=self.tensors[0].dtype)

    # NotImplemented sends Python to the Lazy on the right, so that Shards + Lazy stays lazy.
    def __add__(self, other: Shards | Lazy | float) -> Shards:
        return (
            NotImplemented if isinstance(other, Lazy) else self._binary(torch._foreach_add, other)
        )

    def __sub__(self, other: Shards | Lazy) -> Shards:
        return (
            NotImplemented if isinstance(other, Lazy) else self._binary(torch._foreach_sub, other)
        )

    def __mul__(self, other: Shards | Lazy | Tensor | float) -> Shards:
        return (
            NotImplemented if isinstance(other, Lazy) else self._binary(torch._foreach_mul, other)
        )

    def __rmul__(self, other: Tensor | float) -> Shards:
        return self * other

    def __truediv__(self, other: Shards | Lazy) -> Shards:
        return (
            NotImplemented if isinstance(other, Lazy) else self._binary(torch._foreach_div, other)
        )

    def __abs__(self) -> Shards:
        return self._new(torch._foreach_abs(self.tensors)) if self.tensors else self

    def sqrt(self) -> Shards:
        """Element by element."""
        return self._new(torch._foreach_sqrt(self.tensors)) if self.tensors else self

    def reciprocal(self) -> Shards:
        """1 / x, element by element."""
        return self._new(torch._foreach_reciprocal(self.tensors)) if self.tensors else self

    def map(self, f: Callable[[Span, Tensor], Tensor]) -> Shards:
        """f(span, tensor) for every piece: where a rule depends on the parameter's name or
        shape."""
        return self._new(
            f(span, tensor) for span, tensor in zip(self.layout, self.tensors, strict=True)
        )

    def wide(self) -> Shards:
        """fp32 where the pieces are of half precision; the same tensors where they are not."""
        return self._new(tensor.to(_wide(tensor.dtype)) for tensor in self.tensors)

    def rounded(self, dtype: torch.dtype) -> Shards:
        """To `dtype` and back: what a working copy of that type keeps."""
        return self._new(tensor.to(dtype).to(tensor.dtype) for tensor in self.tensors)

    def clone(self) -> Shards:
        return self._new(tensor.detach().clone() for tensor in self.tensors)

    def realise(self) -> Shards:
        """Itself: what a Lazy becomes by it."""
        return self

    def cuts(self) -> list[Cut]:
        """All non-empty pieces in parts of about PART elements: small pieces together, large ones
        in several parts."""
        limit = PART.get(self.tensors[0].device.type, PART["cuda"]) if self.tensors else 1
        found: list[Cut] = []
        room = 0
        for index, tensor in enumerate(self.tensors):
            start, size = 0, tensor.numel()
            while start < size:
                if not room:
                    found.append([])
                    room = limit
                stop = min(size, start + room)
                found[-1].append((index, start, stop))
                room -= stop - start
                start = stop
        return found

    def part(self, cut: Cut) -> Shards:
        """Flat views of the elements in `cut`: writing them writes these shards."""
        whole = [(self.tensors[i], self.layout[i], a, b) for i, a, b in cut]
        spans = tuple(replace(span, start=span.start + a, length=b - a) for _, span, a, b in whole)
        return Shards([_flat(tensor)[a:b] for tensor, _, a, b in whole], spans)

    def scale_(self, factor: Tensor | float) -> Self:
        """Multiplies in place by one scalar."""
        if self.tensors:
            torch._foreach_mul_(self.tensors, self.scalar(factor))
        return self

    def lerp(self, other: Shards, weight: float) -> Shards:
        """self + weight * (other - self), in tensors of its own."""
        if not self.tensors:
            return self
        return self._new(torch._foreach_lerp(self.tensors, other.tensors, weight))

    def copy_(self, other: Shards | Lazy) -> Self:
        """Overwrites in place, casting where the dtypes differ."""
        with torch.no_grad():
            if isinstance(other, Lazy):
                # by this side's cuts: the parts of `other` are computed as they are written
                for cut in self.cuts():
                    torch._foreach_copy_(self.part(cut).tensors, other.part(cut).tensors)
            elif self.tensors:
                torch._foreach_copy_(self.tensors, other.tensors)
        return self

    def dot(self, other: Shards | Lazy) -> Tensor:
        """() float64: the inner product of this rank's pieces."""
        # float64: terms of both signs cancel, which in a sum of squares they never do
        return total(
            lambda a, b: torch.stack(
                [x.double() @ y.double() for x, y in zip(a, b, strict=True)]
            ).sum(),
            self,
            other,
        )

    def square_sum(self, device: torch.device | str = "cpu") -> Tensor:
        """() float64 on the shards' device: the sum of squares of this rank's pieces; sums of
        squares add up over ranks."""
        # a rank that owns nothing still owes the all-reduce a 0, on the device of the others'
        pieces = [tensor for tensor in self.tensors if tensor.numel()]
        if not pieces:
            return torch.zeros((), dtype=torch.float64, device=device)
        # One kernel for all pieces, in their own precision; what grows with the model, the sum over
        # pieces and ranks, is in float64.
        return torch.stack(torch._foreach_norm(pieces)).double().square().sum()

    def equal(self, other: Shards | Lazy) -> bool:
        """Bitwise equality of this rank's pieces (synchronises with the device: not for the
        step)."""
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.realise(), strict=True))


class Lazy:
    """rule(*parts of the sources) -> Shards: computed anew, part by part, each time it is read.

    A source that changes in the meantime changes what is read: `realise` what must last.
    """

    def __init__(self, rule: Callable[..., Shards], *sources: Shards | Lazy):
        self.rule, self.sources = rule, sources
        # the first source's cuts are everyone's: all sources have one layout
        self.like: Shards = sources[0].like if isinstance(sources[0], Lazy) else sources[0]
        self.layout = self.like.layout

    def cuts(self) -> list[Cut]:
        return self.like.cuts()

    def part(self, cut: Cut) -> Shards:
        """The elements in `cut`, as new flat tensors or views of the sources: not to be written."""
        return self.rule(*(source.part(cut) for source in self.sources))

    def realise(self) -> Shards:
        """All of it, in tensors of their own (fp32 or wider), shaped like the first source's."""
        out = Shards((torch.empty_like(t, dtype=_wide(t.dtype)) for t in self.like), self.layout)
        return out.copy_(self)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.realise())

    def __add__(self, other: Shards | Lazy) -> Lazy:
        return Lazy(operator.add, self, other)

    def __radd__(self, other: Shards) -> Lazy:
        return Lazy(operator.add, other, self)

    def __sub__(self, other: Shards | Lazy) -> Lazy:
        return Lazy(operator.sub, self, other)

    def __rsub__(self, other: Shards) -> Lazy:
        return Lazy(operator.sub, other, self)

    def __mul__(self, other: Shards | Lazy | Tensor | float) -> Lazy:
        return (
            Lazy(operator.mul, self, other)
            if isinstance(other, Shards | Lazy)
            else Lazy(lambda x: x * other, self)
        )

    __rmul__ = __mul__

    def map(self, f: Callable[[Span, Tensor], Tensor]) -> Lazy:
        """f(span, tensor) for every piece of a part."""
        return Lazy(lambda x: x.map(f), self)

    def dot(self, other: Shards | Lazy) -> Tensor:
        """() float64: the inner product of this rank's pieces."""
        return Shards.dot(self, other)  # type: ignore[arg-type]

    def square_sum(self, device: torch.device | str = "cpu") -> Tensor:
        """As Shards.square_sum."""
        return total(lambda x: x.square_sum(device), self, device=device)


def total(
    f: Callable[..., Tensor], *sources: Shards | Lazy, device: torch.device | str = "cpu"
) -> Tensor:
    """() float64: the sum over all parts of f(*parts)."""
    # () tensors, stacked at the end: no part waits for the device
    found = [f(*(source.part(cut) for source in sources)).double() for cut in sources[0].cuts()]
    return (
        torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64, device=device)
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _flat(tensor: Tensor) -> Tensor:
    """A view in memory order: a parameter, its gradient and its copies share one."""
    # dense, but not contiguous: channels-last weights, of which view(-1) would refuse a view
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
