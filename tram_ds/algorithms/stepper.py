"""Algorithm 1 for people with their own loop: wrap what you train, then call step() where you
called backward and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms import references
from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.bound import algorithm as bound
from tram_ds.algorithms.options import Adaptive, Climb, Gradient
from tram_ds.algorithms.said import Said
from tram_ds.algorithms.step import Probe, StepReport, train_step
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines import choose
from tram_ds.engines.layout import kinds_of, parameter_shapes
from tram_ds.engines.optimizer_refusals import refuse_without_second_moment
from tram_ds.engines.optimizer_state import Extras
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards
from tram_ds.models.chunked import Chunked
from tram_ds.models.output import Output, checked
from tram_ds.models.passes import ForwardContext
from tram_ds.models.randomness import StepRandomness

# (model, batch) -> Output, or (loss_sum, count, logits); or a Chunked
UserForward = Callable[[Any, Any], Any]
Counts = Callable[[Any], tuple[int, int]]  # batch -> (counted targets, valid positions)


@dataclass
class State:
    """What a checkpoint holds beside the data position: every Shards has the layout of `params`,
    whatever the engine."""

    step: int
    base_steps: int
    params: Shards
    moments: dict[str, Shards]
    references: dict[str, Shards]
    extras: Extras = field(default_factory=Extras)
    radius: list[float] | None = None  # what the rule of the radius has seen


@dataclass
class Stepper:
    """train_step with its counters: steps taken, and the seed all randomness is a function of.

    recovers: a step that raises leaves everything as it was, references too: these then live one
    step longer. For loops that go on after an exception, as people's do.
    """

    engine: Engine
    algorithm: Algorithm
    seed: int = 0
    steps: int = 0
    # inside step(), or after one that raised: references may be ahead of the weights
    unfinished: bool = False
    recovers: bool = False
    said: Said = field(default_factory=Said)

    def __post_init__(self) -> None:
        by_rank = self.algorithm.of(Climb).perturbation_scope == "rank"
        if by_rank and not self.engine.whole_gradients:
            raise ValueError(
                "perturbation_scope: rank needs every rank to have a whole gradient of its own, "
                "which a sharded engine never "
                "has: use replicated weights (engine: replicated, or DistributedDataParallel)"
            )
        if self.algorithm.shift is not None:
            self.algorithm.shift.refuse(self.engine)
        if self.algorithm.of(Gradient).precondition:
            refuse_without_second_moment(self.engine.weights.optimizer)
        if self.algorithm.of(Adaptive).adaptive_filter == "norms" and not _norms(self.engine):
            raise ValueError(
                "algorithm.adaptive_filter = norms: the model trains no normalisation layer, so "
                "nothing would climb: set it to all or matrices"
            )

    def step(
        self,
        micro_batches: Sequence[Any],
        forward: UserForward,
        counts: Counts | None = None,
        probe: Probe | None = None,
        upcoming: Sequence[Any] | None = None,
    ) -> StepReport:
        """One step over this rank's micro-batches, which are already on the device. Collective:
        same number on every rank.

        forward(model, batch) -> Output, or the tuple (loss_sum, count, logits (N, C)); called
        several times per batch. Of a causal language model it may be a
        tram_ds.models.chunked.Chunked, which never holds its logits.
        counts: batch -> (targets, positions) from its tensors alone. Only the penalty methods use
        it: without it their penalty is weighed by each micro-batch's own targets per position,
        which is the same wherever that is constant.
        upcoming: the next call's micro_batches, if they are at hand: methods whose reference is
        theta_{t-1} then look at them now, at theta_t, and keep no copy of the weights. Leave it out
        in the step before state() is asked for. The global random state of the caller is left as it
        was. A step that raises leaves weights, buffers and counters as they were.
        """
        if not micro_batches:
            raise ValueError("step() needs at least one micro-batch on every rank")
        self._follow()
        if self.engine.rank == 0:
            self.said.start(self.algorithm, self.engine.module)
        # until the step is over: a checkpoint of what is half moved would resume as something else
        self.unfinished = True
        share = self.share(micro_batches, counts)
        run = self.bind(forward, micro_batches)
        # before pass 1, which moves running statistics
        buffers = run.state.take()
        undo = references.remembered(self.algorithm) if self.recovers else None
        try:
            with self.quiet():
                report = train_step(run, self.algorithm, micro_batches, share, probe, upcoming)
        except BaseException:
            self.engine.abandon()
            run.state.put_back(buffers)
            if undo is not None:
                undo()
                self.unfinished = False
            raise
        finally:
            run.close()
        # the weights did not move, and neither may running statistics that a NaN has passed through
        if report.skipped:
            run.state.put_back(buffers)
        if self.engine.rank == 0:
            self.said.note(self.steps, self.algorithm.at(self.steps), report)
        self.steps, self.unfinished = self.steps + 1, False
        return report

    def _follow(self) -> None:
        """theta is what trains now: a layer unfrozen, a head replaced since the last step."""
        before = {span.name for span in self.engine.layout}
        if self.engine.begin():
            references.follow(self.algorithm, self.engine, before)

    def quiet(self) -> AbstractContextManager[None]:
        """Inside, torch's global random state may change; afterwards it is what it was."""
        return torch.random.fork_rng(devices=_devices(self.engine.device))

    def bind(self, forward: UserForward, batches: Sequence[Any]) -> ForwardContext:
        """The forward pass of the next step; a user's plain tuple becomes an Output."""
        # every rank has as many, so this is its first one's place in the global batch
        draws = StepRandomness(self.seed, self.steps, self.engine.rank * len(batches))
        if isinstance(forward, Chunked):
            return ForwardContext.over(self.engine, forward, draws)

        def output(model: Any, batch: Any) -> Output:
            return checked(forward(model, batch))

        return ForwardContext.over(self.engine, output, draws)

    def share(self, batches: Sequence[Any], counts: Counts | None) -> Tensor | None:
        """Counted targets per position of the global batch; one small all-reduce, only for penalty
        methods."""
        penalty = self.algorithm.penalty
        if penalty is None or counts is None:
            return None
        local = (
            # summed on the host and sent once
            torch.tensor([counts(b) for b in batches], dtype=torch.float64)
            .sum(0)
            .to(self.engine.device)
        )
        targets, positions = self.engine.data_sum(local)
        return torch.ones_like(targets) if penalty.labelled else targets / positions.clamp(min=1)

    @property
    def restorable(self) -> bool:
        """Whether state() can be asked for: not after a step that looked ahead at `upcoming`."""
        return all(reference.restorable() for reference in self.algorithm.references)

    def state(self) -> State:
        """Live tensors, between two steps: copy or write them before the next."""
        weights = {
            k: v for reference in self.algorithm.references for k, v in reference.state().items()
        }
        return State(
            self.steps,
            self.engine.steps,
            self.engine.weights.masters(),
            self.engine.moments(),
            weights,
            self.engine.extras(),
            self._seen(),
        )

    def _seen(self) -> list[float] | None:
        region = self.algorithm.radius
        seen = region.seen if isinstance(region, TrustRegion) else None
        return None if seen is None else seen.tolist()

    def load(self, state: State) -> None:
        """Continues from `state`, whose Shards have this engine's layout. Collective.

        KeyError where a reference is missing after the first step: without it the next step would
        silently take d = 0.
        """
        self.engine.load(state.params, state.moments, state.base_steps, state.extras)
        for reference in self.algorithm.references:
            # step 0 has nothing to continue: the references start from the weights of now
            names = reference.names() if state.step else ()
            reference.load({name: state.references[name] for name in names})
        if isinstance(self.algorithm.radius, TrustRegion):
            seen = state.radius
            self.algorithm.radius.seen = (
                None if seen is None else torch.tensor(seen, dtype=torch.float64)
            )
        self.steps, self.unfinished = state.step, False


def wrap(
    engine_or_model: Any,
    optimizer: torch.optim.Optimizer | None = None,
    algorithm: str | Mapping[str, Any] = "tram_prev",
    *,
    seed: int = 0,
    clip_norm: float | None = None,
    schedule: Callable[[int], float] | None = None,
    **options: Any,
) -> Stepper:
    """A Stepper around what you already have.

    engine_or_model: what deepspeed.initialize returned (any ZeRO stage), a fully_shard'ed model
        (FSDP2), a DistributedDataParallel model, or a plain module.
    optimizer: a torch optimizer over its parameters; DeepSpeed engines bring their own.
    algorithm: a row of ALGORITHMS, or it and options as in a recipe: {"name": "tram_x", "sigma":
        0.2}; `options` are more of these. recipes/README.md has them all, with the rows that read
        each; `noise_site` may also be a module.
    clip_norm: global 2-norm the second gradient is clipped to. schedule: base step -> factor on
        every group's lr; None leaves the learning rate to you.
    ValueError names what cannot be trained right, and the way out: docs/wrap.md has the list.
    Collective where there are several ranks.
    """
    rule = bound(algorithm, **options)
    engine = choose.over(engine_or_model, optimizer, clip_norm, schedule)
    return Stepper(engine, rule, seed, recovers=True)


def _norms(engine: Engine) -> list[str]:
    """Trained parameters of normalisation layers, on whichever rank they lie."""
    kinds = kinds_of(engine.module)
    return [name for name in parameter_shapes(engine.module) if kinds.get(name) == "norm"]


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
