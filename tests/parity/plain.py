"""The step without one of its optimisations, each time the same mathematics. Each takes a Stepper,
and puts it back at the end.

They are not switches of the product: nobody would want the slower form, but it must give the same
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from tram_ds.algorithms.stepper import Stepper
from tram_ds.engines import shards
from tram_ds.engines.shards import Lazy


def restored_at_once(built: Stepper) -> AbstractContextManager[Any]:
    """theta is back before the descent, which overwrites it."""
    moved = built.engine.moved
    return mock.patch.object(built.engine, "moved", lambda to, until_descent=False: moved(to))


def norm_apart(built: Stepper) -> AbstractContextManager[Any]:
    """The norm is asked for after the pass, of the mean gradient, by a collective of its own."""
    engine: Any = built.engine
    backward = engine.backward

    def then_norm(
        batches: Any, objective: Any, norm_rule: Any = None, local_only: bool = False
    ) -> Any:
        means = backward(batches, objective, norm_rule, local_only)
        g = engine.grads()
        x = (
            g
            if norm_rule is None
            else Lazy(lambda theta, g: norm_rule(theta, g, g), engine.params(), g)
        )
        return replace(means, norm=engine.norm(x.realise()))

    return mock.patch.object(engine, "backward", then_norm)


@contextmanager
def _parts(elements: int) -> Iterator[None]:
    with mock.patch.dict(shards.PART, cpu=elements):
        yield


FORMS: dict[str, Callable[[Stepper], AbstractContextManager[Any]]] = {
    "restored_at_once": restored_at_once,
    "norm_apart": norm_apart,
    # otherwise all the weights of the problem are one part
    "in_small_parts": lambda _: _parts(100),
}
# where a rounding of the norm would move a rounding to bf16, fp32 shows that it is one
PRECISION = {
    "restored_at_once": torch.bfloat16,
    "norm_apart": torch.float32,
    "in_small_parts": torch.float32,
}
