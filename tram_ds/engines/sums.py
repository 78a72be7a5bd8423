"""What a pass adds up: the sums of a micro-batch, and the means of a pass over the whole job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatchSums:
    """What one micro-batch adds to a pass.

    objective: () with its graph, a sum over this micro-batch's counted targets.
    sums: (4,) float64: task loss, counted targets, distance, and the positions the distance is
    summed over.
    """

    objective: Tensor
    sums: Tensor


LossFn = Callable[[int, Any], MicroBatchSums]


@dataclass(frozen=True)
class PassMeans:
    """Global means of one pass, () float64 each, the same on every rank. norm: of its
    mean gradient, or of what a rule makes of that."""

    loss: Tensor
    distance: Tensor
    targets: Tensor
    norm: Tensor

    @staticmethod
    def of(sums: Tensor) -> PassMeans:
        """From the sums of all micro-batches and the squared norm of the summed gradient, (5,),
        over all ranks."""
        # the norm is divided as well: it was measured on the sum's gradient, of which the mean's is
        # a multiple, and so is what a linear rule makes of it
        loss, targets, distance, positions, squares = sums.unbind()
        counted = divisor(targets)
        return PassMeans(
            loss / counted, distance / positions.clamp(min=1), targets, squares.sqrt() / counted
        )


def divisor(targets: Tensor) -> Tensor:
    """A count to divide a sum over targets by: 1 where there is none, so that nothing over nothing
    is 0. Weighted losses count in fractions, so a count below 1 is one."""
    return torch.where(targets == 0, torch.ones_like(targets), targets)
