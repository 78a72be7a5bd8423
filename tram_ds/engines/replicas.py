"""Ranks that hold the same weights: found inside what a user wrapped, and compared.

Replicas drift apart without a word where nobody reduces their gradients, or where one of them was
loaded with something else. They are compared whole once, when they are wrapped, and then in a
sample that rides on a pass's own all-reduce: 4096 elements of one parameter a step, each in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tram_ds.engines.shards import Shards
from tram_ds.engines.weights import Weights

SAMPLE = 4096  # elements
# W squares of 16 bits, and the square of their sum, are exact in float64 up to W = 1448
BITS = 0xFFFF

DRIFTED = (
    "the ranks do not hold the same weights any more: something wrote the weights of one rank "
    "between two steps, or reduces only some of the gradients. Write on every rank alike, or "
    "broadcast from rank 0"
)


class Drift:
    """Whether the replicas of these weights hold the same, as far as the passes have told.

    alike: () bool on the device, since the last comparison: one a step, in its first all-reduce.
    """

    def __init__(self, weights: Weights):
        self.weights = weights
        self.alike = torch.ones((), dtype=torch.bool, device=weights.device)
        self._compared = False  # in this step

    def begin(self) -> None:
        """A step begins, at theta_t on every rank."""
        self._compared = False

    def reduced(
        self,
        found: Tensor,
        local_only: bool,
        data_sum: Callable[[Tensor], Tensor],
        turn: int,
    ) -> Tensor:
        """The sums of a pass over the ranks, with the sample along where its turn is. Collective,
        unless local_only."""
        weights, count = self.weights, self.weights.replicas
        if local_only or weights.world_size == 1:
            self._compared = True  # the next pass of this step may be at each rank's own epsilon
            return found
        if count == 1 or self._compared:
            return data_sum(found)
        self._compared = True
        # a row for each shard of the weights: under hybrid sharding a few ranks hold each alike
        shards = weights.world_size // count
        # rows apart, zeros in those of others: the sum over all ranks is each shard's own
        mine = torch.zeros(shards, 2, dtype=torch.float64, device=weights.device)
        own = 0 if weights.shard_group is None else dist.get_rank(weights.shard_group)
        mine[own] = sample(weights.masters(), turn)
        found = data_sum(torch.cat([found, mine.flatten()]))
        self.alike = alike(found[-2 * shards :].view(shards, 2), count)
        return found[: -2 * shards]


def _digest(piece: Tensor) -> Tensor:
    """() int64 of the bits of `piece`: equal bits, equal digest. No host synchronisation."""
    # whole numbers: unlike a sum of floats, theirs is the same in any order, and may wrap
    bits = torch.int64 if piece.element_size() == 8 else torch.int32
    return piece.detach().contiguous().view(-1).view(bits).sum(dtype=torch.int64)


def sample(theta: Shards, turn: int) -> Tensor:
    """(2,) float64: a digest of the next piece's first elements, and its square."""
    if not len(theta):
        return torch.zeros(2, dtype=torch.float64)
    piece = theta[turn % len(theta)].detach()
    flat = piece if piece.numel() <= SAMPLE else piece.as_strided((SAMPLE,), (1,))
    digest = (_digest(flat) & BITS).double()
    return torch.stack([digest, digest.square()])


def alike(sums: Tensor, count: int) -> Tensor:
    """() bool: whether in every row the `count` samples that add up to `sums` (R, 2) were all the
    same: only then is the mean of squares the square of the mean."""
    total, squares = sums.unbind(-1)
    return (squares * count == total.square()).all()


def refuse_unlike(theta: Shards, group: Any | None, device: torch.device) -> None:
    """ValueError, on every rank alike, where the ranks of `group` do not hold the same theta.
    Collective: one all-reduce of two numbers."""
    # weighed by place, or two pieces that are swapped would add up alike
    digests = [_digest(piece) * (index + 1) for index, piece in enumerate(theta)]
    mine = torch.stack(digests).sum() if digests else torch.zeros((), dtype=torch.int64)
    both = torch.stack([mine, -mine]).to(device)
    # max(x) - min(x) in one reduction: 0 only where every rank has the same
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    if int(both.sum()):
        raise ValueError(
            "the ranks do not hold the same weights: load the same on every rank before wrap(), or "
            "wrap in DistributedDataParallel after loading, which broadcasts rank 0's"
        )


def uncompiled(model: Any) -> Any:
    """The module inside torch.compile's wrapper, or `model` itself."""
    if not isinstance(model, nn.Module):
        return model
    # not getattr: DeepSpeedEngine's __getattr__ answers for the module inside it
    return vars(model).get("_modules", {}).get("_orig_mod", model)


def unwrapped(model: Any) -> nn.Module:
    """The bare module inside torch.compile's and DistributedDataParallel's wrappers, in any
    order."""
    while True:
        inner = uncompiled(model)
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
        if inner is model:
            return model
        model = inner


def reducers(model: nn.Module) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel in `model`, itself included. ValueError where they leave out a
    trainable parameter, or where there is none in a job of several ranks."""
    found = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if not found:
        refuse_alone(model)
        return []
    inside = {p for m in found for p in m.parameters()}
    outside = [n for n, p in model.named_parameters() if p.requires_grad and p not in inside]
    if outside:
        raise ValueError(
            f"{outside[0]} lies outside the DistributedDataParallel inside this module "
            f"({len(outside)} parameters do), so its ranks would drift apart: wrap the whole "
            "module in DistributedDataParallel"
        )
    if len({m.process_group for m in found}) > 1:
        raise ValueError(
            "this module has DistributedDataParallel parts over different process groups: use one"
        )
    return found


def refuse_alone(model: nn.Module) -> None:
    """ValueError for a plain module in a job of several ranks: every rank would train a model of
    its own."""
    here = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if here else int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1 and (here or "RANK" in os.environ):
        raise ValueError(
            f"a plain {type(model).__name__} in a job of {world} ranks (WORLD_SIZE) would become "
            f"{world} different models: wrap it in DistributedDataParallel or fully_shard it first"
        )
