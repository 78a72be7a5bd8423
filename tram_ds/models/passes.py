"""One forward pass under stated conditions: which masks, which mode, which input noise. Used by the
step and its references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from tram_ds.engines.protocol import Engine
from tram_ds.models import functional
from tram_ds.models.chunked import Chunked
from tram_ds.models.functional import LogitGradient
from tram_ds.models.logits import Compare, Prediction, measured
from tram_ds.models.noise import Added, Conditions, Noise
from tram_ds.models.output import Output, rows_of
from tram_ds.models.randomness import StepRandomness
from tram_ds.models.state import ModuleState

Forward = Callable[[Any, Any], Output] | Chunked  # (model, batch) -> Output


@dataclass(frozen=True)
class ForwardContext:
    """Runs `forward` on the model of `engine` for one step's draws. state: of the model's buffers;
    conditions: what its hooks read; close() them when the step is over."""

    engine: Engine
    forward: Forward
    draws: StepRandomness
    state: ModuleState
    conditions: Conditions

    @staticmethod
    def over(engine: Engine, forward: Forward, draws: StepRandomness) -> ForwardContext:
        state = ModuleState(engine.module, frozen=engine.whole_gradients)
        return ForwardContext(
            engine, forward, draws, state, Conditions(engine.model, engine.module)
        )

    def aside(self) -> AbstractContextManager[None]:
        """Passes inside leave no trace in the model's buffers: only pass 1 moves running
        statistics, and a checkpointed block moves them when backward computes it again."""
        return self.state.kept()

    def close(self) -> None:
        """The step is over: no hook is left in the model."""
        self.conditions.close()

    def next(self) -> ForwardContext:
        """The same for the next step."""
        return replace(self, draws=replace(self.draws, step=self.draws.step + 1))

    def __call__(
        self,
        index: int,
        batch: Any,
        *,
        masks: str,
        train: bool = True,
        noise: Noise | None = None,
        fixed: bool = False,
        compares: Sequence[Compare] = (),
        held: LogitGradient | None = None,
    ) -> Output:
        """The pass whose objective is differentiated. masks: the purpose that seeds dropout. fixed:
        no gradient goes below the noise.

        compares: what to measure of the logits; the output's `objective` and `distances` answer.
        held: see functional.through; nothing is compared then.
        """
        assert held is None or not compares
        added = None if noise is None else Added(noise, self.draws, index, fixed=fixed)
        with self._under(index, masks, train, added, last=True):
            if isinstance(self.forward, Chunked):
                return self.forward(self.engine.model, batch, compares, held)
            if held is not None:
                forward = partial(self.forward, self.engine.model, batch)
                return functional.through(self.engine.model, held, forward)
            return measured(self.forward(self.engine.model, batch), compares)

    def predict(
        self,
        index: int,
        batch: Any,
        *,
        masks: str,
        train: bool = True,
        noise: Noise | None = None,
        detach: bool = False,
        copy_head: bool = False,
    ) -> Prediction:
        """What the model says of every position. detach: cut the graph below the noise, as the
        released code does.

        copy_head: the weights are about to change, so keep what the prediction needs of them.
        """
        added = None if noise is None else Added(noise, self.draws, index, detach)
        with self._under(index, masks, train, added, last=False):
            if isinstance(self.forward, Chunked):
                return self.forward.predict(self.engine.model, batch, copy_head)
            return rows_of(self.forward(self.engine.model, batch))

    @contextmanager
    def _under(
        self, index: int, masks: str, train: bool, added: Added | None, last: bool
    ) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.engine.autocast())
            if not train:
                stack.enter_context(evaluating(self.engine.module))
            stack.enter_context(self.conditions.during(added, train, last))
            # last, so that nothing of the above draws between the seed and the model
            self.draws.seed_masks(masks, index)
            yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; on exit every submodule is back in the mode it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            # not m.train(mode), which would set its submodules along
            m.training = mode
