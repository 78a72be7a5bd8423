"""What each pass of a step minimises, per micro-batch: the task loss plus lambda d. Pass 1 measures
the d of the radius on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.options import BesideAscent, Penalty, Radius, SecondMasks
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines.sums import LossFn, MicroBatchSums
from tram_ds.models.functional import Head, LogitGradient
from tram_ds.models.logits import Compare
from tram_ds.models.passes import ForwardContext, Noise


@dataclass(frozen=True)
class Losses:
    """The objectives of one step's passes.

    share: counted targets per position of the global batch, which weighs a penalty; None: each
    micro-batch's own. offset: this rank's index of the first micro-batch of a pass. held:
    dL/dlogits of pass 1, by micro-batch, until pass 2 takes it (stored_gradient). head: theirs.
    """

    run: ForwardContext
    algorithm: Algorithm
    share: Tensor | None = None
    offset: int = 0
    held: dict[int, LogitGradient] = field(default_factory=dict)
    head: Head = field(default_factory=Head)

    def at(self, offset: int) -> Losses:
        """The same for passes that begin at micro-batch `offset`."""
        return replace(self, offset=offset)

    def first(self) -> LossFn:
        """L(theta), on x + z where the row wants that."""
        return self.noised(self.algorithm.noised)

    def noised(self, noise: Noise | None) -> LossFn:
        """L(theta) on x + z, with the dropout masks of pass 1."""

        def sums(index: int, batch: Any) -> MicroBatchSums:
            index += self.offset
            penalties = self._penalties(index, batch, descent=False)
            distances = self._distances(index, batch)
            held = None
            if self.algorithm.stored_gradient:
                held = self.held[index] = LogitGradient(self.head)
            return self._sums(index, batch, penalties, distances, noise, held=held)

        return sums

    def second(self) -> LossFn:
        """L(theta + epsilon): clean inputs unless the row descends on x + z, dropout masks of its
        own, and no d of a radius. With a stored dL/dlogits, which first() has left, the masks that
        it is of."""
        row = self.algorithm
        replayed = row.stored_gradient or row.of(SecondMasks).pass2_dropout == "replay"
        masks = "pass_1" if replayed else "pass_2"

        def sums(index: int, batch: Any) -> MicroBatchSums:
            index += self.offset
            penalties = self._penalties(index, batch, descent=True)
            # pop: freed as pass 2 goes along, whose activations need the memory
            held = self.held.pop(index) if row.stored_gradient else None
            return self._sums(
                index, batch, penalties, (), row.descent, masks, fixed=True, held=held
            )

        return sums

    def _penalties(self, index: int, batch: Any, descent: bool) -> list[Compare]:
        """The penalty where this pass has one."""
        row, penalty = self.algorithm, self.algorithm.penalty
        if penalty is None:
            return []
        if descent and row.of(BesideAscent).penalty_passes == "ascent":
            return []
        return [penalty.compare(self.run, index, batch, self._weight)]

    def _weight(self, count: Tensor | int, positions: Tensor | int) -> Tensor | float:
        """lambda times counted targets per position: of a sum over positions it makes one over
        targets."""
        weight = self.algorithm.of(Penalty).weight
        if self.share is not None:
            return weight * self.share
        some = positions.clamp(min=1) if isinstance(positions, Tensor) else max(positions, 1)
        return weight * count / some

    def _distances(self, index: int, batch: Any) -> list[Compare]:
        """The d of a radius that is a trust region's."""
        radius = self.algorithm.radius
        if not isinstance(radius, TrustRegion):
            return []
        return [radius.compare(self.run, index, batch)]

    def _sums(
        self,
        index: int,
        batch: Any,
        penalties: Sequence[Compare],
        distances: Sequence[Compare] = (),
        noise: Noise | None = None,
        masks: str = "pass_1",
        fixed: bool = False,
        held: LogitGradient | None = None,
    ) -> MicroBatchSums:
        """One forward pass; of the row's d, one more without dropout where it asks for that."""
        run = self.run
        apart = bool(distances) and self.algorithm.of(Radius).student_mode == "eval"
        # apart: the objective's pass has dropout, and d is asked of one without
        compares = [*penalties] if apart else [*penalties, *distances]
        output = run(
            index, batch, masks=masks, noise=noise, fixed=fixed, compares=compares, held=held
        )
        measured = output.distances
        if apart:
            # running statistics move by the pass with dropout alone
            with torch.no_grad(), run.aside():
                measured = run(index, batch, masks=masks, train=False, compares=distances).distances
        assert output.objective is not None
        # without a radius to measure, the penalty's
        distance, positions = measured[-1] if measured else (0, 0)
        sums = (output.loss_sum, output.count, distance, positions)
        return MicroBatchSums(
            output.objective, torch.stack([_scalar(x, output.objective) for x in sums])
        )


def _scalar(x: Tensor | int, like: Tensor) -> Tensor:
    """() float64 on the device of `like`, without a copy from the host."""
    if isinstance(x, Tensor):
        return x.detach().to(like.device, torch.float64)
    return torch.full((), float(x), dtype=torch.float64, device=like.device)
