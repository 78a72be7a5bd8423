"""What a step does beyond the base optimizer's: by how much it changes the gradient that is
descended, and what another draw of dropout masks would change.

A part of its own, outside the step: nothing here runs unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tram_ds.algorithms import references
from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.objective import Losses
from tram_ds.algorithms.options import Radius, SecondMasks, WeightNoise, sized_by_rho
from tram_ds.algorithms.probe import EpsilonProbe
from tram_ds.algorithms.reference import NoiseReference
from tram_ds.algorithms.step import passes
from tram_ds.algorithms.stepper import Counts, Stepper, UserForward
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Lazy, Shards

ACTS = 1e-3  # of the scale: below it a step is the base optimizer's
TOO_FAR = 0.5  # of the loss: a gap above it is a step taken from where nothing is known


@dataclass(frozen=True)
class Effect:
    """Of one step, at its theta_t and on its batch; plain numbers, the same on every rank.

    change: ||g' - g|| / ||g||, g the base optimizer's gradient of the task loss, g' what this row
    descends by, under the same dropout masks. cosine: of the two. masks: ||g'' - g|| / ||g||, g''
    the base optimizer's under other dropout masks: 0 of a model without. norm: |epsilon|_2.
    """

    step: int
    loss: float
    loss_gap: float
    distance: float
    radius: float
    norm: float
    change: float
    cosine: float
    masks: float

    @property
    def scale(self) -> float:
        """What a change is measured by: that of other dropout masks, or the gradient itself."""
        return self.masks or 1.0

    @property
    def acts(self) -> bool:
        return self.change >= ACTS * self.scale

    @property
    def too_far(self) -> bool:
        return self.loss_gap > TOO_FAR * abs(self.loss)

    @property
    def verdict(self) -> str:
        """One word or two."""
        return "too far" if self.too_far else "acts" if self.acts else "does not act"

    def words(self, name: str) -> str:
        """One line for people."""
        scale = (
            f"other dropout masks change it by {self.masks:.2g}"
            if self.masks
            else "the model has no dropout to compare with"
        )
        end = {
            "too far": f": {name} climbs too far",
            "acts": "",
            "does not act": f": {name} is the base optimizer so far",
        }[self.verdict]
        return (
            f"step {self.step}: |epsilon| {self.norm:.2g} raises the loss by "
            f"{self.loss_gap / abs(self.loss or 1.0):.2g} of itself and changes the gradient by "
            f"{self.change:.2g} of its length (cos {self.cosine:.4f}); {scale}{end}"
        )


def measure(
    stepper: Stepper,
    micro_batches: Sequence[Any],
    forward: UserForward,
    counts: Counts | None = None,
) -> Effect:
    """The effect that the next step would have on these batches. Collective; synchronises.

    Arguments as Stepper.step. The passes of two base steps and of one of the row's, and a sharded
    fp32 copy of the gradient; leaves weights, references, buffers, gradient and random state as
    they were.
    """
    engine, row = stepper.engine, stepper.algorithm
    engine.begin()
    share = stepper.share(micro_batches, counts)
    undo, run = references.remembered(row), stepper.bind(forward, micro_batches)
    # a row without parts: the task loss alone, by the same forward and masks
    base = Losses(run, Algorithm("base"))
    probe = EpsilonProbe(full=False)
    try:
        with stepper.quiet(), run.aside():
            for region in row.regions:
                region.reference.prepare(run, micro_batches, None)
            loss = engine.backward(micro_batches, base.first()).loss
            # two more passes come, and each overwrites what grads() reads
            g = engine.grads().realise()
            engine.backward(micro_batches, base.second())  # the masks of pass 2
            masks = _between(engine, g, engine.grads())[0]
            replayed = SecondMasks(pass2_dropout="replay")
            same = replace(row, parts={**row.parts, SecondMasks: replayed})
            climbed = passes(Losses(run, same, share), micro_batches, probe)
            change, cosine = _between(engine, g, engine.grads())
    finally:
        engine.abandon()
        undo()
        run.close()
    norm = probe.values.get("perturbation_norm", torch.zeros_like(loss))
    gap = climbed.perturbed_loss - loss if row.perturbs else torch.zeros_like(loss)
    found = [loss, gap, climbed.distance, climbed.radius, norm, change, cosine, masks]
    numbers = torch.stack([x.to(loss.device, torch.float64) for x in found]).tolist()
    return Effect(stepper.steps + 1, *numbers)


def _between(engine: Engine, g: Shards, other: Lazy) -> tuple[Tensor, Tensor]:
    """(||other - g|| / ||g||, cosine), () float64. One all-reduce of four numbers."""
    apart = (other - g).square_sum(engine.device)
    sums = [g.dot(g), other.dot(other), other.dot(g), apart]  # float64 where they are compared
    found = torch.stack([x.to(engine.device) for x in sums])
    if engine.shard_group is not None:
        dist.all_reduce(found, group=engine.shard_group)
    own, others, along, apart = found.unbind()
    # a gradient of zeros: 0 / tiny is 0, where 0 / 0 would be NaN
    tiny = torch.finfo(torch.float64).tiny
    return (apart / own.clamp(min=tiny)).sqrt(), along / (own * others).clamp(min=tiny).sqrt()


def keys(row: Algorithm) -> tuple[str, ...]:
    """The options of `row` that set the size of what it does."""
    found: list[str] = []
    if isinstance(row.radius, TrustRegion):
        found += ["rho" if sized_by_rho(row.of(Radius)) else "radius_scale"]
        found += ["sigma"] if isinstance(row.radius.reference, NoiseReference) else []
    elif row.perturbs:
        found += ["weight_sigma" if WeightNoise in row.parts else "rho"]
    return (*found, "weight") if row.penalty is not None else tuple(found)
