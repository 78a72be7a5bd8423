"""Masters, gradient and working copy of a DeepSpeed engine, parameter by parameter, over the flat
memory in which zero_storage finds them. This file does not import deepspeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tram_ds.engines import layout, optimizer_refusals, optimizer_state, replicas
from tram_ds.engines.filling import Fill
from tram_ds.engines.optimizer_state import Extras
from tram_ds.engines.shards import Lazy, Shards, Span
from tram_ds.engines.zero_storage import Storage
from tram_ds.engines.zero_whole import Stage3


class Zero:
    """masters: DeepSpeed's fp32 partitions, viewed parameter by parameter, so padding is never part
    of a Shards."""

    whole_gradients, group = False, None

    def __init__(self, engine: Any, storage: Storage):
        self.model, self.module = engine, replicas.unwrapped(engine.module)
        self.optimizer = base_optimizer(engine)
        self.storage = storage
        self.separate = self.storage.separate
        self.fragments = self.storage.fragments()
        names = self._names = _names(self.module)
        layout.refuse_optimizer_of_others(self.storage.parameters(), names)
        kinds = layout.kinds_of(self.module)
        # after the refusal: a fragment of a parameter that has no name would be a KeyError
        self.layout = tuple(_span(f, names[f.parameter], kinds) for f in self.fragments)
        self._signature, self._state_seen = _signature(self.module), False
        self.device = torch.device(engine.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shard_group = self.storage.group
        self.writes = self.shard_group is not None or self.rank == 0
        # stage 0 alone holds everything on every rank
        self.replicas = 1 if self.shard_group is not None else self.world_size
        self.dtype = self.storage.working()[0].dtype
        if self.replicas > 1:
            replicas.refuse_unlike(self.masters(), None, self.device)

    def follow(self) -> bool:
        if _signature(self.module) != self._signature:
            raise ValueError(
                "the trainable parameters changed after deepspeed.initialize, which has laid out "
                "its partitions over them: freeze, unfreeze or replace before it, and wrap() anew"
            )
        return False

    def _view(self, flats: Sequence[Tensor]) -> Shards:
        pieces = (
            flats[f.flat].detach().view(-1)[f.offset : f.offset + f.length] for f in self.fragments
        )
        return Shards(pieces, self.layout)

    def masters(self) -> Shards:
        return self._view(self.storage.masters())

    def working(self) -> Lazy:
        return Lazy(Shards.wide, self._view(self.storage.working()))

    def gradient(self) -> Shards:
        pieces = self.storage.gradient()
        return Shards(
            (_within(pieces[f.flat], f.offset, f.length) for f in self.fragments), self.layout
        )

    def put(self, gradient: Shards | Lazy) -> None:
        self.gradient().copy_(gradient)

    def write(self, values: Shards | Lazy) -> None:
        if isinstance(self.storage, Stage3):  # what it keeps gathered would go stale
            self.storage.release()
        self._view(self.storage.working()).copy_(values)
        self.storage.publish()

    def restore(self, theta: Shards) -> None:
        if self.separate:  # the masters still are theta: no copy of it is read
            self.storage.restore()
        else:
            self.write(theta)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the engine's own forward owns its precision

    def clear(self) -> None:
        self.storage.clear()

    def ahead(self, last: bool, local_only: bool) -> None:
        # told, not counted: DeepSpeed counts micro-batches of one pass a step, and would see the
        # boundary where the first of two ends
        self.model.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by gradient_accumulation_steps and averages over ranks; a pass wants a
        # sum.
        self.model.backward(loss * self.model.gradient_accumulation_steps())

    def step(self) -> None:
        # off the boundary its step() returns without a word
        self.model.set_gradient_accumulation_boundary(True)
        self.model.step()
        if not self._state_seen:
            optimizer_refusals.refuse_state(self.optimizer, self.storage.state_keys())
            self._state_seen = True

    def moments(self) -> dict[str, Shards]:
        # its state is of flat tensors, which no name fits: cut into parameters here
        found = optimizer_state.named_moments(self.optimizer, self.storage.state_keys())
        return {key: self._view(self.storage.cut(tensors)) for key, tensors in found.items()}

    def extras(self, steps: int) -> Extras:
        """Every group has taken the same steps, and `step` has refused the rest."""
        counts = [s["step"] for s in self.optimizer.state.values() if "step" in s]
        if not counts or "exp_avg" in self.moments():  # whose count load() knows
            return Extras()
        count = counts[0]
        number = [count.item()] if isinstance(count, Tensor) else count
        return Extras({"step": dict.fromkeys(self._names.values(), number)})

    def set_masters(self, fill: Fill) -> None:
        """Masters := what `fill` reads, working copy after them. Collective."""
        for span, piece in zip(self.layout, self.masters(), strict=True):
            fill(span.name, span.start, piece)
        # DeepSpeed fills its working copy from the masters only in its own step
        self.storage.restore()

    def load(self, params: Shards, moments: dict[str, Shards], steps: int, extras: Extras) -> None:
        if set(extras.numbers) - {"step"} or extras.others:
            raise ValueError("this optimizer state is of replicated weights: DeepSpeed has no like")
        self._view(self.storage.masters()).copy_(params)
        counts = [*extras.numbers.get("step", {}).values()]
        for key in self.storage.state_keys():
            # zeros: a flat key has padding that no view below reaches, and the optimizer steps it
            state: dict[str, Any] = {name: torch.zeros_like(key.detach()) for name in moments}
            if "exp_avg" in state:  # a count each: a shared tensor would count every sub-group
                state["step"] = optimizer_state.step_count(self.optimizer, steps, key.device)
            elif counts:
                state["step"] = optimizer_state.number(counts[0], "step", self.optimizer, key)
            self.optimizer.state[key] = state
        for name, shards in moments.items():
            tensors = [self.optimizer.state[key][name] for key in self.storage.state_keys()]
            self._view(self.storage.cut(tensors)).copy_(shards)
        self.storage.restore()

    def frozen(self) -> Shards:
        return layout.frozen(self.module, partition_of, self.rank)


def _span(fragment: Any, name: str, kinds: Mapping[str, str]) -> Span:
    f = fragment
    return Span(name, f.start, f.length, _shape(f.parameter), kinds.get(name, ""))


def _names(module: nn.Module) -> dict[Any, str]:
    return dict(layout.parameter_names(module))


def _signature(module: nn.Module) -> tuple[tuple[str, int], ...]:
    return tuple((name, id(p)) for p, name in _names(module).items())


def _within(pieces: Sequence[Tensor], offset: int, length: int) -> Tensor:
    """A flat view of elements [offset, offset + length) of the pieces laid end to end; a fragment
    never straddles two."""
    for piece in pieces:
        if offset + length <= piece.numel():
            return piece.detach().view(-1)[offset : offset + length]
        offset -= piece.numel()
    raise AssertionError("a parameter's gradient lies in one piece")


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper; its param_groups are the ones that move the
    weights."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def partition_of(name: str, p: Any) -> tuple[Span, Tensor] | None:
    """This rank's part of a stage-3 parameter, padding left out; None for one that is whole."""
    if not hasattr(p, "ds_tensor"):
        return None
    # equal pieces, the last ones padded; by the job's rank, since what partitions over fewer
    # ranks (MiCS, a second copy) is refused
    each = p.ds_tensor.numel()
    start = min(dist.get_rank() * each, p.ds_numel)
    length = min(each, p.ds_numel - start)
    return Span(name, start, length, _shape(p)), p.ds_tensor.data.view(-1)[:length]


def _shape(p: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))
