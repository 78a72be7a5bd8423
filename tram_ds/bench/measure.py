"""One call measured: FLOPs, bytes of every kind of collective, live tensor bytes, and the share of
a step's own arithmetic."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tram_ds.engines import norms

SMALL = 1024  # bytes: sums, norms and flags; a collective of a model's tensors is larger


class Traffic(TorchDispatchMode):
    """bytes[kind] and calls[kind] of the collectives inside: of the whole tensor, as it is before a
    scatter or after a gather.

    Sees what a process group is asked to do, whoever asks: DDP's reducer, FSDP2, DeepSpeed, the
    engine's own sums. A 2-rank all-gather of 1 MB shards counts 2 MB. Collectives of at most SMALL
    bytes are counted in calls["small"] only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def note(self, func: Any, args: Any) -> None:
        """Counts one operator, if it is a collective: by itself, or for another mode."""
        if func.namespace == "c10d":
            # c10d's _allgather_base_ is an allgather, and allreduce_ an allreduce
            name = func.overloadpacket.__name__.strip("_").replace("_base", "").removesuffix("_")
            size = _largest_side(args)
            kind = "small" if size <= SMALL else name
            self.calls[kind] += 1
            if size > SMALL:
                self.bytes[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func, args)
        return func(*args, **(kwargs or {}))


def _largest_side(args: Any) -> int:
    """Bytes of the larger of a collective's input and output."""
    sides = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args[:2]]
    return max(sides, default=0)


class Live(TorchDispatchMode):
    """peak: bytes of all tensor storages alive at once inside; start: those alive at the beginning.
    Emptied storages count 0."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[Any]] = {}
        # else what only waits to be collected would count as alive
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thing in gc.get_objects():
                if isinstance(thing, Tensor):
                    self._note(thing)
        self.start = self.peak = self.now()

    def _note(self, tensor: Tensor) -> None:
        # a DTensor's memory is that of its shard on this rank
        local = getattr(tensor, "_local_tensor", tensor)
        if local.layout is torch.strided and local.device.type != "meta":
            storage = local.untyped_storage()
            self.storages.setdefault(storage._cdata, weakref.ref(storage))

    def now(self) -> int:
        """Bytes of the storages alive."""
        alive = {
            key: (ref, storage)
            for key, ref in self.storages.items()
            if (storage := ref()) is not None
        }
        self.storages = {key: ref for key, (ref, _) in alive.items()}
        return sum(storage.nbytes() for _, storage in alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self.peak = max(self.peak, self.now())
        return out


@dataclass(frozen=True)
class Counted:
    """One step. flops; bytes and calls by collective; small_calls: of scalars; state and peak:
    bytes, before and at the top."""

    flops: int
    bytes: dict[str, int]
    calls: dict[str, int]
    state: int
    peak: int


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, which other jobs do not lengthen; of the wall, after
    waiting, on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def turns(labels: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, label): every label once a round, in an order that turns with it, so that none always
    follows the same one. Round 0 is one more, to warm up."""
    for round_ in range(rounds + 1):
        first = round_ % len(labels)
        for label in (*labels[first:], *labels[:first]):
            yield round_, label


def counted(step: Callable[[], object]) -> Counted:
    """Three calls of `step`, one per kind of count, because the counters would see each other's
    work."""
    with FlopCounterMode(display=False) as flops:
        step()
    with Traffic() as traffic:
        step()
    with Live() as live:
        step()
    return Counted(
        flops.get_total_flops(), dict(traffic.bytes), dict(traffic.calls), live.start, live.peak
    )


class Shares:
    """Process seconds of norms, epsilon, publish and restore: all of a step that is neither a pass
    nor the descent."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, `seconds` grows with every step."""
        engine = self.engine
        with (
            mock.patch.object(norms, "squared_norm", self._timed(norms.squared_norm)),
            mock.patch.object(engine, "norm", self._timed(engine.norm)),
            mock.patch.object(engine, "moved", self._timed_context(engine.moved)),
        ):
            yield

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        return run

    def _timed_context(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The way in and the way out, not what happens between."""

        @contextmanager
        def run(*args: Any, **kwargs: Any) -> Iterator[None]:
            inner = call(*args, **kwargs)
            self._timed(inner.__enter__)()
            try:
                yield
            except BaseException as error:
                inner.__exit__(type(error), error, error.__traceback__)
                raise
            self._timed(inner.__exit__)(None, None, None)

        return run
