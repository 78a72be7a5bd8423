"""The largest eigenvalue of the loss's Hessian, by a power iteration on gradient differences.

    H v ~ (grad(theta + h v) - grad(theta - h v)) / (2 h),   |v| = 1

No second backward pass is needed, so every engine can do it, sharded or not. The error of a product
is of the order of h^2 times the third derivative, plus the rounding of an fp32 gradient (~1e-7 of
its size) over h. At h = 0.001 both are small for fine-tuned transformers; a residual that stays
above the tolerance says that they are not: try another h.

Plain power iteration finds the eigenvalue largest in magnitude, and away from a minimum, on
zero-shot domains above all, that is often a negative one. So each step takes the best direction in
the span of the current one, its residual and the last change (the locally optimal iteration of
Knyazev 2001, LOBPCG with one vector). It climbs to the largest eigenvalue, sign included, in fewer
products. Ten vectors of the size of the sharded weights are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards
from tram_ds.runtime.checked import Positive, Section
from tram_ds.surface.sharpness import Above0
from tram_ds.surface.subject import Subject, dots, random_direction

Pair = tuple[Shards, Shards]  # (v, H v)


class Options(Section):
    """Settings of the measurement."""

    h: Above0 = 1e-3
    """2-norm of the step of the gradient difference."""
    iterations: Annotated[int, Field(ge=2)] = 50
    """Most products H v; each costs two backward passes over the rows."""
    tolerance: Above0 = 1e-2
    """The iteration ends once |H v - value v| is below this, relative to |value|; the value's own
    error is of its square."""
    rows: Positive | None = 512
    """Rows of the split the loss is taken over, from its beginning; null = all."""


def measure(subject: Subject, options: Options) -> dict[str, Any]:
    """{value, residual, products, converged} and the options. Collective; the weights are as before
    afterwards.

    residual: |H v - value v| / |value|, relative distance within which there surely is an
    eigenvalue.
    """
    subject = subject.first(options.rows)
    engine = subject.engine
    start = random_direction(engine, subject.seed, "hessian")
    value, residual, used = top_eigenvalue(
        engine, lambda v: product(subject, v, options.h), start, options
    )
    found = {
        "value": value,
        "residual": residual,
        "products": used,
        "converged": residual <= options.tolerance,
    }
    return found | options.model_dump() | {"rows": subject.rows}


def product(subject: Subject, v: Shards, h: float) -> Shards:
    """H v for v of norm 1 in the layout of params(). Collective: two backward passes."""
    theta = subject.engine.params()
    ahead, behind = (subject.gradient(theta + v * step) for step in (h, -h))
    return (ahead - behind) * (0.5 / h)


def top_eigenvalue(
    engine: Engine, apply: Callable[[Shards], Shards], start: Shards, options: Options
) -> tuple[float, float, int]:
    """(largest eigenvalue of a symmetric `apply`, its relative residual, products used). Collective
    over shard_group."""
    x = start * (1.0 / engine.norm(start))
    best, last = (x, apply(x)), None
    value, residual, used = 0.0, math.inf, 0
    for used in range(1, options.iterations + 1):
        value = float(dots(engine, [best[0]], [best[1]]))
        rest = best[1] - best[0] * value
        length = float(engine.norm(rest))
        residual = length / abs(value) if value else (math.inf if length else 0.0)
        # "not >" also ends at NaN, which is then not converged
        if not residual > options.tolerance or used == options.iterations:
            break
        w, _ = orthonormal(engine, (rest, rest), [p for p in (best, last) if p is not None])
        # images of best and last are combined below, H being linear: one product a round
        pairs = [best, (w, apply(w)), *([last] if last is not None else [])]
        weights = ritz(engine, pairs)
        best, change = combined(pairs, weights), combined(pairs[1:], weights[1:])
        last = orthonormal(engine, change, [best])
    return value, residual, used


def ritz(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
    """Coefficients, over an orthonormal basis given with its images, of the direction of largest
    curvature. Collective."""
    projected = dots(engine, [v for v, _ in pairs], [image for _, image in pairs])
    # symmetric by hand: eigh reads one triangle, and rounding makes the two differ
    _, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    # eigh sorts upwards: the last is the largest, sign included
    return vectors[:, -1].tolist()


def combined(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The linear combination of vectors and, H being linear, of their images. Local."""
    v, image = pairs[0][0] * weights[0], pairs[0][1] * weights[0]
    for (a, b), weight in zip(pairs[1:], weights[1:], strict=True):
        v, image = v + a * weight, image + b * weight
    return v, image


def orthonormal(engine: Engine, pair: Pair, basis: Sequence[Pair]) -> Pair:
    """The pair made orthogonal to an orthonormal basis and its vector of norm 1. Collective."""
    v, image = pair
    for b, b_image in [*basis, *basis]:  # twice is enough
        along = float(dots(engine, [v], [b]))
        v, image = v - b * along, image - b_image * along
    # a vector that lay in the basis is zero here: no division by zero, no NaN in the next round
    scale = 1.0 / engine.norm(v).clamp(min=1e-30)
    return v * scale, image * scale
