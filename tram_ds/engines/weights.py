"""What shardings do differently: theta, its gradient and its move on one of them. Engine has the
rest."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tram_ds.engines.optimizer_state import Extras
from tram_ds.engines.shards import Lazy, Shards


class Weights(Protocol):
    """theta on one sharding: what its fp32 masters are, how their gradient comes about, how they
    move."""

    model: Any  # what a forward pass calls: the wrapped module
    module: nn.Module  # the bare module inside, for its hooks, modes and names
    device: torch.device
    rank: int
    world_size: int
    group: Any | None  # the data-parallel ranks; None: all of the job
    dtype: torch.dtype  # of the working copy
    # the ranks over which masters() are cut into pieces; None: every rank has all of them
    shard_group: Any | None
    writes: bool  # this rank's pieces are the ones to write where replicas hold the same
    replicas: int  # ranks that hold the same piece
    whole_gradients: bool  # a rank can have a whole gradient of its own
    separate: bool  # masters and working copy are different memory: a move needs no copy of theta
    optimizer: torch.optim.Optimizer  # the torch optimizer whose groups move the weights

    def masters(self) -> Shards:
        """Live."""
        ...

    def working(self) -> Lazy: ...
    def gradient(self) -> Shards:
        """Live: of the sum over the global batch, in the engine's own precision; zeros where a
        parameter got none."""
        ...

    def put(self, gradient: Shards | Lazy) -> None:
        """gradient() := this, of all passes since the step began."""
        ...

    def write(self, values: Shards | Lazy) -> None:
        """Working copy := values, for every rank's next forward pass. Collective."""
        ...

    def restore(self, theta: Shards) -> None:
        """Working copy := masters again, which are `theta`, bit for bit. Collective."""
        ...

    def autocast(self) -> AbstractContextManager[Any]: ...
    def clear(self) -> None: ...
    def ahead(self, last: bool, local_only: bool) -> None:
        """Before the forward pass of a micro-batch. last: of its pass. local_only: nothing is
        reduced."""
        ...

    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> None:
        """One base-optimizer step by gradient(), published. A parameter that got no gradient is
        passed over, as torch does."""
        ...

    def moments(self) -> dict[str, Shards]: ...
    def extras(self, steps: int) -> Extras: ...
    def load(self, params: Shards, moments: dict[str, Shards], steps: int, extras: Extras) -> None:
        """Masters and moments := these, published. Collective."""
        ...

    def follow(self) -> bool:
        """Whether the trained parameters are others than at the last call; ValueError where the
        change cannot be followed."""
        ...

    def frozen(self) -> Shards:
        """This rank's pieces of the parameters that are not trained, in the engine's precision;
        over the ranks of a shard group each element is there once."""
        ...
