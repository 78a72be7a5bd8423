"""What one forward pass over one micro-batch gives back, whoever wrote the forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Output:
    """One forward pass over one micro-batch.

    loss_sum: () loss summed (not averaged) over the counted targets, with its graph.
    count: how many targets `loss_sum` counts: predicted tokens, or examples; the sum of their
    weights where the loss is weighted.
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


def checked(found: Any) -> Output:
    """What a user's forward pass returned, as an Output whose logits are (N, C): leading
    dimensions, such as (B, T), become one.

    ValueError, by name, where loss or count are not what Output says. Reads shapes only: nothing
    waits for the device.
    """
    if not isinstance(found, Output):
        if not isinstance(found, tuple | list) or len(found) != 3:
            raise ValueError(
                f"forward returned a {type(found).__name__}: return (loss_sum, count, logits) or "
                "an Output"
            )
        found = Output(*found)
    _check_loss(found.loss_sum)
    _check_count(found.count)
    logits, counted = found.logits, found.counted
    if isinstance(logits, Tensor) and logits.dim() > 2:
        logits = logits.flatten(0, -2)
    if counted is not None and counted.dim() > 1:
        counted = counted.flatten()
    return replace(found, logits=logits, counted=counted)


def rows_of(found: Output) -> Tensor:
    """The logits (N, C) of a pass that is compared with another. ValueError where there is nothing
    to compare."""
    logits = found.logits
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"forward returned logits {shape}: a distance needs real logits (N, C), one row of C "
            "classes per position (of one output z, torch.stack([0 * z, z], -1))"
        )
    if found.counted is not None and len(found.counted) != len(logits):
        raise ValueError(
            f"forward returned counted of {len(found.counted)} for {len(logits)} rows of logits"
        )
    return logits


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"forward returned loss_sum {shape}: return one number, the losses summed (.sum(), "
            "reduction='sum') over the counted targets"
        )


def _check_count(count: Any) -> None:
    if isinstance(count, Tensor):
        good = count.numel() == 1 and not count.is_complex()
    else:
        good = isinstance(count, Real) and float(count) >= 0
    if not good:
        shape = tuple(count.shape) if isinstance(count, Tensor) else repr(count)
        raise ValueError(
            f"forward returned count {shape}: return how many targets loss_sum counts, or the sum "
            "of their weights"
        )
