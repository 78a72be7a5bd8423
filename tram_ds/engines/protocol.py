"""An engine: theta, its gradient and its move. One object for every sharding, over the `Weights` of
one.

`Weights` is what shardings do differently, and each of engines/replicated.py, fsdp2.py and zero.py
is one; what they do alike stands here, once.

Communication contract. Every rank of the job calls every method in the same order with the same
number of micro-batches. `norm`, `data_sum`, `backward`, `moved` and `descend` are
collective; `params`, `grads` and `working` are local. A pass has one small all-reduce: its sums,
the squared norm of its gradient and, where ranks hold the same weights, a digest of a piece of
them travel together. Everything a method returns is identical on all ranks where it is a scalar,
and rank-local where it is Shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tram_ds.engines import norms, replicas
from tram_ds.engines.norms import NormRule
from tram_ds.engines.optimizer_state import Extras, optimizer_steps
from tram_ds.engines.pull import Pull
from tram_ds.engines.reading import Reading
from tram_ds.engines.schedule import Schedule, set_rates
from tram_ds.engines.shards import Lazy, Shards, Span
from tram_ds.engines.sums import LossFn, PassMeans, divisor
from tram_ds.engines.weights import Weights


@dataclass(frozen=True)
class StepInfo:
    """What `descend` did."""

    lr: float
    skipped: bool


class Engine:
    """What the step and everything around it know of the weights."""

    def __init__(
        self,
        weights: Weights,
        *,
        clip_norm: float | None = None,
        schedule: Schedule | None = None,
    ):
        self.weights, self.clip_norm, self.schedule = weights, clip_norm, schedule
        self.model, self.module = weights.model, weights.module
        self.device, self.dtype = weights.device, weights.dtype
        self.rank, self.world_size = weights.rank, weights.world_size
        self.shard_group, self.writes = weights.shard_group, weights.writes
        self.replicas, self.whole_gradients = weights.replicas, weights.whole_gradients
        self.steps = optimizer_steps(weights.optimizer)  # base-optimizer steps taken
        # inside moved(): the working copy is not theta_t, and nothing may be saved or loaded
        self.perturbed = False
        # what the engine's gradient, a sum, is divided by: 1 where it is a mean already
        self.targets = torch.ones((), dtype=torch.float64, device=self.device)
        self._theta: Shards | None = None
        self._reading: Reading | None = None
        self._drift = replicas.Drift(weights)

    @property
    def layout(self) -> tuple[Span, ...]:
        """Of params(): one Span per piece."""
        return self.weights.masters().layout

    def begin(self) -> bool:
        """At the start of a step: theta_t is what stands in the weights now, whoever put it there.

        True where the trained parameters have changed since the last step; ValueError where that
        cannot be followed.
        """
        self._theta, self.perturbed = None, False
        self._drift.begin()
        return self.weights.follow()

    def abandon(self) -> None:
        """After a step that raised: theta_t is back, and the gradient is gone."""
        if self._theta is not None:
            self.weights.write(self._theta)
        elif self.perturbed:
            self.weights.restore(self.params())
        self.clear()
        self._theta, self.perturbed = None, False

    def params(self, keep: bool = False) -> Shards:
        """theta_t of this rank, fp32 masters. Valid until descend(), or for good with `keep`; never
        written by the caller.

        A snapshot, taken once a step, where the masters are also the working copy that `moved`
        overwrites; the masters themselves where they are apart from it.
        """
        live = self.weights.masters()
        if self.weights.separate:
            return live.clone() if keep else live
        if self._theta is None:
            self._theta = live.clone()
        return self._theta

    def reading(self) -> Reading:
        """theta_t, between two steps, for another thread to read while the next step begins;
        moments() are read live meanwhile. See Reading: descend() and load() wait for its close().
        """
        assert not self.perturbed, "the masters are theta_t between two steps alone"
        self._after_reading()
        self._reading = Reading(self.weights.masters())
        return self._reading

    def _after_reading(self) -> None:
        if self._reading is not None:
            self._reading.wait()
            self._reading = None

    def grads(self) -> Lazy:
        """The last pass's gradient: reduced, mean over the global batch, fp32, unclipped; layout as
        params().

        Read from the engine's own buffers: gone with the next backward(); realise() what must last.
        """
        factor = 1.0 / self.targets
        # widened before it is divided: bf16 would round the quotient
        return Lazy(lambda g: g.wide() * factor, self.weights.gradient())

    def put_gradient(self, g: Shards | Lazy) -> None:
        """Makes `g`, a mean over the global batch, the gradient that descend() uses, instead of the
        last pass's."""
        self.weights.put(g)
        self.targets = torch.ones_like(self.targets)

    def working(self) -> Lazy:
        """What the next forward pass reads of this rank's spans, in the working copy's precision,
        as fp32."""
        return self.weights.working()

    def norm(self, x: Shards | Lazy) -> Tensor:
        """() float64: global 2-norm, every parameter element counted once in the job.
        Collective."""
        # float64: the squares of billions of elements, added up in fp32, lose their last digits
        # to the device: offloaded shards sum on the CPU, and an NCCL group takes no tensor of it
        total = x.square_sum(self.device).to(self.device)
        if self.shard_group is not None:
            dist.all_reduce(total, group=self.shard_group)
        return total.sqrt()

    def data_sum(self, x: Tensor) -> Tensor:
        """The sum of x over the data-parallel ranks, as a new tensor. Collective."""
        x = x.detach().clone()  # all_reduce writes into what it is given, which is the caller's
        if self.world_size > 1:
            dist.all_reduce(x, group=self.weights.group)
        return x

    @contextmanager
    def moved(self, to: Shards | Lazy, until_descent: bool = False) -> Iterator[None]:
        """Working copy := `to`; on exit, also by an exception, theta_t is back bit for bit.
        Collective.

        until_descent: the caller promises that no forward pass comes before descend(), which
        overwrites the working copy anyway: where it is apart from the masters, a normal exit then
        leaves it, `perturbed`, and saves a gather.
        """
        theta, self.perturbed = self.params(), True
        if self._reading is not None and not self.weights.separate:
            # the writer's thread reads the masters, which the move is about to overwrite
            self._reading.keep(theta)
        self._write(to)
        del to  # it may hold the gradient it was computed from
        try:
            yield
        # not Exception alone: a signal's must not leave theta + epsilon in the weights either
        except BaseException:
            self._restore(theta)
            raise
        if not (until_descent and self.weights.separate):
            self._restore(theta)

    def _write(self, values: Shards | Lazy) -> None:
        self.weights.write(values)

    def _restore(self, theta: Shards) -> None:
        self.weights.restore(theta)
        self.perturbed = False

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context of every forward pass."""
        return self.weights.autocast()

    def clear(self) -> None:
        """Drops the gradient."""
        self.weights.clear()

    def backward_one(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradient."""
        self.weights.backward(loss)

    def backward(
        self,
        batches: Sequence[Any],
        objective: LossFn,
        norm_rule: NormRule | None = None,
        local_only: bool = False,
    ) -> PassMeans:
        """Clears the gradient, runs forward and backward over every micro-batch, reduces.
        Collective.

        norm_rule: an element-wise rule, linear in g, whose norm is to be measured; None: g itself.
        local_only: nothing is reduced; gradient and PassMeans are this rank's own. Only where
        `whole_gradients`.

        Gradients are of sums; engines average over ranks, so the loss is multiplied by world_size.
        The division by the global count of targets happens once, after the single reduction that
        also brings the count and the norm: no mean of means.
        """
        # a rank of a sharded engine holds no gradient of its own
        assert self.whole_gradients or not local_only
        self.clear()  # or this pass's gradient adds to the last one's
        # float64: in fp32 a count is not whole any more beyond 2**24 tokens
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            self.weights.ahead(index == len(batches) - 1, local_only)
            terms = objective(index, batch)
            self.backward_one(terms.objective * (1 if local_only else self.world_size))
            sums += terms.sums
        # The sharding's own reduction has happened in the last micro-batch's backward, so it stands
        # before this all-reduce on every rank. What replicas hold alike is counted once.
        squares = norms.squared_norm(
            self.weights.gradient(), self.params, norm_rule, self.device
        ) / (1 if local_only else self.replicas)
        found = torch.cat([sums, squares[None]])
        means = PassMeans.of(self._drift.reduced(found, local_only, self.data_sum, self.steps))
        self.targets = divisor(means.targets)
        return means

    def descend(self, finite: Tensor, grad_norm: Tensor, pull: Pull | None = None) -> StepInfo:
        """Clips, takes one base-optimizer step, publishes; leaves weights and moments untouched and
        says so if not finite.

        finite: () bool, the same on every rank: whether the passes before were. grad_norm: () of
        the gradient to descend by. pull: see Pull. One host synchronisation, to decide whether the
        step is taken. RuntimeError where replicas do not hold the same weights any more.
        """
        gradient = self.weights.gradient()
        lr = set_rates(self.weights.optimizer, self.schedule, self.steps)
        share = 0.0 if pull is None else pull.share(self.weights.optimizer.param_groups)
        finite = finite.to(grad_norm.device) & torch.isfinite(grad_norm)
        finite, alike = torch.stack([finite, self._drift.alike.to(finite.device)]).tolist()
        if not alike:
            raise RuntimeError(replicas.DRIFTED)
        # of a skipped step too: what follows one, a validation or the next save, may use the
        # process group that the writer gathers in
        self._after_reading()
        if finite:
            factor = 1.0 / self.targets
            if self.clip_norm is not None:
                # 1e-6 as in torch.nn.utils.clip_grad_norm_
                factor = factor * (self.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            gradient.scale_(factor)  # in place: the optimizer reads this memory
            if pull is not None and share:
                # the masters are theta_t here: a move is undone, or was of the working copy alone
                pull.apply(self.weights.masters(), share)
            self.weights.step()  # has published theta_{t+1} over theta_t + epsilon
            self.steps += 1  # not of a skipped one: the schedule goes by steps taken
        elif self.perturbed:
            # no step overwrites what moved() left there for the descent
            self.weights.restore(self.params())
        self.clear()
        self._theta, self.perturbed = None, False
        self._drift.begin()
        return StepInfo(lr, skipped=not finite)

    def moments(self) -> dict[str, Shards]:
        """The base optimizer's per-parameter state by its torch name (exp_avg, ...), live, layout
        as params()."""
        return self.weights.moments()

    def extras(self) -> Extras:
        """What else the base optimizer remembers: see Extras."""
        return self.weights.extras(self.steps)

    def load(
        self,
        params: Shards,
        moments: dict[str, Shards],
        steps: int,
        extras: Extras | None = None,
    ) -> None:
        """Overwrites masters, the optimizer's state and the count of base steps, and publishes.
        Collective."""
        self._after_reading()
        self._theta, self.steps = None, steps
        self.weights.load(params, moments, steps, extras or Extras())
