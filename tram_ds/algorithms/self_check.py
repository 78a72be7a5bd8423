"""A start-up check on the first real batch: does this engine perturb, and come back, as the
algorithm says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tram_ds.algorithms.options import Climb
from tram_ds.algorithms.step import objective
from tram_ds.algorithms.stepper import Stepper
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.models.passes import Forward
from tram_ds.runtime.exits import NumericError
from tram_ds.runtime.ranks import agreed

TOLERANCE = 1e-3  # relative, of |epsilon / T| against the radius: fp32 norms of a billion elements


def self_check(stepper: Stepper, batches: Sequence[Any], forward: Forward) -> None:
    """Perturbs by the algorithm's rho (0.5 where the radius is a distance, which is 0 at step 0)
    and comes back.

    Collective; two passes over `batches`; leaves weights, gradient and random state as they were.
    NumericError, on every
    rank alike, says which promise is broken: epsilon moves the loss; its length is the radius;
    theta comes back bit for bit.
    """
    algorithm, engine = stepper.algorithm, stepper.engine
    if algorithm.ascent is None:
        return
    radius = 0.5 if isinstance(algorithm.radius, TrustRegion) else algorithm.radius
    replayed = algorithm.of(Climb).model_copy(update={"pass2_dropout": "replay"})
    plain = replace(
        algorithm,
        parts={**algorithm.parts, Climb: replayed},
        radius=radius,
        penalty=None,
        noised=None,
        fisher_pass=None,
    )
    problems = []
    run = stepper.bind(forward, batches)
    with stepper.quiet(), run.aside():
        make = partial(objective, run, plain, None)
        before = engine.working().realise()
        theta = engine.params().clone()
        still = engine.backward(batches, make()).loss
        g = engine.grads()
        epsilon = algorithm.ascent(
            engine.params(), g, torch.tensor(radius, dtype=torch.float64), engine.norm
        )
        length = (
            float(algorithm.epsilon_length(engine.params(), g, epsilon, engine.norm))
            if algorithm.epsilon_length is not None
            else radius
        )
        with engine.moved(to=engine.params() + epsilon):
            moved = engine.backward(batches, make(descent=True)).loss
        engine.clear()
        if not bool(moved != still):
            problems.append(
                f"the loss did not move under epsilon ({float(still)!r}): the perturbation is not "
                "published"
            )
        if not abs(length - radius) <= TOLERANCE * radius:
            problems.append(f"|epsilon / T| is {length:.6g} where the radius is {radius:g}")
        if not (before.equal(engine.working()) and engine.params().equal(theta)):
            problems.append("theta did not come back bit for bit after the perturbation")
    if agreed(bool(problems)):
        found = "; ".join(problems) or "another rank failed"
        raise NumericError(f"self-check of {algorithm.name} failed on rank {engine.rank}: {found}")
