"""What one forward pass over one micro-batch gives back, whoever wrote the forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Output:
    """One forward pass over one micro-batch.

    loss_sum: () loss summed (not averaged) over the counted targets, with its graph.
    count: how many targets `loss_sum` counts: predicted tokens, or examples.
    logits: (N, C) Tensor with its graph: N valid positions (everything that is not padding), C
    classes or vocabulary entries.
    rows: sequences or examples in the micro-batch; only `kl_norm: official` uses it. None means N.
    counted: (N,) bool, which positions carry a counted target; None means all. Only `positions:
    labelled` uses it.

    A forward pass in chunks has no logits (None) but losses (N,), without a graph. Filled in by
    whoever was asked to compare (tram_ds.models.logits): objective, loss_sum plus the penalties;
    distances: (sum, positions) of each comparison.
    """

    loss_sum: Tensor
    count: Tensor | int
    logits: Any
    rows: int | None = None
    counted: Tensor | None = None
    objective: Tensor | None = None
    distances: tuple[tuple[Tensor, Tensor | int], ...] = ()
    losses: Tensor | None = None
