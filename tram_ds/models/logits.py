"""Predictions, and the distances a forward pass is asked for: of whole logits here, in chunks of
them in models.chunked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tram_ds.models.output import Output, rows_of


class Hidden(NamedTuple):
    """Logits not yet multiplied out: states (N, H) of the last layer, the head's weight (C, H) and
    bias (C,) or None.

    weight None: the head of whoever reads it.
    """

    states: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


Prediction = Tensor | Hidden  # of N positions
NO_GRADIENT = (
    "loss_sum has no gradient: the forward pass ran under no_grad, detached its loss, or depends "
    "on no trainable parameter"
)
# (counted targets, positions) of a micro-batch -> factor
Weight = Callable[[Tensor | int, Tensor | int], Tensor | float]


@dataclass(frozen=True)
class Compare:
    """A distance asked of a forward pass. distance: (reference (n, C), current (n, C)) -> () summed
    over n.

    labelled: count only the positions that carry a target. official: divide by C and by the
    micro-batch's rows.
    weight: the factor of the distance in the objective; None: measured, without a gradient.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    reference: Prediction
    labelled: bool = False
    official: bool = False
    weight: Weight | None = None

    def positions(self, output: Output, n: int) -> Tensor | int:
        """How many of the n positions the distance is summed over."""
        return n if not self.labelled or output.counted is None else output.counted.sum()

    def of(self, reference: Tensor, current: Tensor, counted: Tensor | None, rows: int) -> Tensor:
        """() of one chunk; counted (n,) bool; rows: of the whole micro-batch."""
        if self.labelled and counted is not None:
            reference, current = reference[counted], current[counted]
        with torch.set_grad_enabled(self.weight is not None and torch.is_grad_enabled()):
            return self.distance(reference, current) / (
                current.shape[-1] * rows if self.official else 1
            )


def measured(output: Output, compares: Sequence[Compare]) -> Output:
    """`output`, whose logits are whole, with its objective and the (distance, positions) of every
    comparison."""
    objective, found = output.loss_sum.reshape(()), []
    if torch.is_grad_enabled() and not objective.requires_grad:
        raise ValueError(NO_GRADIENT)
    for compare in compares:
        assert isinstance(compare.reference, Tensor), "whole logits are compared with whole logits"
        logits = rows_of(output)
        if compare.reference.shape != logits.shape:
            raise ValueError(
                f"the reference predicts {tuple(compare.reference.shape)} and the model now "
                f"{tuple(logits.shape)}: forward must give the same positions and classes "
                "each time it is called on a batch"
            )
        n = len(logits)
        positions = compare.positions(output, n)
        distance = compare.of(compare.reference, logits, output.counted, output.rows or n)
        if compare.weight is not None:
            objective = objective + compare.weight(output.count, positions) * distance
        found.append((distance, positions))
    return replace(output, objective=objective, distances=tuple(found))
