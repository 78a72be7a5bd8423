"""A start-up check on the first real batch: does this engine perturb, and come back, as the
algorithm says?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms import references
from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.ascent import sam, sam_length
from tram_ds.algorithms.objective import Losses
from tram_ds.algorithms.options import SecondMasks
from tram_ds.algorithms.step import distance_and_radius
from tram_ds.algorithms.stepper import Stepper
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines.digest import digest
from tram_ds.models.passes import Forward, ForwardContext
from tram_ds.runtime.exits import NumericError
from tram_ds.runtime.ranks import agreed

TOLERANCE = 1e-3  # relative, of |epsilon / T| against the radius: fp32 norms of a billion elements
LARGE = 0.5  # a radius that moves the loss of any model, where the row's own is 0 or moves nothing
TOO_SMALL = (
    "self-check: at the radius of this batch, {radius:.3g}, epsilon leaves the loss as it is, bit "
    "for bit; at {large:g} it moves it. So the engine perturbs, but {name} is the base optimizer "
    "until its radius grows: see docs/choosing.md"
)


def self_check(stepper: Stepper, batches: Sequence[Any], forward: Forward) -> None:
    """Perturbs by the row's radius on this batch (LARGE where that is 0, as the distance to
    theta_{-1} = theta_0 can be) and comes back.

    Collective; the reference's passes and two or three over `batches`; leaves weights, references,
    gradient and random state as they were. NumericError, on every rank alike, says which promise is
    broken: epsilon moves the loss; its length is the radius; theta comes back bit for bit. A radius
    too small to move the loss, where LARGE does, is a warning.
    """
    algorithm, engine = stepper.algorithm, stepper.engine
    if algorithm.ascent is None:
        return
    problems: list[str] = []
    run, undo = stepper.bind(forward, batches), references.remembered(algorithm)
    try:
        with stepper.quiet(), run.aside():
            radius = _radius(run, algorithm, batches) or LARGE
            # digests, not copies: the check must fit where a step does
            before = digest(engine.working()), digest(engine.params())
            length = _climb(run, algorithm, batches, radius, problems)
            after = digest(engine.working()), digest(engine.params())
            if not all(map(torch.equal, before, after)):
                problems.append("theta did not come back bit for bit after the perturbation")
    finally:
        engine.clear()
        undo()
    if not abs(length - radius) <= TOLERANCE * radius:
        problems.append(f"|epsilon / T| is {length:.6g} where the radius is {radius:g}")
    # every rank raises, or the others would wait in the first step's collectives
    if agreed(bool(problems)):
        found = "; ".join(problems) or "another rank failed"
        raise NumericError(f"self-check of {algorithm.name} failed on rank {engine.rank}: {found}")


def _radius(run: ForwardContext, algorithm: Algorithm, batches: Sequence[Any]) -> float:
    """Of this batch; the same on every rank. Collective."""
    if not isinstance(algorithm.radius, TrustRegion):
        return algorithm.radius
    # a penalty is no part of d, and its reference has not been prepared
    measured = replace(algorithm, penalty=None)
    algorithm.radius.reference.prepare(run, batches, None)
    first = run.engine.backward(batches, Losses(run, measured).first())
    return float(distance_and_radius(measured, run.engine, first)[1])


def _climb(
    run: ForwardContext,
    algorithm: Algorithm,
    batches: Sequence[Any],
    radius: float,
    problems: list[str],
) -> float:
    """|epsilon / T|, after a climb by `radius` that has to move the loss. Collective."""
    engine, ascent = run.engine, algorithm.ascent
    assert ascent is not None
    plain = replace(
        algorithm,
        parts={**algorithm.parts, SecondMasks: SecondMasks(pass2_dropout="replay")},
        radius=radius,
        penalty=None,
        noised=None,
        fisher_pass=None,
        descent=None,
        stored_gradient=False,
    )
    losses = Losses(run, plain)
    loss_at = partial(_loss_at, run, algorithm, losses, batches)
    # compared bit for bit: same batch, masks and shapes, so only moved weights can change it
    still = engine.backward(batches, losses.first()).loss
    moved, length = loss_at(radius)
    if bool(moved != still):
        return length
    engine.backward(batches, losses.first())  # the gradient of theta again
    f = ascent.moments(engine)
    if not bool(ascent.norm(engine.params(), engine.grads(), engine.norm, f)):
        # T g = 0: fresh adapters, where B = 0 and nothing depends on A. The row climbs nowhere
        # then; what is to be known of the engine, a climb along g says as well.
        moved, length = loss_at(radius, along_g=True)
        if bool(moved != still):
            return length
    if isinstance(algorithm.radius, TrustRegion) and bool(loss_at(LARGE)[0] != still):
        if engine.rank == 0:
            text = TOO_SMALL.format(radius=radius, large=LARGE, name=algorithm.name)
            warnings.warn(text, stacklevel=4)
        return length
    problems.append(
        f"the loss did not move under epsilon ({float(still)!r}): the perturbation is not published"
    )
    return length


def _loss_at(
    run: ForwardContext,
    algorithm: Algorithm,
    losses: Losses,
    batches: Sequence[Any],
    size: float,
    along_g: bool = False,
) -> tuple[Tensor, float]:
    """(loss at theta + epsilon of a radius `size`, |epsilon / T|), from the gradient that the
    engine holds, of which `along_g` takes the plain direction. Collective."""
    engine = run.engine
    theta, g = engine.params(), engine.grads()
    assert algorithm.ascent is not None
    climb, measured = (algorithm.ascent, algorithm.epsilon_length)
    if along_g:
        climb, measured = sam(), sam_length
    f = climb.moments(engine)
    epsilon = climb(theta, g, torch.tensor(size, dtype=torch.float64), engine.norm, f)
    length = size if measured is None else float(measured(theta, g, epsilon, engine.norm))
    with engine.moved(to=theta + epsilon):
        return engine.backward(batches, losses.second()).loss, length
