"""Perturbations that need no gradient of this step: epsilon is known before the first pass, which
at theta + epsilon is the only one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tram_ds.algorithms.ascent import TINY
from tram_ds.engines.optimizer_state import FIRST_MOMENTS, refuse_without_first_moment
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Lazy
from tram_ds.models.randomness import StepRandomness


class Shift(Protocol):
    """Collective: every rank calls it at the same step."""

    def __call__(self, engine: Engine, draws: StepRandomness) -> Lazy:
        """epsilon of this rank's shards at theta_t, computed part by part when it is read."""
        ...

    def refuse(self, engine: Engine) -> None:
        """ValueError, on every rank alike, for an engine that cannot give it."""
        ...


@dataclass(frozen=True)
class AlongMomentum:
    """epsilon = -rho m / ||m||_2, m the optimizer's first moment before this step; 0 while it has
    none (MSAM, Becker et al. 2024, Algorithm 1: m is the running sum or mean of gradients that the
    step goes against, so this looks ahead along the coming step, as Nesterov's gradient does, but
    by a length of its own). Bias correction and SGD's dampening cancel."""

    rho: float

    def __call__(self, engine: Engine, draws: StepRandomness) -> Lazy:
        theta, moments = engine.params(), engine.moments()
        m = next((moments[name] for name in FIRST_MOMENTS if name in moments), None)
        if m is None:
            if engine.steps:  # an optimizer that does not show its state before its first step
                refuse_without_first_moment(engine.weights.optimizer, set(moments))
            return Lazy(lambda theta: theta * 0.0, theta)
        coefficient = -self.rho / (engine.norm(m) + TINY)
        return Lazy(lambda theta, m: m.wide() * coefficient, theta, m)

    def refuse(self, engine: Engine) -> None:
        refuse_without_first_moment(engine.weights.optimizer)
