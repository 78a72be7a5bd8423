"""A row of the table with its options bound: what a step needs of an algorithm.

ascent    how the weights climb before the second pass; none: one pass
radius    how far: a constant, or a trust region's distance (TRAM)
penalty   a trust region in the loss (TRPO, R3F, MESA)
shift     where the only pass is taken, by no gradient of this step (MSAM, random weights)
anchor    weights that the descent is pulled to (L2-SP)
noised    pass 1 takes its gradient on x + z (TRAM-Fisher)
descent   pass 2 does (TRAM-x as released)
stored_gradient  pass 2 descends through the dL/dlogits of pass 1 (Functional-SAM)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tram_ds.algorithms.ascent import Ascent, EpsilonLength
from tram_ds.algorithms.options import Climb, Part, Penalty, Pull
from tram_ds.algorithms.reference import NoiseReference, Reference, WeightReference
from tram_ds.algorithms.shift import Shift
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines import pull as move
from tram_ds.models.passes import Noise

P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Algorithm:
    """A row with its options bound; `step.train_step` reads nothing else.

    parts: the row's, by kind, with its options; `of` asks for one.
    ascent: (theta, g, radius, norm) -> epsilon, or None for one pass. radius: rho, or the region
    whose distance it is.
    penalty: the region whose distance is in the loss. anchor: the weights that the descent is
    pulled to, measured by no region.
    epsilon_length: of an epsilon in the units of the radius, for the self-check; None where nothing
    is promised.
    shift: what moves the weights before the only pass.
    noised: pass 1 runs on x + z. fisher_pass: a second gradient, on x + z, estimates the Fisher
    diagonal (Algorithm 2). descent: pass 2 runs on x + z, below which nothing is learned.
    stored_gradient: pass 2 takes the model's Jacobian at theta + epsilon, and the loss's gradient
    with respect to its logits from pass 1.
    """

    name: str
    parts: Mapping[type[Part], Part] = field(default_factory=dict)
    ascent: Ascent | None = None
    epsilon_length: EpsilonLength | None = None
    radius: float | TrustRegion = 0.0
    penalty: TrustRegion | None = None
    anchor: WeightReference | None = None
    shift: Shift | None = None
    noised: Noise | None = None
    fisher_pass: Noise | None = None
    descent: Noise | None = None
    stored_gradient: bool = False

    def of(self, kind: type[P]) -> P:
        """A part's options; of a part that the row does not have, the defaults, which change
        nothing."""
        # not .get(kind, kind()): that would build the defaults at every call
        found = self.parts[kind] if kind in self.parts else kind()
        assert isinstance(found, kind)
        return found

    @property
    def regions(self) -> list[TrustRegion]:
        return [r for r in (self.radius, self.penalty) if isinstance(r, TrustRegion)]

    @property
    def references(self) -> list[Reference]:
        """All that is remembered from step to step."""
        return [*(r.reference for r in self.regions), *([self.anchor] if self.anchor else [])]

    @property
    def through_reference(self) -> bool:
        """Whether a gradient flows through a reference's forward pass, too."""
        noisy = [r.reference for r in self.regions if isinstance(r.reference, NoiseReference)]
        return any(reference.differentiable for reference in noisy)

    @property
    def perturbs(self) -> bool:
        """Whether a pass of a step is at theta + epsilon."""
        return self.ascent is not None or self.shift is not None

    def asks(self, reference: Reference) -> bool:
        """Whether this algorithm measures the distance to what `reference` predicts."""
        return any(region.reference is reference for region in self.regions)

    def pull(self) -> move.Pull | None:
        """What the descent is pulled to, once the anchor is prepared."""
        if self.anchor is None:
            return None
        assert self.anchor.weights is not None  # prepare() ran at the step's start
        return move.Pull(self.anchor.weights, self.of(Pull).pull)

    def at(self, step: int) -> Algorithm:
        """The algorithm of one step: itself, or without its ascent where `perturb_every` leaves
        that out, or its penalty before `penalty_start`."""
        # from the step's number alone, so that a resume climbs at the same steps
        climbs = step % self.of(Climb).perturb_every == 0
        started = self.penalty is None or step >= self.of(Penalty).penalty_start
        row = self if started else replace(self, penalty=None)
        if climbs:
            return row
        return replace(
            row,
            ascent=None,
            epsilon_length=None,
            radius=0.0,
            noised=None,
            descent=None,
            stored_gradient=False,
        )

    def after_climb(self) -> Algorithm:
        """That of a step after one that climbs, once a penalty has started."""
        return self.at(self.of(Climb).perturb_every * self.of(Penalty).penalty_start + 1)
