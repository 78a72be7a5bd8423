"""A trust region is a (reference, distance) pair: in the radius it makes TRAM; in the loss TRPO,
R3F and MESA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms.distance import Distance
from tram_ds.algorithms.radius import Rule, Scaled, nothing
from tram_ds.algorithms.reference import Reference
from tram_ds.engines.protocol import Engine, PassMeans
from tram_ds.models.logits import Compare, Weight
from tram_ds.models.passes import ForwardContext


@dataclass
class TrustRegion:
    """A reference, a distance, and how their value becomes d.

    distance: (reference (N, C), current (N, C)) -> () summed over N.
    official: divide by C and by the micro-batch's rows as well, as the released code does.
    labelled: count only the positions that carry a target.
    gathered: the distance compares samples (mmd): collect the whole global batch before measuring.
    seen: the rule's memory; part of a checkpoint.
    """

    reference: Reference
    distance: Distance
    rule: Rule = field(default_factory=Scaled)
    minimum: float | None = None
    maximum: float | None = None
    official: bool = False
    labelled: bool = False
    gathered: bool = False
    seen: Tensor | None = None
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def compare(
        self, run: ForwardContext, index: int, batch: Any, weight: Weight | None = None
    ) -> Compare:
        """What to ask of the forward pass of micro-batch `index`. weight: see Compare."""
        distance = self._collect if self.gathered else self.distance
        reference = self.reference.prediction(run, index, batch)
        return Compare(distance, reference, self.labelled, self.official, weight)

    def _collect(self, reference: Tensor, current: Tensor) -> Tensor:
        # no gradient flows into a radius; with the graph every micro-batch's activations stayed
        self._rows.append((reference.detach(), current.detach()))
        return current.new_zeros(())

    def mean(self, engine: Engine, means: PassMeans) -> Tensor:
        """d, () float64: the mean of pass 1, or the gathered batch's. Collective where gathered."""
        if not self.gathered:
            return means.distance
        # reference first, on every rank: each of the two gathers must meet its own
        reference, current = (
            gather_rows(engine, torch.cat(side)) for side in zip(*self._rows, strict=True)
        )
        # the whole batch's logits of this rank, twice: gone before pass 2
        self._rows = []
        return (self.distance(reference, current) / len(current)).double()

    def radius(self, d: Tensor) -> Tensor:
        """() what the rule makes of d, within [minimum, maximum]; rounding below zero counts as
        zero, NaN stays NaN."""
        low = 0.0 if self.minimum is None else self.minimum
        d = d.detach()
        # on the device: comparing d with 0 in Python would wait for pass 1
        return self.rule.radius(d, self._seen(d)).clamp(min=low, max=self.maximum)

    def advance(self, engine: Engine, d: Tensor) -> None:
        """Once a step, before the descent: d, the step's, is seen, and theta_t becomes the next
        step's theta_{t-1}."""
        self.seen = self.rule.after(d.detach(), self._seen(d))
        self.reference.advance(engine)

    def _seen(self, like: Tensor) -> Tensor:
        return nothing(like) if self.seen is None else self.seen.to(like.device)


def gather_rows(engine: Engine, x: Tensor) -> Tensor:
    """(N, C) of every rank, concatenated in rank order on every rank; ranks may hold different N.
    Host-synchronising."""
    # float64: whole up to 2**53, and a type that data_sum reduces anyway
    sizes = torch.zeros(engine.world_size, dtype=torch.float64, device=engine.device)
    sizes[engine.rank] = len(x)
    counts = [int(n) for n in engine.data_sum(sizes).tolist()]
    start = sum(counts[: engine.rank])
    # A sum of zeros and one rank's rows instead of a gather: gather wants equal sizes, and no
    # engine's contract has it.
    rows = torch.zeros(sum(counts), x.shape[-1], dtype=x.dtype, device=x.device)
    rows[start : start + len(x)] = x
    return engine.data_sum(rows)
