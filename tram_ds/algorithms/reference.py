"""A prior prediction p_ref(. | x) of the same batch: of the previous step's weights, of the
pre-trained ones, of their moving average (all three: evaluate the model at other weights, then come
back), or of the current weights on x + z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards
from tram_ds.models.logits import Hidden, Prediction
from tram_ds.models.passes import ForwardContext, Noise

Mode = Literal["eval", "train", "paired"]  # paired: train mode with the dropout masks of pass 1


class Reference(Protocol):
    """Collective in step with the engine: every rank calls every method for the same micro-batches
    in the same order."""

    def prepare(
        self, run: ForwardContext, batches: Sequence[Any], upcoming: Sequence[Any] | None
    ) -> None:
        """Once a step, before pass 1, at theta_t; may move the weights and comes back bit for bit.

        batches: this step's micro-batches; upcoming: the next one's, None if unknown. Empty: no
        prediction will be asked for.
        """
        ...

    def prediction(self, run: ForwardContext, index: int, batch: Any) -> Prediction:
        """Of the N positions of micro-batch `index`; with a graph only where the reference is
        differentiable."""
        ...

    def advance(self, engine: Engine) -> None:
        """Once a step, at theta_t just before the descent: theta_t becomes the next step's
        theta_{t-1}."""
        ...

    def restorable(self) -> bool:
        """Whether state() has what the next step needs."""
        ...

    def state(self) -> dict[str, Shards]:
        """What a checkpoint must hold for the next step to be the same. ValueError unless
        restorable."""
        ...

    def names(self) -> tuple[str, ...]:
        """The keys of state() once a step was taken."""
        ...

    def load(self, state: dict[str, Shards]) -> None:
        """Takes up what state() gave; {} is the state before the first step."""
        ...


def _masks(mode: Mode) -> str:
    return "pass_1" if mode == "paired" else "reference"


def _predicted(run: ForwardContext, batches: Sequence[Any], mode: Mode) -> list[Prediction]:
    """p(. | x) at the weights that stand in the engine. One copy of the head serves all
    micro-batches."""
    found: list[Prediction] = []
    with torch.no_grad(), run.aside():
        for index, batch in enumerate(batches):
            one = run.predict(
                index, batch, masks=_masks(mode), train=mode != "eval", copy_head=not found
            )
            if found and isinstance(one, Hidden) and isinstance(found[0], Hidden):
                # with the first one's copy of the head: (C, H) once, not for every micro-batch
                one = Hidden(one.states, found[0].weight, found[0].bias)
            found.append(one)
    return found


@dataclass
class Previous:
    """p(. | x, theta_{t-1}), the weights before the last base step; theta_{-1} is theta_0, so d = 0
    at step 0.

    lookahead: where the next step's micro-batches are there already, their predictions are made
    now, at theta_t, instead of then at weights remembered and moved to and from: the same numbers,
    bit for bit, without a copy of the model. Otherwise theta_t is remembered from the descent to
    the next step's first pass.
    """

    mode: Mode = "eval"
    lookahead: bool = True
    weights: Shards | None = None
    _now: list[Prediction] = field(default_factory=list)
    _next: list[Prediction] | None = None

    def prepare(
        self, run: ForwardContext, batches: Sequence[Any], upcoming: Sequence[Any] | None
    ) -> None:
        # looked at in the step before, at the weights that are theta_{t-1} now
        if self._next is not None:
            self._now = self._next
        elif self.weights is None or not batches:
            # step 0: theta_{-1} is theta_0, which stands there; without batches nothing runs
            self._now = _predicted(run, batches, self.mode)
        else:
            with run.engine.moved(to=self.weights):
                self._now = _predicted(run, batches, self.mode)
        # The copy is spent: freed before the passes, whose activations are the peak.
        self.weights = None
        self._next = (
            _predicted(run.next(), upcoming, self.mode)
            if self.lookahead and upcoming is not None
            else None
        )

    def prediction(self, run: ForwardContext, index: int, batch: Any) -> Prediction:
        return self._now[index]

    def advance(self, engine: Engine) -> None:
        self._now = []
        # keep: the descent overwrites the masters. Not if the next batch was looked at already
        self.weights = engine.params(keep=True) if self._next is None else None

    def restorable(self) -> bool:
        return self._next is None

    def state(self) -> dict[str, Shards]:
        if not self.restorable():
            raise ValueError(
                "theta_{t-1} was not kept: the step before a checkpoint must be called without "
                "`upcoming`, the next batch"
            )
        # None at step 0, where theta_{t-1} is theta_0: no file for it, and none is asked for
        return {} if self.weights is None else {"previous": self.weights}

    def names(self) -> tuple[str, ...]:
        return ("previous",)

    def load(self, state: dict[str, Shards]) -> None:
        self.weights, self._next = state.get("previous"), None


Update = Callable[[Shards | None, Engine], Shards]


@dataclass
class WeightReference:
    """p(. | x, w) for remembered weights w: one sharded copy of the model, no second module.

    before: w as of the start of step t, from the w remembered (None at step 0).
    """

    name: str
    before: Update
    mode: Mode = "eval"
    weights: Shards | None = None
    _predictions: list[Prediction] = field(default_factory=list)

    def prepare(
        self, run: ForwardContext, batches: Sequence[Any], upcoming: Sequence[Any] | None
    ) -> None:
        self.weights = self.before(self.weights, run.engine)
        if batches:
            with run.engine.moved(to=self.weights):
                self._predictions = _predicted(run, batches, self.mode)

    def prediction(self, run: ForwardContext, index: int, batch: Any) -> Prediction:
        return self._predictions[index]

    def advance(self, engine: Engine) -> None:
        self._predictions = []

    def restorable(self) -> bool:
        return True

    def state(self) -> dict[str, Shards]:
        return {} if self.weights is None else {self.name: self.weights}

    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def load(self, state: dict[str, Shards]) -> None:
        self.weights = state[self.name] if state else None


def initial(mode: Mode = "eval") -> WeightReference:
    """theta_0, the pre-trained model, remembered at the first step."""
    # `or` passes over an empty w too, of a rank that owns nothing, for another empty one
    return WeightReference("initial", lambda w, engine: w or engine.params(keep=True), mode)


def average(decay: float, mode: Mode = "eval") -> WeightReference:
    """EMA <- decay EMA + (1 - decay) theta after every step, in fp32, from theta_0 on.

    The update by theta_{t+1} happens when that is first seen, at the start of step t + 1: the same
    numbers.
    """

    def update(ema: Shards | None, engine: Engine) -> Shards:
        # not in place: a step that raises hands the average back as it was
        return engine.params().clone() if ema is None else ema.lerp(engine.params(), 1.0 - decay)

    return WeightReference("average", update, mode)


@dataclass
class NoiseReference:
    """p(. | x + z, theta): no state and nothing moved; the same z in both passes of a step.

    differentiable: the gradient also flows through this branch, above the detached embedding (R3F).
    """

    noise: Noise
    mode: Mode = "train"
    differentiable: bool = False

    def prepare(
        self, run: ForwardContext, batches: Sequence[Any], upcoming: Sequence[Any] | None
    ) -> None:
        pass

    def prediction(self, run: ForwardContext, index: int, batch: Any) -> Prediction:
        learning = self.differentiable and torch.is_grad_enabled()
        # aside: running statistics are of x, and not of x + z as well
        with torch.set_grad_enabled(learning), run.aside():
            return run.predict(
                index,
                batch,
                masks=_masks(self.mode),
                train=self.mode != "eval",
                noise=self.noise,
                detach=True,
            )

    def advance(self, engine: Engine) -> None:
        pass

    def restorable(self) -> bool:
        return True

    def state(self) -> dict[str, Shards]:
        return {}

    def names(self) -> tuple[str, ...]:
        return ()

    def load(self, state: dict[str, Shards]) -> None:
        pass
