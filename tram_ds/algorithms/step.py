"""One training step: Algorithm 1 of the paper, and every method it is compared with.

(1) a batch B of the training set: what step() is called with
(2) p(. | x, theta_t), and g = grad L_B(theta_t)
(3) d = D(p_ref, p(. | x, theta_t)), p_ref at theta_{t-1} (Eq. 4), at theta_0, or on x + z (Eq. 5)
(4) epsilon = d theta^2 g / ||theta g|| (Eq. 7), of which other rows change radius and direction
(5) theta_t + epsilon
(6) g = grad L_B(theta_t + epsilon)
(7) theta_{t+1} = theta_t - lr g, where the base optimizer makes of g what it does
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.objective import Losses
from tram_ds.algorithms.options import Climb
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines.protocol import Engine, PassMeans
from tram_ds.engines.shards import Lazy
from tram_ds.engines.sums import divisor
from tram_ds.models.passes import ForwardContext

Probe = Callable[[Engine, Lazy], None]  # called at theta + epsilon with the intended epsilon


@dataclass(frozen=True)
class PassResults:
    """What the passes of a step found, in () float64 tensors on the device, the same on every rank:
    reading one synchronises, so read when logging.

    loss: mean task loss of pass 1 per counted target, at theta + epsilon where that is the only
    pass. distance: mean d per position (0 without a region). radius: what the ascent used (0
    without one). perturbed_loss: the loss at theta + epsilon (loss without an ascent). ascent_norm:
    what the ascent divided by (the gradient's without one). grad_norm: of the descent's, before
    clipping. targets: counted in the global batch.
    """

    loss: Tensor
    distance: Tensor
    radius: Tensor
    perturbed_loss: Tensor
    ascent_norm: Tensor
    grad_norm: Tensor
    targets: Tensor

    def finite(self) -> Tensor:
        """() bool: an infinite gradient hides in a division by its norm, so the norm is looked at
        too."""
        return torch.isfinite(self.loss + self.distance + self.perturbed_loss + self.ascent_norm)


@dataclass(frozen=True)
class StepReport(PassResults):
    """One step: what its passes found, and what the base optimizer made of it."""

    lr: float
    skipped: bool


def train_step(
    run: ForwardContext,
    algorithm: Algorithm,
    batches: Sequence[Any],
    share: Tensor | None = None,
    probe: Probe | None = None,
    upcoming: Sequence[Any] | None = None,
) -> StepReport:
    """One step of Algorithm 1 over this rank's micro-batches (1) of the global batch. Collective.

    share: see Losses. upcoming: the next step's micro-batches, for a reference that can look at
    them now instead of remembering theta_t.
    """
    engine, now, then = run.engine, algorithm.at(run.draws.step), algorithm.at(run.draws.step + 1)
    for reference in algorithm.references:  # p_ref(. | x), no gradient
        ahead = upcoming if upcoming is None or then.asks(reference) else ()
        reference.prepare(run, batches if now.asks(reference) else (), ahead)

    climbed = passes(Losses(run, now, share), batches, probe)  # (2) to (6)

    # Before (7): afterwards theta_t is gone.
    # after the passes, which predict from what advance() drops
    for region in algorithm.regions:  # theta_t becomes the next step's theta_{t-1}
        region.advance(engine, climbed.distance)
    # (7) theta_{t+1} = theta_t - lr g
    info = engine.descend(climbed.finite(), climbed.grad_norm, algorithm.pull())
    return StepReport(**vars(climbed), lr=info.lr, skipped=info.skipped)


def passes(losses: Losses, batches: Sequence[Any], probe: Probe | None = None) -> PassResults:
    """(2) to (6), as `accumulation` has it: leaves the gradient at theta + epsilon in the engine.
    Collective."""
    if losses.algorithm.shift is not None:
        return shifted(losses, batches, probe)
    each = losses.algorithm.of(Climb).accumulation == "micro"
    return (climb_per_micro_batch if each else climb)(losses, batches, probe)


def climb(losses: Losses, batches: Sequence[Any], probe: Probe | None = None) -> PassResults:
    """(2) to (6) of Algorithm 1: leaves the gradient at theta + epsilon in the engine, and theta in
    its weights. Collective.

    theta, g, epsilon: fp32 shards of this rank; d, radius, norm: () and global, or this rank's own
    where `perturbation_scope` is the rank.
    """
    run, row = losses.run, losses.algorithm
    engine, ascent, o = run.engine, row.ascent, row.of(Climb)
    alone = o.perturbation_scope == "rank" and ascent is not None
    rule = ascent.weighted if ascent and ascent.linear else None

    first = engine.backward(batches, losses.first(), rule, alone)  # (2) g = grad L(theta_t)
    d, radius = distance_and_radius(row, engine, first)  # (3) d = D(p_ref, p_theta)
    # one pass: its gradient is the descent's, and epsilon is 0
    if ascent is None:
        return PassResults(first.loss, d, radius, first.loss, first.norm, first.norm, first.targets)

    theta, g, f = engine.params(), engine.grads(), ascent.moments(engine)
    if row.fisher_pass:  # Algorithm 2: F from the squares of a gradient at x + z, by another pass
        g = g.realise()  # the next backward overwrites what it is read from
        with run.aside():
            engine.backward(batches, losses.noised(row.fisher_pass), None, alone)
        f = engine.grads()
    # a linear rule's came with pass 1's own reduction
    norm = first.norm if ascent.linear else ascent.norm(theta, g, engine.norm, f)
    epsilon = ascent.epsilon(theta, g, radius, norm, f)  # (4) epsilon = d T^2 g / ||T g||
    until_descent = o.accumulation == "global"  # micro: another pass 1 comes first, at theta_t
    # (5) theta_t + epsilon
    with run.aside(), engine.moved(to=theta + epsilon, until_descent=until_descent):
        if probe:
            probe(engine, epsilon)
        del g, f, epsilon  # they read pass 1's gradient, which would stay beside pass 2's
        second = engine.backward(batches, losses.second())  # (6) g = grad L(theta_t + epsilon)

    found = torch.stack([first.loss, d, radius, norm])
    if alone:  # said of the job: the mean over ranks
        found = engine.data_sum(found) / engine.world_size
    loss, d, radius, norm = found.unbind()
    return PassResults(loss, d, radius, second.loss, norm, second.norm, second.targets)


def shifted(losses: Losses, batches: Sequence[Any], probe: Probe | None = None) -> PassResults:
    """(4) to (6) of a row whose epsilon needs no gradient of this step: one pass, at
    theta + epsilon. Collective."""
    run, row = losses.run, losses.algorithm
    engine, shift = run.engine, row.shift
    assert shift is not None
    epsilon = shift(engine, run.draws)
    # its one pass is the descent's gradient: theta_t needs not come back before
    with engine.moved(to=engine.params() + epsilon, until_descent=True):
        only = engine.backward(batches, losses.first())
        if probe:  # it looks at a gradient, which is there now
            probe(engine, epsilon)
    d, radius = distance_and_radius(row, engine, only)
    return PassResults(only.loss, d, radius, only.loss, only.norm, only.norm, only.targets)


def climb_per_micro_batch(
    losses: Losses, batches: Sequence[Any], probe: Probe | None = None
) -> PassResults:
    """`accumulation: micro`: an epsilon for every micro-batch (over all ranks), and their second
    gradients accumulated.

    One more sharded fp32 copy of the gradient. Collective; leaves the mean gradient in the engine.
    """
    engine, each, total = losses.run.engine, [], None
    for offset, batch in enumerate(batches):
        climbed = climb(losses.at(offset), [batch], probe)
        # a sum again: micro-batches count unequal targets, and a mean of their means is not L's
        g = engine.grads() * climbed.targets
        each, total = [*each, climbed], g.realise() if total is None else total.copy_(total + g)
    targets = torch.stack([c.targets for c in each]).sum()
    counted = divisor(targets)
    assert total is not None
    mean = total * (1.0 / counted)
    # the engine's own gradient is the last micro-batch's
    engine.put_gradient(mean)
    means = {
        name: sum((getattr(c, name) * c.targets for c in each), torch.zeros_like(targets)) / counted
        for name in ("loss", "distance", "radius", "perturbed_loss", "ascent_norm")
    }
    # its own reduction: the norms of the parts do not add up to the norm of their mean
    return PassResults(**means, grad_norm=engine.norm(mean), targets=targets)


def distance_and_radius(row: Algorithm, engine: Engine, first: PassMeans) -> tuple[Tensor, Tensor]:
    """d, and the trust region's scaled d or the constant rho (0 where nothing climbs). () float64
    each. Collective where the whole batch is compared at once (mmd)."""
    if not isinstance(row.radius, TrustRegion):
        # a () tensor as d is: nothing behind this asks which of the two it was
        return first.distance, torch.full_like(first.distance, row.radius)
    d = row.radius.mean(engine, first)
    return d, row.radius.radius(d)
