"""The squared norm that rides on a pass's own all-reduce: of its gradient, or of a rule of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tram_ds.engines.shards import Lazy, Shards

# (theta, g, g), a part of each -> what is to be measured of g
NormRule = Callable[[Shards, Shards, Shards], Shards]


def squared_norm(
    gradient: Shards,
    theta: Callable[[], Shards],
    norm_rule: NormRule | None,
    device: torch.device,
) -> Tensor:
    """() float64: of this rank's pieces of the summed gradient, or of what the rule makes of it."""
    x = g = wide(gradient)
    if norm_rule is not None:
        # only now: asking for theta may take a snapshot of it
        x = Lazy(lambda theta, g: norm_rule(theta, g, g), theta(), g)
    return x.square_sum(device).to(device)


def wide(shards: Shards) -> Shards | Lazy:
    """fp32, part by part where the pieces are not."""
    # as they are: square_sum then takes all pieces in one kernel, and not part by part
    if all(t.dtype in (torch.float32, torch.float64) for t in shards):
        return shards
    return Lazy(Shards.wide, shards)
