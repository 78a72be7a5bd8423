"""The gradient of a loss taken apart, J^T dL/dlogits: the model's Jacobian J at one theta, what the
loss says of its logits at another (Functional-SAM, Singh et al. 2025).

dL/dlogits is kept per micro-batch, from pass 1 to pass 2. Of whole logits it is kept itself: one
more (N, C) in the logits' dtype for each micro-batch. Of logits in chunks the hidden states are,
(N, H), and one copy of the output head for all micro-batches; models.chunked makes dL/dlogits of
them a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tram_ds.models.logits import NO_GRADIENT, Hidden
from tram_ds.models.output import Output

ROW = "algorithm.name = functional_sam"


@dataclass
class Head:
    """The output head at theta, for as long as a micro-batch needs it: weight (C, H), bias (C,)."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class LogitGradient:
    """dL/dlogits of one micro-batch: empty until its first pass, which fills it.

    whole: one for each tensor that the model returned, None for what the loss does not read.
    hidden: what chunks of it are made from. head: shared by the micro-batches of a step.
    """

    head: Head = field(default_factory=Head)
    whole: Sequence[Tensor | None] | None = None
    hidden: Hidden | None = None

    def keep(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Of logits in chunks, in the dtype of their product."""
        if self.head.weight is None:
            kept = [x if x is None else x.detach().clone() for x in (weight, bias)]
            self.head.weight, self.head.bias = kept
        self.hidden = Hidden(states.detach(), self.head.weight, self.head.bias)


def through(model: nn.Module, held: LogitGradient, forward: Callable[[], Output]) -> Output:
    """forward(), with an objective whose gradient is J^T `held`; held is this pass's own where it
    was empty.

    forward calls `model` once, and its loss is of what that returns. ValueError, by name, where it
    is of anything else: that part of its gradient would be lost.
    """
    if not torch.is_grad_enabled():
        return forward()
    calls: list[tuple[list[Tensor], list[Tensor]]] = []  # (with the model's graph, cut from it)

    def cut(_: nn.Module, __: Any, out: Any) -> Any:
        leaves, spec = tree_flatten(out)
        live = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        returned = [leaves[i] for i in live]
        for i in live:
            # pass 2 asks nothing of the loss but its value: J^T takes the gradient that is held
            leaves[i] = leaves[i].detach().requires_grad_(held.whole is None)
        calls.append((returned, [leaves[i] for i in live]))
        return tree_unflatten(leaves, spec)

    # registered last, so behind the engine's own hooks: FSDP2's see the model's graph whole
    handle = model.register_forward_hook(cut)
    try:
        out = forward()
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ValueError(
            f"{ROW} needs a forward that calls the model once, and this one called it "
            f"{len(calls)} times"
        )
    returned, cut_off = calls[0]
    loss = out.loss_sum.reshape(())
    if held.whole is None:
        held.whole = _gradient(loss, cut_off)
    pairs = [(g, x) for g, x in zip(held.whole, returned, strict=True) if g is not None]
    if any(g.shape != x.shape for g, x in pairs):
        raise ValueError(
            "forward must give logits of the same shape each time it is called on a batch"
        )
    objective = _Along.apply(loss.detach(), [g for g, _ in pairs], *(x for _, x in pairs))
    return replace(out, loss_sum=loss.detach(), objective=objective)


def _gradient(loss: Tensor, returned: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """d loss / d returned. ValueError where the loss is not of these alone."""
    if not loss.requires_grad:
        raise ValueError(NO_GRADIENT)
    known = {id(x) for x in returned}
    others = [x for x in _leaves(loss) if id(x) not in known]
    # unused: a model returns more than a loss reads, hidden states or a cache
    found = torch.autograd.grad(loss, list(returned), allow_unused=True) if returned else ()
    read = [x for x, g in zip(returned, found, strict=False) if g is not None]
    if others or any(x.dim() == 0 for x in read):
        what = "weights that it reads itself" if others else "a loss that the model made"
        raise ValueError(
            f"{ROW} stores the loss's gradient with respect to the logits, and this loss is of "
            f"{what}: compute it in forward from the logits that the model returns"
        )
    return found


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that the graph of `loss` ends in."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found = getattr(node, "variable", None)
        if found is not None:
            yield found
        waiting += [following for following, _ in node.next_functions]


class _Along(torch.autograd.Function):
    """Of tensors, with the given gradient for each; as a number, `value`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "differentiated once"
        return None, None, *(g * outer[0].to(g.dtype) for g in gradients)
