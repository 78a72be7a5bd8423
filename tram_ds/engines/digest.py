"""The bits of shards in a few numbers, to compare what is too large to be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from tram_ds.engines.shards import Lazy, Shards

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ODD = 0x5851F42D4C957F2D  # Knuth's multiplier of a 64-bit linear congruential generator


def digest(x: Shards | Lazy) -> Tensor:
    """(2,) int64 on the device: of the bits of this rank's pieces, and of bits and places. Equal
    ones are equal bit for bit, by all likelihood (2^-64); a few MiB are copied at a time."""
    found, first = torch.zeros(2, dtype=torch.int64), 0
    for cut in x.cuts():
        for piece in x.part(cut):
            # Bits, not values: a NaN equals itself here, and -0.0 is not 0.0.
            for some in piece.detach().reshape(-1).view(BITS[piece.element_size()]).split(1 << 19):
                bits = some.long()
                # of places too, or two elements that are swapped would leave the sum as it was
                places = torch.arange(first, first + len(some), device=some.device)
                first += len(some)
                mixed = (bits + places) * ODD  # wraps; the shift lets high bits reach low ones
                mixed = (mixed ^ (mixed >> 29)) * ODD
                found = found.to(some.device) + torch.stack([bits.sum(), mixed.sum()])
    return found
