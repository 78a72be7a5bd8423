"""The weights of a fresh model, drawn one tensor at a time by whoever holds a piece of it.

A model that is larger than a host is built with tensors that have no memory. What its constructor
and transformers' initialisation write to each of them is noted, with the state of the generator
before every random draw: played again, it makes the tensor bit for bit as building the whole model
does, at any world size and in any order.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any_only, tree_leaves, tree_map_only

aten = torch.ops.aten
# bytes that every rank may keep of what is no draw: values computed and then copied into weights,
# and parameters that are made with their values, as the ones of a norm
KEPT = 1 << 26
PAGES = 1 << 16  # bytes from which a tensor gets pages of its own
# what was written before them is gone, where they write all of a tensor
OVERWRITE = {
    aten.normal_.default,
    aten.uniform_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.copy_.default,
}
View = tuple[tuple[int, ...], tuple[int, ...], int]  # sizes, strides and offset in a memory


class NotDrawn(Exception):
    """Why the weights of a fresh model cannot be drawn one tensor at a time."""


@dataclass(frozen=True)
class Draw:
    """One write. view: of the memory, what it writes. state: of the generator before it; None where
    it is not random."""

    func: Any
    view: View
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor | None

    def play(self, memory: Tensor) -> None:
        """Writes into the flat `memory`. Moves the global generator where it is random."""
        if self.state is not None:
            torch.set_rng_state(self.state)
        self.func(memory.as_strided(*self.view), *self.args, **self.kwargs)


@dataclass(frozen=True)
class Script:
    """All writes to a memory that count."""

    elements: int
    dtype: torch.dtype
    draws: list[Draw] = field(default_factory=list)

    def memory(self) -> Tensor:
        """Flat, of any values. It goes back to the system when it is freed: between the allocator's
        other blocks, what was a tensor would become gaps that add up to the model."""
        size = self.elements * self.dtype.itemsize
        if size < PAGES:
            return torch.empty(self.elements, dtype=self.dtype)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=self.dtype)

    def played(self) -> Tensor:
        """The memory as they leave it. The global generator is left as it was."""
        memory = self.memory()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for draw in self.draws:
                draw.play(memory)
        return memory


@dataclass(frozen=True)
class Drawn:
    """A tensor that is drawn whenever it is asked for."""

    script: Script
    view: View

    def value(self) -> Tensor:
        """The whole of it, on the CPU."""
        return self.script.played().as_strided(*self.view)

    def read(self, start: int, into: Tensor) -> None:
        """Elements [start, start + len(into)) of it flattened, cast to the dtype and put on the
        device of `into`. Holds the whole tensor meanwhile."""
        into.copy_(self.value().reshape(-1)[start : start + into.numel()])


class Unmade(Tensor):
    """A tensor of the CPU without memory. meta: its shape; drawn: its values."""

    meta: Tensor
    drawn: Drawn
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor, script: Script) -> Unmade:
        # not on meta for those who ask: torch initialises nothing there
        view: View = tuple(meta.size()), tuple(meta.stride()), int(meta.storage_offset())
        sizes, strides, offset = view
        cpu = torch.device("cpu")
        found: Unmade = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, sizes, strides=strides, storage_offset=offset, dtype=meta.dtype, device=cpu
        )
        found.meta, found.drawn = meta, Drawn(script, view)
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotDrawn(f"{func} of a weight, after its model was built")


class Noting(TorchDispatchMode):
    """Inside, torch.empty makes tensors of floats without memory. Writes to them are noted; what is
    computed from them is computed from values that are drawn for it. The global generator moves as
    if they had memory."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.empty.memory_format:
            return self._empty(func, args, kwargs)
        if args and isinstance(args[0], Unmade):
            if func.is_view:
                return self._view(func, args, kwargs)
            if func._schema.is_mutable:
                return self._write(func, args, kwargs)
        if any(tree_any_only(Unmade, lambda t: True, w) for w in _written(func, args, kwargs)):
            raise NotDrawn(f"{func} writes to more than its first argument")
        return func(*_made(args), **_made(kwargs))

    def _empty(self, func: Any, args: Any, kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        on_cpu = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if not (on_cpu and dtype.is_floating_point):
            return func(*args, **kwargs)
        meta = func(*args, **{**kwargs, "device": "meta", "pin_memory": False})
        return Unmade(meta, Script(meta.numel(), dtype))

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        script = args[0].drawn.script
        found = func(*tree_map_only(Unmade, lambda t: t.meta, args), **kwargs)
        if any(t.dtype != script.dtype for t in tree_leaves(found)):
            raise NotDrawn(f"{func} sees a weight as another dtype")
        return tree_map_only(Tensor, lambda t: Unmade(t, script), found)

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        into, read = args[0], (_made(args[1:]), _made(kwargs))
        alone = len(list(_written(func, args, kwargs))) == 1
        if not alone or torch.Tag.inplace_view in func.tags or kwargs.get("generator") is not None:
            raise NotDrawn(f"its initialisation calls {func}, or with a generator of its own")
        self.keep(*(t for t in tree_leaves(read) if isinstance(t, Tensor)))
        rest, named = tree_map_only(Tensor, lambda t: t.detach().clone(), read)
        script, view = into.drawn.script, into.drawn.view
        random = torch.Tag.nondeterministic_seeded in func.tags
        draw = Draw(func, view, rest, named, torch.get_rng_state() if random else None)
        if random:  # the generator moves on as it would have
            with torch.no_grad():
                draw.play(script.memory())
        if func in OVERWRITE and into.numel() == script.elements:
            script.draws.clear()
        script.draws.append(draw)
        return into

    def keep(self, *tensors: Tensor) -> None:
        """NotDrawn where more than KEPT would stay in every rank's memory."""
        self._kept += sum(t.numel() * t.element_size() for t in tensors)
        if self._kept > KEPT:
            raise NotDrawn(f"its initialisation computes more than {KEPT >> 20} MiB of its weights")


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Arguments that an operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)


def _made(tree: Any) -> Any:
    return tree_map_only(Unmade, lambda t: t.drawn.value(), tree)


def build(make: Callable[[], Any]) -> tuple[Any, dict[str, Drawn]]:
    """(what `make` builds, its parameters by name where they are drawn).

    These are Unmade and have to be replaced; other parameters, and all buffers, have their values.
    NotDrawn, or what torch says of a tensor without memory, where that cannot be. The global
    generator is then anywhere; else it is as after `make()` alone.
    """
    with Noting() as noting:
        model = make()
    parameters = dict(model.named_parameters())
    found = {name: p.drawn for name, p in parameters.items() if isinstance(p, Unmade)}
    noting.keep(*(p for name, p in parameters.items() if name not in found))
    for module in model.modules():
        _make_buffers(module)
    return model, found


def _make_buffers(module: nn.Module) -> None:
    for name, buffer in module._buffers.items():
        if isinstance(buffer, Unmade):
            module._buffers[name] = buffer.drawn.value()
    own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")}
    for name, value in own.items():
        if tree_any_only(Unmade, lambda t: True, value):
            raise NotDrawn(f"{type(module).__name__}.{name} holds weights beside its parameters")
