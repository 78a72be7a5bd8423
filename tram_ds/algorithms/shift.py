"""Perturbations that need no gradient of this step: epsilon is known before the first pass, which
at theta + epsilon is the only one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tram_ds.algorithms.ascent import TINY
from tram_ds.engines.layout import parameter_shapes
from tram_ds.engines.optimizer_refusals import refuse_without_first_moment
from tram_ds.engines.optimizer_state import FIRST_MOMENTS
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Lazy, Shards, Span
from tram_ds.models.randomness import StepRandomness


class Shift(Protocol):
    """Collective: every rank calls it at the same step."""

    def __call__(self, engine: Engine, draws: StepRandomness) -> Lazy:
        """epsilon of this rank's shards at theta_t, computed part by part when it is read."""
        ...

    def refuse(self, engine: Engine) -> None:
        """ValueError, on every rank alike, for an engine that cannot give it."""
        ...


@dataclass(frozen=True)
class AlongMomentum:
    """epsilon = -rho m / ||m||_2, m the optimizer's first moment before this step; 0 while it has
    none (MSAM, Becker et al. 2024, Algorithm 1: m is the running sum or mean of gradients that the
    step goes against, so this looks ahead along the coming step, as Nesterov's gradient does, but
    by a length of its own). Bias correction and SGD's dampening cancel."""

    rho: float

    def __call__(self, engine: Engine, draws: StepRandomness) -> Lazy:
        theta, moments = engine.params(), engine.moments()
        m = next((moments[name] for name in FIRST_MOMENTS if name in moments), None)
        if m is None:
            if engine.steps:  # an optimizer that does not show its state before its first step
                refuse_without_first_moment(engine.weights.optimizer, set(moments))
            return Lazy(lambda theta: theta * 0.0, theta)
        # minus: m points up the loss, and the coming step goes against it
        coefficient = -self.rho / (engine.norm(m) + TINY)
        return Lazy(lambda theta, m: m.wide() * coefficient, theta, m)

    def refuse(self, engine: Engine) -> None:
        refuse_without_first_moment(engine.weights.optimizer)


@dataclass(frozen=True)
class RandomWeights:
    """epsilon_ij = sigma |W_i|_2 / sqrt(n) z_ij, z ~ N(0, 1), for every parameter of two dimensions
    or more as (rows, n) by its first dimension; 0 for biases and norms (Flat-LoRA, Li et al. 2025,
    there of the merged weights; here of those that are trained). The same z on every engine and
    world size; one all-reduce of a number per row where weights are sharded."""

    sigma: float

    def __call__(self, engine: Engine, draws: StepRandomness) -> Lazy:
        theta = engine.params()
        sizes = row_sizes(engine, theta)

        def epsilon(span: Span, piece: Tensor) -> Tensor:
            if span.name not in sizes or not span.length:
                return torch.zeros_like(piece)
            n = math.prod(span.shape[1:])
            # a piece may begin and end inside a row: first the rows that it touches, whole
            first, stop = span.start // n, -(-(span.start + span.length) // n)
            rows = sizes[span.name][first:stop].to(piece.dtype).repeat_interleave(n)
            size = rows[span.start - first * n :][: span.length]
            z = draws.weights(span.name, span.start, piece.reshape(-1))
            return (self.sigma * size * z).view_as(piece)

        return Lazy(lambda theta: theta.map(epsilon), theta)

    def refuse(self, engine: Engine) -> None:
        masters = engine.weights.masters()
        for span, piece in zip(masters.layout, masters, strict=True):
            if not piece.is_contiguous():
                raise ValueError(
                    f"algorithm.name = rwp needs the rows of {span.name} one after the other in "
                    "memory: make it contiguous, p.data = p.data.contiguous()"
                )
        if not _matrices(engine):
            raise ValueError(
                "algorithm.name = rwp perturbs matrices, and none is trained: unfreeze one, or use "
                "base"
            )


def _matrices(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Shapes of what has rows, the same on every rank."""
    shapes = parameter_shapes(engine.module)
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and math.prod(shape)}


def row_sizes(engine: Engine, theta: Shards) -> dict[str, Tensor]:
    """Name -> |W_i|_2 / sqrt(n) of every row of a parameter, (rows,) float64 on the device of
    theta. Collective where theta is sharded."""
    shapes = _matrices(engine)
    device = next((piece.device for piece in theta), engine.device)
    # all rows on every rank, zeros where it has none: what ranks sum must be of one size
    squares = {
        name: torch.zeros(shape[0], dtype=torch.float64, device=device)
        for name, shape in shapes.items()
    }
    for span, piece in zip(theta.layout, theta, strict=True):
        if span.name in squares and span.length:
            _add_squares(squares[span.name], span, piece.reshape(-1))
    found = torch.cat(list(squares.values())).to(engine.device)
    if engine.shard_group is not None:
        dist.all_reduce(found, group=engine.shard_group)
    counts = [shape[0] for shape in shapes.values()]
    columns = [math.prod(shape[1:]) for shape in shapes.values()]
    parts = zip(shapes, found.to(device).split(counts), columns, strict=True)
    return {name: (part / n).sqrt() for name, part, n in parts}


def _add_squares(into: Tensor, span: Span, flat: Tensor) -> None:
    """Adds the squares of a piece to its rows', of which it may have parts only."""
    n = math.prod(span.shape[1:])
    first, head = divmod(span.start, n)
    tail = -(head + span.length) % n
    # zeros to whole rows: they add nothing to a sum of squares
    whole = F.pad(flat, (head, tail)) if head or tail else flat
    # one kernel a piece in its own precision, what is added over pieces and ranks in float64
    rows = torch.linalg.vector_norm(whole.view(-1, n), dim=1).double().square()
    into[first : first + len(rows)] += rows
