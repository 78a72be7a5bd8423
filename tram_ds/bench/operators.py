"""What a traced step asks of its tensors: answered where they have no values, counted where it is
arithmetic or a collective."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count

from tram_ds.bench.measure import Traffic
from tram_ds.planning.sizes import CPU_ATTENTION

ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Operators(TorchDispatchMode):
    """Entered last, so that every operator comes here first.

    What reads values is answered so that a step goes its usual way: flags are set, tensors are
    equal, what is summed up to tell ranks apart is 0. While `counting`, flops and traffic have what
    the others compute and send. One mode for all of it: each one costs a trace its hop at every
    operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.traffic, self.counting = 0, Traffic(), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            # more than half of all that is asked, each time anew, by autograd above all: no need to
            # go the whole way down
            return FakeTensor.__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        if func is torch.ops.aten.equal.default:
            return True
        if DTensor in types:
            return NotImplemented  # it comes again, as what is done to the shards
        out = func(*args, **(kwargs or {}))
        if self.counting:
            self.traffic.note(func, args)
            self.flops += _flops(func.overloadpacket, args, kwargs or {}, out)
        return out


def _flops(of: Any, args: Any, kwargs: Any, out: Any) -> int:
    """By torch's formulas. torch's own counter follows modules too, and its hooks keep tensors
    alive that a step lets go."""
    if of in CPU_ATTENTION:
        return CPU_ATTENTION[of](*(x.shape for x in args[:3]))
    if of == ATTENTION_BACKWARD:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    return flop_registry[of](*args, **kwargs, out_val=out) if of in flop_registry else 0
