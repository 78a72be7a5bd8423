"""One training step: Algorithm 1 of the paper, and every method it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms.bound import Algorithm
from tram_ds.algorithms.options import BesideAscent, Climb, Penalty, Radius
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines.protocol import Engine, LossFn, PassMeans
from tram_ds.engines.shards import Lazy, Shards
from tram_ds.engines.sums import MicroBatchSums
from tram_ds.models.passes import ForwardContext, Noise

Probe = Callable[[Engine, Lazy], None]  # called at theta + epsilon with the intended epsilon


@dataclass(frozen=True)
class PassResults:
    """What the passes of a step found, () float64 each; StepReport says what they are."""

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
class StepReport:
    """One step in () float64 tensors on the device, the same on every rank: reading one
    synchronises, so read when logging.

    loss: mean task loss of pass 1 per counted target. distance: mean d per position (0 without a
    region).
    radius: what the ascent used (0 without one). perturbed_loss: the loss at theta + epsilon (loss
    without an ascent).
    ascent_norm: what the ascent divided by (the gradient's without one). grad_norm: of the
    descent's, before clipping.
    targets: counted in the global batch.
    """

    loss: Tensor
    distance: Tensor
    radius: Tensor
    perturbed_loss: Tensor
    ascent_norm: Tensor
    targets: Tensor
    grad_norm: Tensor
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
    """One step of Algorithm 1 over this rank's micro-batches of the global batch. Collective.

    share: counted targets per position of the global batch, which weighs a penalty; None: each
    micro-batch's own.
    upcoming: the next step's micro-batches, for a reference that can look at them now instead of
    remembering theta_t.
    """
    engine, now, then = run.engine, algorithm.at(run.draws.step), algorithm.at(run.draws.step + 1)
    for region in algorithm.regions:  # p_ref(. | x), no gradient
        ahead = upcoming if upcoming is None or then.asks(region) else ()
        region.reference.prepare(run, batches if now.asks(region) else (), ahead)

    each = algorithm.of(Climb).accumulation == "micro"
    passes = climb_per_micro_batch if each else climb
    climbed = passes(run, now, batches, share, probe)  # (2) to (6): g = grad L(theta_t + epsilon)

    for region in algorithm.regions:  # theta_t becomes the next step's theta_{t-1}
        region.reference.advance(engine)
    info = engine.descend(climbed.finite(), climbed.grad_norm)  # (7) theta_{t+1} = theta_t - lr g
    return StepReport(**vars(climbed), lr=info.lr, skipped=info.skipped)


def climb(
    run: ForwardContext,
    algorithm: Algorithm,
    batches: Sequence[Any],
    share: Tensor | None,
    probe: Probe | None,
    offset: int = 0,
) -> PassResults:
    """(2) to (6) of Algorithm 1: leaves the gradient at theta + epsilon in the engine, and theta in
    its weights. Collective.

    theta, g, epsilon: fp32 shards of this rank; d, radius: () and global. offset: this rank's index
    of the first batch.
    """
    engine = run.engine
    terms = partial(objective, run, algorithm, share, offset)
    ascent = algorithm.ascent
    weighted = ascent.weighted if ascent and ascent.linear else None
    alone = algorithm.of(Climb).perturbation_scope == "rank" and ascent is not None
    # (2) g = grad L(theta_t), and ||T g||
    first = second = engine.backward(batches, terms(), weighted, alone)
    distance = distance_of(algorithm, engine, first)  # (3) d = D(p_ref, p_theta)
    radius, norm = radius_of(algorithm, distance), Recorded(engine.norm, first.norm)

    if ascent:
        theta, g, f = engine.params(), engine.grads(), None
        # Algorithm 2: F from the squares of a gradient at x + z, by a pass of its own
        if algorithm.fisher_pass:
            g = g.realise()
            with run.aside():
                engine.backward(batches, terms(noise=algorithm.fisher_pass), None, alone)
            f = engine.grads()
        # (4) d T^2 g / ||T g||
        epsilon = ascent(theta, g, radius, norm.known if ascent.linear else norm, f)
        # (5) theta_t + epsilon
        until_descent = algorithm.of(Climb).accumulation == "global"
        with run.aside(), engine.moved(to=theta + epsilon, until_descent=until_descent):
            if probe:
                probe(engine, epsilon)
            del g, f, epsilon  # they read pass 1's gradient, which would stay beside pass 2's
            # (6) g = grad L(theta_t + epsilon)
            second = engine.backward(batches, terms(descent=True))
    found = torch.stack([first.loss, distance, radius, norm.value])
    if alone:  # said of the job: the mean over ranks
        found = engine.data_sum(found) / engine.world_size
    loss, distance, radius, length = found.unbind()
    return PassResults(loss, distance, radius, second.loss, length, second.norm, second.targets)


def climb_per_micro_batch(
    run: ForwardContext,
    algorithm: Algorithm,
    batches: Sequence[Any],
    share: Tensor | None,
    probe: Probe | None,
) -> PassResults:
    """`accumulation: micro`: an epsilon for every micro-batch (over all ranks), and their second
    gradients accumulated.

    One more sharded fp32 copy of the gradient. Collective; leaves the mean gradient in the engine.
    """
    each, total = [], None
    for offset, batch in enumerate(batches):
        climbed = climb(run, algorithm, [batch], share, probe, offset)
        g = run.engine.grads() * climbed.targets
        each, total = [*each, climbed], g.realise() if total is None else total.copy_(total + g)
    targets = torch.stack([c.targets for c in each]).sum()
    assert total is not None
    mean = total * (1.0 / targets.clamp(min=1))
    run.engine.put_gradient(mean)
    means = {
        name: sum((getattr(c, name) * c.targets for c in each), torch.zeros_like(targets))
        / targets.clamp(min=1)
        for name in ("loss", "distance", "radius", "perturbed_loss", "ascent_norm")
    }
    return PassResults(**means, grad_norm=run.engine.norm(mean), targets=targets)


def distance_of(algorithm: Algorithm, engine: Engine, first: PassMeans) -> Tensor:
    """() float64: the mean distance pass 1 measured. Collective where the whole batch is compared
    at once (mmd)."""
    return (
        algorithm.radius.mean(engine, first)
        if isinstance(algorithm.radius, TrustRegion)
        else first.distance
    )


def radius_of(algorithm: Algorithm, distance: Tensor) -> Tensor:
    """() float64: rho, or the trust region's scaled distance; 0 where nothing climbs."""
    if isinstance(algorithm.radius, TrustRegion):
        return algorithm.radius.radius(distance)
    return torch.full_like(distance, algorithm.radius)


@dataclass
class Recorded:
    """A norm that remembers its last value: an infinite gradient must not hide behind a division by
    it."""

    norm: Callable[[Shards | Lazy], Tensor]
    value: Tensor

    def __call__(self, x: Shards | Lazy) -> Tensor:
        self.value = self.norm(x)
        return self.value

    def known(self, _: Shards | Lazy) -> Tensor:
        """What the pass's own reduction brought along."""
        return self.value


def objective(
    run: ForwardContext,
    algorithm: Algorithm,
    share: Tensor | None,
    offset: int = 0,
    *,
    descent: bool = False,
    noise: Noise | None = None,
) -> LossFn:
    """What a pass minimises, per micro-batch: the task loss, plus the weighted penalty; and pass 1
    measures d on the way.

    descent: pass 2, on clean inputs, with its own dropout masks. noise: take this pass on x + z.
    """
    noise = noise or (None if descent else algorithm.noised)
    return lambda index, batch: _terms(run, algorithm, share, descent, noise, offset + index, batch)


def _terms(
    run: ForwardContext,
    algorithm: Algorithm,
    share: Tensor | None,
    descent: bool,
    noise: Noise | None,
    index: int,
    batch: Any,
) -> MicroBatchSums:
    replayed = algorithm.of(Climb).pass2_dropout == "replay"
    masks = "pass_2" if descent and not replayed else "pass_1"
    radius, penalty = algorithm.radius, algorithm.penalty
    asked, apart = [], []
    if (
        penalty
        and run.draws.step >= algorithm.of(Penalty).penalty_start
        and (algorithm.of(BesideAscent).penalty_passes == "both" or not descent)
    ):
        weight = partial(_penalty_weight, algorithm.of(Penalty).weight, share)
        asked.append(penalty.compare(run, index, batch, weight))
    if isinstance(radius, TrustRegion) and not descent:
        (apart if algorithm.of(Radius).student_mode == "eval" else asked).append(
            radius.compare(run, index, batch)
        )

    output = run(index, batch, masks=masks, noise=noise, compares=asked)
    distances = output.distances
    if apart:
        with torch.no_grad(), run.aside():
            distances = run(index, batch, masks=masks, train=False, compares=apart).distances
    assert output.objective is not None
    distance, positions = distances[-1] if distances else (0, 0)
    sums = (output.loss_sum, output.count, distance, positions)
    return MicroBatchSums(
        output.objective, torch.stack([_scalar(x, output.objective) for x in sums])
    )


def _penalty_weight(
    weight: float, share: Tensor | None, count: Tensor | int, positions: Tensor | int
) -> Tensor | float:
    """lambda * counted targets per position, of the global batch or, failing that, of the
    micro-batch."""
    if share is not None:
        return weight * share
    return (
        weight
        * count
        / (positions.clamp(min=1) if isinstance(positions, Tensor) else max(positions, 1))
    )


def _scalar(x: Tensor | int, like: Tensor) -> Tensor:
    """() float64 on the device of `like`, without a copy from the host."""
    if isinstance(x, Tensor):
        return x.detach().to(like.device, torch.float64)
    return torch.full((), float(x), dtype=torch.float64, device=like.device)
