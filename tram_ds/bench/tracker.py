"""torch's memory tracker around an engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from tram_ds.engines import fsdp2
from tram_ds.engines.protocol import Engine


@contextmanager
def tracked(engine: Engine, mode: FakeTensorMode) -> Iterator[MemTracker]:
    """Inside, torch's tracker sees the model, the optimizer and every tensor that is made."""
    model, optimizer = engine.model, engine.weights.optimizer
    tracker: Any
    if isinstance(engine.weights, fsdp2.FSDP2):
        tracker = FSDPMemTracker(model, optimizer)
        # before it knows parameters and moments by name: whatever else is there
        tracker.track_inputs(tuple(_there(mode)))
    else:
        tracker = MemTracker()
        tracker.track_external(*_there(mode), model, optimizer)
    tracker.memory_tracking = _Modules()

    def forget(module: nn.Module, _: Any) -> None:
        if module is model:  # it counts by module, and knows one forward pass of each
            tracker.reset_mod_stats()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(forget).remove)
        yield stack.enter_context(tracker)


class _Modules:
    """What the tracker notes of each module, found by module and never listed: it would go through
    all of them at every operator for their own peaks, which nobody asks for, and a deep model has
    more of both."""

    def __init__(self) -> None:
        self._of = WeakIdKeyDictionary()

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._of

    def __getitem__(self, module: nn.Module) -> Any:
        return self._of[module]

    def __setitem__(self, module: nn.Module, stats: Any) -> None:
        self._of[module] = stats

    def values(self) -> tuple[Any, ...]:
        return ()

    def clear(self) -> None:
        self._of.clear()


def _there(mode: FakeTensorMode) -> list[Tensor]:
    gc.collect()
    return [
        thing for thing in gc.get_objects() if type(thing) is FakeTensor and thing.fake_mode is mode
    ]
