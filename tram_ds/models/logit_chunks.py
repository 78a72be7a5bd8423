"""The loss, the distances and their gradient, from hidden states and an output head, one chunk of
rows after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tram_ds.models.functional import LogitGradient
from tram_ds.models.logits import Compare, Hidden
from tram_ds.models.output import Output

# of logits: 41 rows of GPT-2's vocabulary in 8 MiB, 333 in 64 MiB
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 24}
IGNORED = -100  # the target of a position that predicts nothing


def product_dtype(states: Tensor, weight: Tensor) -> torch.dtype:
    """What the head's product is taken in."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LogitChunks:
    """One pass over the rows in chunks; afterwards total, losses (N,) and distances are there,
    without a graph."""

    def __init__(
        self,
        targets: Tensor,
        compares: Sequence[Compare],
        like: Output,
        held: LogitGradient | None = None,
    ):
        self.targets, self.compares, self.like, self.held = targets, compares, like, held
        self.stored = None if held is None else held.hidden  # of another pass
        self.positions = [c.positions(like, len(targets)) for c in compares]
        pairs = zip(compares, self.positions, strict=True)
        self.weights = [None if c.weight is None else c.weight(like.count, n) for c, n in pairs]
        self.references = [c.reference for c in compares if isinstance(c.reference, Hidden)]
        assert len(self.references) == len(compares), (
            "chunked logits are compared with chunked logits"
        )
        self.losses: list[Tensor] = []
        self.distances: list[list[Tensor]] = []
        self.total = torch.zeros(())

    def answer(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """() the objective, with a graph to the states, the head, and every reference that has
        one."""
        # They are inputs of the Function, or autograd would not give them a gradient.
        live = [r.states for r in self.references if r.weight is None]
        objective: Any = _Objective.apply(
            self, torch.is_grad_enabled(), states, weight, bias, *live
        )
        return objective

    def run(self, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
        """inputs: states, weight, bias, states of references read by this head; grads: what their
        gradients are added to."""
        states, weight, bias, *_ = inputs
        assert states is not None and weight is not None
        if self.held is not None and self.stored is None:
            self.held.keep(states.to(weight.dtype), weight, bias)
        self.total = torch.zeros((), dtype=_wide(weight.dtype), device=states.device)
        step = max(1, CHUNK_ELEMENTS.get(states.device.type, CHUNK_ELEMENTS["cuda"]) // len(weight))
        for start in range(0, len(states), step):
            self._chunk(slice(start, start + step), inputs, grads)

    def _chunk(
        self, rows: slice, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
    ) -> None:
        states, weight, bias, *live = inputs
        assert weight is not None
        read = [x[rows].to(weight.dtype) for x in (states, *live) if x is not None]
        into = [grads[0], *grads[3:]]
        logits = [
            # leaves: the graph of a chunk ends here, and the product's gradient is made by hand
            F.linear(x, weight, bias).requires_grad_(g is not None)
            for x, g in zip(read, into, strict=True)
        ]
        others = iter(logits[1:])
        references = [
            next(others) if r.weight is None else F.linear(r.states[rows], r.weight, r.bias)
            for r in self.references
        ]
        wanted = [x for x in logits if x.requires_grad]
        with torch.set_grad_enabled(bool(wanted) and self.stored is None):
            objective = self._terms(rows, logits[0], references)
        self.total += objective.detach()
        # Taken here, while the chunk's logits are there: kept for backward they would be the (N, C)
        # matrix that is never held.
        if wanted:
            found = iter(
                torch.autograd.grad(objective, wanted)
                if self.stored is None
                else [self._gradient(rows, self.stored)]
            )
            for x, g in zip(read, into, strict=True):
                if g is not None:
                    _add_product(next(found), x, weight, rows, g, grads)

    def _losses(self, rows: slice, logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, self.targets[rows], ignore_index=IGNORED, reduction="none")

    def _gradient(self, rows: slice, stored: Hidden) -> Tensor:
        """dL/dlogits (n, C) at the weights that `stored` is of."""
        assert stored.weight is not None
        logits = F.linear(stored.states[rows], stored.weight, stored.bias).requires_grad_()
        with torch.enable_grad():
            loss = self._losses(rows, logits).sum()
        return torch.autograd.grad(loss, logits)[0]

    def _terms(self, rows: slice, logits: Tensor, references: Sequence[Tensor]) -> Tensor:
        losses = self._losses(rows, logits)
        self.losses.append(losses.detach())
        objective, found = losses.sum(), []
        counted = None if self.like.counted is None else self.like.counted[rows]
        for compare, weight, reference in zip(self.compares, self.weights, references, strict=True):
            distance = compare.of(reference, logits, counted, self.like.rows or len(self.targets))
            objective = objective if weight is None else objective + weight * distance
            found.append(distance.detach().double())
        self.distances.append(found)
        return objective

    def output(self, objective: Tensor) -> Output:
        """What `measured` returns of whole logits; loss_sum has a graph where it is the
        objective."""
        losses = torch.cat(self.losses)
        distances = [torch.stack(column).sum() for column in zip(*self.distances, strict=True)]
        # without a penalty the objective is the loss, and brings its graph along
        loss = losses.sum() if any(w is not None for w in self.weights) else objective
        pairs = tuple(zip(distances, self.positions, strict=True))
        return replace(
            self.like, loss_sum=loss, objective=objective, losses=losses, distances=pairs
        )


def _add_product(
    g: Tensor,
    states: Tensor,
    weight: Tensor,
    rows: slice,
    into: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """Adds what a chunk's dL/dlogits g (n, C) means for the states, the weight and the bias."""
    into[rows] = g @ weight
    _, of_weight, of_bias, *_ = grads
    if of_weight is not None:
        if of_weight.dtype == g.dtype:
            torch.addmm(of_weight, g.T, states, out=of_weight)  # no second (C, H)
        else:
            of_weight += g.T @ states
    if of_bias is not None:
        of_bias += g.sum(0)


class _Objective(torch.autograd.Function):
    """The objective of a sweep. Its gradient is made on the way forward, while a chunk's logits are
    there."""

    @staticmethod
    def forward(ctx: Any, sweep: LogitChunks, learning: bool, *inputs: Tensor | None) -> Tensor:
        wanted = [learning and w for w in ctx.needs_input_grad[2:]]
        states, weight, *_ = inputs
        assert states is not None and weight is not None
        dtype = product_dtype(states, weight)
        wide = _wide(dtype)
        head = [None if x is None else x.detach().to(dtype) for x in inputs[1:3]]
        grads = [
            # the head's in fp32: a sum over chunks, of which each addition would round in bf16
            torch.zeros_like(x, dtype=wide if 1 <= i <= 2 else x.dtype)
            if w and x is not None
            else None
            for i, (x, w) in enumerate(zip(inputs, wanted, strict=True))
        ]
        # the products are cast already; autocast would cast the losses' sums to half as well
        with torch.autocast(states.device.type, enabled=False):
            sweep.run(
                [states.detach(), *head, *(x.detach() for x in inputs[3:] if x is not None)], grads
            )
        ctx.grads, ctx.dtypes = grads, [None if x is None else x.dtype for x in inputs]
        return sweep.total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, (
            "chunked logits can be differentiated once: set model.logits: whole"
        )
        scaled = (
            # outer: what the engine multiplied the objective by; in place, since nobody else has g
            None if g is None else g.mul_(outer[0]).to(dtype)
            for g, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return None, None, *scaled
