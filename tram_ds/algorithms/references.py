"""The references of an algorithm, as a whole: carried over to other parameters, and put back after
a step that raised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.reference import WeightReference
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards


def follow(algorithm: Algorithm, engine: Engine, before: set[str]) -> None:
    """Remembered weights get the layout that theta has now. before: the names that theta had.

    A parameter that is new in theta is remembered as it is now, and one that has left it is
    remembered no longer: what it is now is what every pass reads. Said once a change.
    """
    remembering: Any  # those that have weights
    for remembering in algorithm.references:
        weights = getattr(remembering, "weights", None)
        if weights is not None:
            remembering.weights = _carried(weights, engine.weights.masters())
    now = {span.name for span in engine.layout}
    changes = [("trained from now on", now - before), ("no longer trained", before - now)]
    text = "; ".join(f"{what}: {_some(names)}" for what, names in changes if names)
    kept = "; references take their present values for these" if algorithm.references else ""
    warnings.warn(f"the parameters changed after wrap(): {text or 'replaced'}{kept}", stacklevel=4)


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _carried(old: Shards, live: Shards) -> Shards:
    known = {span: piece for span, piece in zip(old.layout, old, strict=True)}
    return Shards(
        (
            # by the whole span: of another shape it is another parameter, whatever its name
            known[span].to(piece.device, piece.dtype) if span in known else piece.clone()
            for span, piece in zip(live.layout, live, strict=True)
        ),
        live.layout,
    )


def names(algorithm: Algorithm) -> list[str]:
    """The weights that the references continue from step to step, once a step was taken."""
    return [name for reference in algorithm.references for name in reference.names()]


def average(algorithm: Algorithm, engine: Engine) -> Shards | None:
    """The moving average of the weights with theta as it is now, between two steps, as the next
    step will have it; new tensors. None where the row keeps none."""
    for reference in algorithm.references:
        if isinstance(reference, WeightReference) and reference.name == "average":
            return reference.before(reference.weights, engine)
    return None


def remembered(algorithm: Algorithm) -> Callable[[], None]:
    """Remembers what the references and the distances hold now; the call puts it back. Nothing is
    copied: what they replace stays alive as long as this does."""
    parts: list[Any] = [*algorithm.regions, *algorithm.references]
    saved = [
        # lists grow in place; all else is replaced, so the old one is still what it was
        (part, {k: list(v) if isinstance(v, list) else v for k, v in vars(part).items()})
        for part in parts
    ]

    def put_back() -> None:
        for part, values in saved:
            vars(part).update(values)

    return put_back
