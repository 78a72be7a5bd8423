"""A model on the meta device becomes one that trains: memory for what this rank holds, then its
values, read from where they are stored.

So a host never holds more of a model than its ranks' shards. Nothing here is collective.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# (parameter's name, first element of it flattened, into (length,)): overwrites `into` by the stored
# values, cast to its dtype
Fill = Callable[[str, int, Tensor], None]


def materialise(module: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> list[str]:
    """Gives every meta parameter of `module` the memory that `make` allocates; ties are kept.
    Returns their names."""
    meta = {name: p for name, p in module.named_parameters() if p.is_meta}
    # by id: a tied parameter is listed once, and becomes one again wherever it stands
    made = {id(p): nn.Parameter(make(p), p.requires_grad) for p in meta.values()}
    for part in module.modules():
        for name, p in part._parameters.items():
            if id(p) in made:
                # another Parameter: p.data of one on meta takes no memory of a device
                part._parameters[name] = made[id(p)]
    return list(meta)


def fill_whole(module: nn.Module, fill: Fill, device: torch.device, dtype: torch.dtype) -> None:
    """Every parameter whole on `device` in `dtype`, read in chunks: no other copy on the host."""
    for name in materialise(module, lambda p: torch.empty(p.shape, dtype=dtype, device=device)):
        with torch.no_grad():
            fill(name, 0, module.get_parameter(name).view(-1))
