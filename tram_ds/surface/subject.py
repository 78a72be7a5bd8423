"""What every analysis looks at: a model inside an engine, and the rows of one domain, split over
ranks.

Rows are cut into micro-batches in their own order and each rank takes a contiguous block of those,
so the micro-batches, their padding and their dropout masks are the same at any world size that
divides their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards
from tram_ds.engines.sums import MicroBatchSums
from tram_ds.models.passes import Forward, ForwardContext
from tram_ds.models.randomness import StepRandomness

BLOCK = 1 << 14  # random numbers drawn from one generator seed
Share = list[tuple[range, int]]  # (row numbers, weight) of each micro-batch of a rank


@dataclass(frozen=True)
class Subject:
    """The loss of `engine`'s model on one domain, as a function of the weights.

    forward: (model, batch) -> Output. batch: row numbers -> a micro-batch on the engine's device.
    rows: how many there are.
    micro_batch: rows of one forward pass on one rank. seed: of dropout in train mode, and of random
    directions.
    Every method is collective: all ranks call it, with Shards of their own pieces; scalars come out
    the same on all.
    """

    engine: Engine
    forward: Forward
    batch: Callable[[Sequence[int]], Any]
    rows: int
    micro_batch: int
    seed: int = 0

    def first(self, rows: int | None) -> Subject:
        """The same on the first `rows` rows; None, or more than there are, means all."""
        return self if rows is None else replace(self, rows=min(rows, self.rows))

    def at(self, weights: Shards | None) -> AbstractContextManager[None]:
        """Inside, the model has these weights; None leaves it where it is."""
        return nullcontext() if weights is None else self.engine.moved(to=weights)

    def loss(self, at: Shards | None = None) -> float:
        """Mean task loss per counted target over all rows, in eval mode, summed in float64."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        share = self.share(0, self.rows)
        with torch.no_grad(), self.at(at):
            for index, (rows, weight) in enumerate(share):
                output = self.run(len(share))(
                    index, self.batch(rows), masks="analysis", train=False
                )
                count = torch.as_tensor(output.count, device=output.loss_sum.device)
                if weight:
                    sums += torch.stack([output.loss_sum.double(), count.double()])
        loss_sum, count = self.engine.data_sum(sums).tolist()
        return loss_sum / max(count, 1.0)

    def gradient(
        self, at: Shards | None = None, start: int = 0, stop: int | None = None, train: bool = False
    ) -> Shards:
        """Gradient of the mean loss per counted target over rows [start, stop), as new Shards.
        train: with dropout."""
        share = self.share(start, self.rows if stop is None else stop)
        run = self.run(len(share), step=start)

        def objective(index: int, one: tuple[range, int]) -> MicroBatchSums:
            rows, weight = one
            output = run(index, self.batch(rows), masks="analysis", train=train)
            # float64, because it is stacked with the float64 loss and summed over ranks
            count = torch.as_tensor(output.count, dtype=torch.float64, device=self.engine.device)
            loss, zero = output.loss_sum.detach().double(), torch.zeros_like(count)
            return MicroBatchSums(
                # times 0, not left out: the backward's collectives need this rank too
                output.loss_sum * weight,
                torch.stack([loss.to(count.device), count, zero, zero]) * weight,
            )

        with self.at(at):
            self.engine.backward(share, objective)
            gradient = self.engine.grads().realise()
        self.engine.clear()
        return gradient

    def share(self, start: int, stop: int) -> Share:
        """This rank's micro-batches of rows [start, stop), as many on every rank; one too many
        repeats a row, weight 0."""
        if self.micro_batch < 1 or stop <= start:
            raise ValueError(
                f"rows [{start}, {stop}) in micro-batches of {self.micro_batch}: at least one row "
                "is needed in each"
            )
        cuts = [
            range(a, min(a + self.micro_batch, stop)) for a in range(start, stop, self.micro_batch)
        ]
        # rounded up: a sharded forward is collective, so every rank runs as many
        each = -(-len(cuts) // self.engine.world_size)
        mine = cuts[self.engine.rank * each : (self.engine.rank + 1) * each]
        return [(rows, 1) for rows in mine] + [(range(start, start + 1), 0)] * (each - len(mine))

    def run(self, micros: int, step: int = 0) -> ForwardContext:
        """The forward pass for `micros` micro-batches on each rank."""
        return ForwardContext.over(
            self.engine, self.forward, StepRandomness(self.seed, step, self.engine.rank * micros)
        )


def normal(key: str, start: int, length: int) -> Tensor:
    """(length,) float32 on the CPU: elements [start, start + length) of the endless N(0, 1)
    sequence named `key`."""
    if not length:
        return torch.empty(0)
    # by whole blocks: a piece has the same numbers wherever sharding cuts the parameter
    first, last = start // BLOCK, (start + length - 1) // BLOCK
    blocks = [
        torch.randn(BLOCK, generator=_generator(f"{key}/{number}"))
        for number in range(first, last + 1)
    ]
    return torch.cat(blocks)[start - first * BLOCK :][:length]


def random_direction(engine: Engine, seed: int, purpose: str) -> Shards:
    """N(0, 1) for every parameter element: a function of (seed, purpose, parameter, element),
    whatever the layout. Local."""

    def piece(span: Any, like: Tensor) -> Tensor:
        values = normal(f"{seed}/{purpose}/{span.name}", span.start, span.length)
        return values.to(like.device, like.dtype).view(like.shape)

    return engine.params().map(piece)


def parameter_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Every trainable parameter's whole shape, in the same order on every rank, whatever this rank
    holds of it. Local."""
    parameters = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}


def shard_sum(engine: Engine, x: Tensor) -> Tensor:
    """The sum of x over the ranks that hold different pieces of the weights, as a new tensor.
    Collective over shard_group."""
    # copy: all_reduce writes into what it is given, which is the caller's
    x = x.detach().to(engine.device, copy=True)
    if engine.shard_group is not None:
        dist.all_reduce(x, group=engine.shard_group)
    return x


def dots(engine: Engine, a: Sequence[Shards], b: Sequence[Shards]) -> Tensor:
    """(len(a), len(b)) float64 on the CPU: inner products of vectors of all parameters. One sum
    over shard_group."""
    own = torch.stack([torch.stack([x.dot(y).to(engine.device) for y in b]) for x in a])
    return shard_sum(engine, own).cpu()


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
