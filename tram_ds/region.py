"""A trust region is a (reference, distance) pair: in the radius it makes TRAM; in the loss TRPO, R3F and MESA.

A reference is a prior prediction p_ref(. | x) of the same batch: of the previous step's weights, of the pre-trained ones, of
their moving average (all three: evaluate the model at other weights, then come back), or of the current weights on x + z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tram_ds.distance import Distance
from tram_ds.engines.base import Engine, Means
from tram_ds.forward import Noise, Pass
from tram_ds.shards import Shards
from tram_ds.tasks.base import Output

Mode = Literal["eval", "train", "paired"]  # paired: train mode with the dropout masks of pass 1


class Reference(Protocol):
    """Collective in step with the engine: every rank calls prepare and logits for the same micro-batches in the same order."""

    def prepare(self, run: Pass, batches: Sequence[Any]) -> None:
        """Once a step, before pass 1, at theta_t; may move the weights and comes back bit for bit."""
        ...

    def logits(self, run: Pass, index: int, batch: Any) -> Tensor:
        """(N, C) reference logits of micro-batch `index`; with a graph only where the reference is differentiable."""
        ...

    def advance(self, engine: Engine) -> None:
        """Once a step, at theta_t just before the descent: theta_t becomes the next step's theta_{t-1}."""
        ...

    def state(self) -> dict[str, Shards]:
        """What a checkpoint must hold for the next step to be the same."""
        ...

    def names(self) -> tuple[str, ...]:
        """The keys of state() once a step was taken."""
        ...

    def load(self, state: dict[str, Shards]) -> None:
        """Takes up what state() gave; {} is the state before the first step."""
        ...


def _masks(mode: Mode) -> str:
    return "pass_1" if mode == "paired" else "reference"


Update = Callable[[Shards | None, Engine], Shards | None]


@dataclass
class AtWeights:
    """p(. | x, w) for remembered weights w: one sharded copy of the model, no second module.

    before: w as of the start of step t, from the w remembered (None at step 0). after: w to remember at the end of it.
    """

    name: str
    before: Update
    after: Update = lambda weights, _: weights
    mode: Mode = "eval"
    weights: Shards | None = None
    cached: list[Tensor] = field(default_factory=list)

    def prepare(self, run: Pass, batches: Sequence[Any]) -> None:
        self.weights = self.before(self.weights, run.engine)
        assert self.weights is not None
        with torch.no_grad(), run.engine.moved(to=self.weights):
            self.cached = [
                run(i, batch, masks=_masks(self.mode), train=self.mode != "eval").logits for i, batch in enumerate(batches)
            ]

    def logits(self, run: Pass, index: int, batch: Any) -> Tensor:
        return self.cached[index]

    def advance(self, engine: Engine) -> None:
        self.cached = []
        self.weights = self.after(self.weights, engine)

    def state(self) -> dict[str, Shards]:
        return {} if self.weights is None else {self.name: self.weights}

    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def load(self, state: dict[str, Shards]) -> None:
        self.weights = state[self.name] if state else None


def previous(mode: Mode = "eval") -> AtWeights:
    """theta_{t-1}, the weights before the last base step; theta_{-1} is theta_0, so d = 0 at step 0."""
    return AtWeights("previous", lambda w, engine: w or engine.params(), lambda _, engine: engine.params(keep=True), mode)


def initial(mode: Mode = "eval") -> AtWeights:
    """theta_0, the pre-trained model, remembered at the first step."""
    return AtWeights("initial", lambda w, engine: w or engine.params(keep=True), mode=mode)


def average(decay: float, mode: Mode = "eval") -> AtWeights:
    """EMA <- decay EMA + (1 - decay) theta after every step, in fp32, from theta_0 on.

    The update by theta_{t+1} happens when that is first seen, at the start of step t + 1: the same numbers.
    """

    def update(ema: Shards | None, engine: Engine) -> Shards:
        return engine.params().clone() if ema is None else ema.lerp_(engine.params(), 1.0 - decay)

    return AtWeights("average", update, mode=mode)


@dataclass
class NoisedInput:
    """p(. | x + z, theta): no state and nothing moved; the same z in both passes of a step.

    differentiable: the gradient also flows through this branch, above the detached embedding (R3F).
    """

    noise: Noise
    mode: Mode = "train"
    differentiable: bool = False

    def prepare(self, run: Pass, batches: Sequence[Any]) -> None:
        pass

    def logits(self, run: Pass, index: int, batch: Any) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return run(index, batch, masks=_masks(self.mode), train=self.mode != "eval", noise=self.noise, detach=True).logits

    def advance(self, engine: Engine) -> None:
        pass

    def state(self) -> dict[str, Shards]:
        return {}

    def names(self) -> tuple[str, ...]:
        return ()

    def load(self, state: dict[str, Shards]) -> None:
        pass


@dataclass
class TrustRegion:
    """A reference, a distance, and how their value becomes d.

    distance: (reference (N, C), current (N, C)) -> () summed over N.
    official: divide by C and by the micro-batch's rows as well, as the released code does.
    labelled: count only the positions that carry a target.
    gathered: the distance compares samples (mmd): collect the whole global batch before measuring.
    """

    reference: Reference
    distance: Distance
    scale: float = 1.0
    minimum: float | None = None
    maximum: float | None = None
    official: bool = False
    labelled: bool = False
    gathered: bool = False
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def measure(self, reference: Tensor, current: Tensor, output: Output) -> tuple[Tensor, int]:
        """(distance summed over positions, how many positions) of one micro-batch; `output` says which are labelled."""
        if self.labelled and output.counted is not None:
            reference, current = reference[output.counted], current[output.counted]
        if self.gathered:
            self._rows.append((reference.detach(), current.detach()))
            return current.new_zeros(()), len(current)
        divisor = current.shape[-1] * (output.rows or len(current)) if self.official else 1
        return self.distance(reference, current) / divisor, len(current)

    def mean(self, engine: Engine, means: Means) -> Tensor:
        """d, () float64: the mean of pass 1, or the gathered batch's. Collective where gathered."""
        if not self.gathered:
            return means.distance
        reference, current = (gather_rows(engine, torch.cat(side)) for side in zip(*self._rows, strict=True))
        self._rows = []
        return (self.distance(reference, current) / len(current)).double()

    def radius(self, d: Tensor) -> Tensor:
        """() scale * d, within [minimum, maximum]; rounding below zero counts as zero, NaN stays NaN."""
        low = 0.0 if self.minimum is None else self.minimum
        return (d.detach() * self.scale).clamp(min=low, max=self.maximum)


def gather_rows(engine: Engine, x: Tensor) -> Tensor:
    """(N, C) of every rank, concatenated in rank order on every rank; ranks may hold different N. Host-synchronising."""
    sizes = torch.zeros(engine.world_size, dtype=torch.float64, device=engine.device)
    sizes[engine.rank] = len(x)
    counts = [int(n) for n in engine.data_sum(sizes).tolist()]
    start = sum(counts[: engine.rank])
    rows = torch.zeros(sum(counts), x.shape[-1], dtype=x.dtype, device=x.device)
    rows[start : start + len(x)] = x
    return engine.data_sum(rows)
