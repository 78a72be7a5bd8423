"""What a training step of an algorithm costs, read off its row: no second list of algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tram_ds.algorithms.options import BesideAscent, Climb, Radius

if TYPE_CHECKING:
    from tram_ds.algorithms.algorithm import Algorithm

# a backward pass costs two forward passes: one product for the inputs, one for the weights
BACKWARD = 2


@dataclass(frozen=True)
class Cost:
    """Forward passes and, for every forward pass that is differentiated, one backward pass."""

    forward: float
    backward: float

    @property
    def units(self) -> float:
        """In forward passes: 3 for plain training, 6 for SAM, 7 for TRAM."""
        return self.units_of(1.0)

    def units_of(self, trained: float) -> float:
        """The same where a share of the weights trains: a frozen one has no gradient of its own,
        which is half of a backward pass."""
        return self.forward + BACKWARD * self.backward * (1.0 + trained) / 2

    @property
    def relative(self) -> float:
        """In steps of plain training."""
        return self.units / (1 + BACKWARD)


def cost(section: Mapping[str, Any]) -> Cost:
    """The cost of a run's mean step; `section` is a recipe's algorithm section. ValueError for an
    unknown algorithm.

    A penalty is taken to be on from the first step (algorithm.penalty_start = 0).
    """
    from tram_ds.algorithms.bound import algorithm  # lazily: it imports torch

    return mean_cost(algorithm(section))


def mean_cost(row: Algorithm) -> Cost:
    """Of `perturb_every` steps, one of which climbs, divided by their number."""
    every = row.of(Climb).perturb_every
    climbing, flat = cost_of(row), cost_of(row.after_climb())
    forward = flat.forward + (climbing.forward - flat.forward) / every
    return Cost(forward, flat.backward + (climbing.backward - flat.backward) / every)


def cost_of(row: Algorithm) -> Cost:
    """Of a step that climbs, by a row with its options bound; `row.at(step)` is the row of one
    step."""
    # lazily: torch
    from tram_ds.algorithms.reference import NoiseReference, Previous, WeightReference
    from tram_ds.algorithms.trust_region import TrustRegion

    passes = 1 + (row.ascent is not None)
    forward = backward = passes + (row.ascent is not None and row.fisher_pass is not None)
    if isinstance(row.radius, TrustRegion):
        # the reference and, if asked for, the student once more
        forward += 1 + (row.of(Radius).student_mode == "eval")
    if row.penalty is not None:
        reference = row.penalty.reference
        times = passes if row.of(BesideAscent).penalty_passes == "both" else 1
        # logits at other weights are kept for both passes
        forward += 1 if isinstance(reference, WeightReference | Previous) else times
        backward += (
            times if isinstance(reference, NoiseReference) and reference.differentiable else 0
        )
    return Cost(forward, backward)
