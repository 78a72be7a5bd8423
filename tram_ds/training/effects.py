"""What a run says of what its steps do: measured early and now and then, in one line at the start,
and in a warning where over the first steps they did nothing, or far too much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.effect import ACTS, TOO_FAR, Effect, keys
from tram_ds.algorithms.radius import Calibrated
from tram_ds.algorithms.trust_region import TrustRegion

# steps, counted from 1, that are looked at whatever effect_every is: at the first a reference of
# earlier weights says nothing
EARLY = (3, 30, 100)
FIRST = 100  # steps after which it is decided whether to warn


def due(step: int, every: int | None, log_every: int, row: Algorithm) -> bool:
    """Whether step `step`, counted from 1, is measured: where one of EARLY or a multiple of `every`
    lies after the last logged step, and this one is logged. every: train.effect_every; None:
    never."""
    # of the others the step is the base optimizer's: there is nothing to compare
    climbs_or_pulls = row.perturbs or row.penalty is not None
    if every is None or not climbs_or_pulls or step % log_every:
        return False
    before = step - log_every
    # an interval, not equality: with log_every 10 step 3 is never logged, and 10 stands for it
    return any(before < early <= step for early in EARLY) or step // every > before // every


def record_of(effect: Effect) -> dict[str, float]:
    """For metrics.jsonl, beside a step's own numbers."""
    return {
        "effect": effect.change,
        "effect_cosine": effect.cosine,
        "effect_masks": effect.masks,
        "effect_gap": effect.loss_gap,
        "effect_norm": effect.norm,
    }


def resolved(row: Algorithm) -> dict[str, float]:
    """Recipe key -> what the run found for it where the recipe left that to the run
    (radius_scale: auto), the same on every rank. Host-synchronising."""
    region = row.radius
    if not isinstance(region, TrustRegion) or not isinstance(region.rule, Calibrated):
        return {}
    scale = None if region.seen is None else region.rule.scale(region.seen)
    return {} if scale is None else {"algorithm.radius_scale": scale}


def effect_of(record: Mapping[str, Any]) -> Effect | None:
    """What record_of() put into a step's record."""
    names = ("step", "loss", "effect_gap", "distance", "radius", "effect_norm", "effect")
    values = [record.get(name) for name in (*names, "effect_cosine", "effect_masks")]
    return None if None in values else Effect(*values)  # type: ignore[arg-type]


def warning(row: Algorithm, records: Iterable[Mapping[str, Any]], last: int) -> str | None:
    """What there is to say, for people, of the records of steps 1 to `last`; None: nothing."""
    steps = [r for r in records if r.get("step", last) <= last and r.get("loss") is not None]
    taken = [r for r in steps if not r.get("skipped") and r.get("sharpness_gap") is not None]
    options = " or ".join(f"algorithm.{key}" for key in keys(row))
    count = max(1, len(taken))
    gap = sum(r["sharpness_gap"] for r in taken) / count
    loss = sum(abs(r["loss"]) for r in taken) / count
    if gap > TOO_FAR * loss > 0.0:
        return (
            f"over the first {last} steps theta + epsilon raised the loss by {gap:.3g}, more than "
            f"half of it ({loss:.3g}): {row.name} climbs too far; lower {options}, see "
            "docs/choosing.md"
        )
    effects = [effect for r in steps if (effect := effect_of(r)) is not None]
    if not effects or any(effect.acts for effect in effects):
        return None
    most = max(effects, key=lambda effect: effect.change / effect.scale)
    scale = (
        f"{ACTS:g} of the {most.masks:.2g} of other dropout masks" if most.masks else f"{ACTS:g}"
    )
    return (
        f"over the first {last} steps {row.name} changed the gradient by at most {most.change:.2g} "
        f"of its length, below {scale}: the run is the base optimizer's at a higher price; raise "
        f"{options}, see docs/choosing.md"
    )
