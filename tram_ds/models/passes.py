"""One forward pass under stated conditions: which masks, which mode, which input noise. Used by the
step and its references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tram_ds.engines.protocol import Engine
from tram_ds.models.chunked import Chunked
from tram_ds.models.logits import Compare, Prediction, measured
from tram_ds.models.output import Output
from tram_ds.models.randomness import Draws

Forward = Callable[[Any, Any], Output] | Chunked  # (model, batch) -> Output


@dataclass(frozen=True)
class Noise:
    """x + z: where z is added ("embedding": the word embeddings' output; "pixel_values"; or a
    module of the model)."""

    site: str | nn.Module
    sigma: float
    kind: str = "normal"


@dataclass(frozen=True)
class Pass:
    """Runs `forward` on the model of `engine` for one step's draws."""

    engine: Engine
    forward: Forward
    draws: Draws

    def next(self) -> Pass:
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
        statistics: bool = False,
        compares: Sequence[Compare] = (),
    ) -> Output:
        """masks: the purpose that seeds dropout. statistics: let batch-norm layers update their
        running ones (pass 1 only).

        compares: what to measure of the logits; the output's `objective` and `distances` answer.
        """
        with self._conditions(index, masks, train, noise, False, statistics):
            if isinstance(self.forward, Chunked):
                return self.forward(self.engine.model, batch, compares)
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
        with self._conditions(index, masks, train, noise, detach, False):
            if isinstance(self.forward, Chunked):
                return self.forward.predict(self.engine.model, batch, copy_head)
            return self.forward(self.engine.model, batch).logits

    @contextmanager
    def _conditions(
        self,
        index: int,
        masks: str,
        train: bool,
        noise: Noise | None,
        detach: bool,
        statistics: bool,
    ) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.engine.autocast())
            if not train:
                stack.enter_context(evaluating(self.engine.module))
            elif not statistics:
                stack.enter_context(frozen_statistics(self.engine.module))
            if noise is not None:
                stack.enter_context(_noised(self.engine.module, noise, self.draws, index, detach))
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
            m.training = mode


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch-norm layers keep their running statistics inside; models without them pay one look at
    their modules."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum


@contextmanager
def _noised(
    module: nn.Module, noise: Noise, draws: Draws, index: int, detach: bool
) -> Iterator[None]:
    def add(x: Tensor) -> Tensor:
        return (x.detach() if detach else x) + draws.noise(x, index, noise.sigma, noise.kind)

    if noise.site == "pixel_values":

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _on_pixels(add, args, kwargs)

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:

        def after(_: nn.Module, __: Any, out: Any) -> Any:
            return add(out)

        handle = _site(module, noise.site).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _on_pixels(
    add: Callable[[Tensor], Tensor], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """New arguments with noised pixels; the caller's batch stays as it was."""
    if "pixel_values" in kwargs:
        return args, {**kwargs, "pixel_values": add(kwargs["pixel_values"])}
    if args and isinstance(args[0], Tensor):
        return (add(args[0]), *args[1:]), kwargs
    raise ValueError(
        "noise on pixel_values needs the model called with pixel_values=... or with the pixels "
        "first"
    )


def _site(module: nn.Module, site: str | nn.Module) -> nn.Module:
    if isinstance(site, nn.Module):
        return site
    getter = getattr(module, "get_input_embeddings", None)
    found = getter() if getter is not None else None
    if found is None:
        raise ValueError(
            f"{type(module).__name__} has no input embedding to add noise to: pass "
            "noise_site=<the module whose output is x>"
        )
    return found
