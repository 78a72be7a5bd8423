"""Parameters that a torch optimizer steps, one tensor each: what replicated and FSDP2 weights have
in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tram_ds.engines import optimizer_state
from tram_ds.engines.optimizer_state import Extras
from tram_ds.engines.shards import Lazy, Shards, Span


def local(t: Tensor) -> Tensor:
    """This rank's part."""
    return t._local_tensor if isinstance(t, DTensor) else t


@dataclass
class TorchWeights:
    """names: parameter -> unsharded name; layout: a Span for each of them; view: a tensor of a
    parameter's kind (its data, gradient or moment) -> this rank's piece, in memory order."""

    optimizer: torch.optim.Optimizer
    names: dict[nn.Parameter, str]
    layout: tuple[Span, ...]
    view: Callable[[Tensor], Tensor]
    # parameters that got no gradient in this pass: torch's optimizers pass them over, so that no
    # weight decay and no momentum moves what nothing depends on
    absent: set[nn.Parameter] = field(default_factory=set)
    # those that got one in some pass since the last step
    reached: set[nn.Parameter] = field(default_factory=set)

    def masters(self) -> Shards:
        # viewed anew: FSDP2's first forward may pad or pin a shard, in other memory
        return Shards((self.view(p.detach()) for p in self.names), self.layout)

    def gradient(self) -> Shards:
        """Live, dense, in the parameters' own memory order; zeros for the absent ones."""
        for p in self.names:
            if p.grad is None:
                self.absent.add(p)
                # so that every piece has a gradient to be measured and scaled; step() takes it away
                p.grad = torch.zeros_like(p)
                continue
            if p not in self.absent:
                self.reached.add(p)
            # autograd may lay it out in another order, or sparse (nn.Embedding(sparse=True))
            if not isinstance(p.grad, DTensor) and _unlike(p.grad, p):
                p.grad = _placed(p.grad, p)
        return Shards(
            (self.view(p.grad.detach()) for p in self.names if p.grad is not None), self.layout
        )

    def put(self, gradient: Shards | Lazy) -> None:
        """The sum of several passes' gradients: absent is what none of them reached."""
        self.gradient().copy_(gradient)
        self.absent -= self.reached

    def clear(self) -> None:
        """No gradient of any parameter: what an optimizer does not hold must not add up either."""
        for p in self.names:
            p.grad = None
        self.absent.clear()

    def step(self) -> None:
        for p in self.absent:
            p.grad = None
        self.optimizer.step()
        self.reached.clear()

    def moments(self) -> dict[str, Shards]:
        found = optimizer_state.named_moments(self.optimizer, list(self.names))
        return {
            key: Shards((self.view(t) for t in tensors), self.layout)
            for key, tensors in found.items()
        }

    def extras(self, steps: int) -> Extras:
        return optimizer_state.named_extras(self.optimizer, self.names, steps)

    def load(
        self, params: Shards, moments: Mapping[str, Shards], steps: int, extras: Extras
    ) -> None:
        """State only; the caller writes `params`."""
        optimizer_state.load_state(self.optimizer, self.names, moments, steps, extras)

    def held(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _unlike(gradient: Tensor, parameter: Tensor) -> bool:
    return gradient.layout != torch.strided or (
        gradient.stride() != parameter.stride() and gradient.numel() > 1
    )


def _placed(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Dense, with the parameter's strides: flat views of both then run over the same elements."""
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return torch.empty_like(parameter, dtype=dense.dtype).copy_(dense)
