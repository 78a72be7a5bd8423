"""A model of which each micro-batch reaches a part: every engine's gradient is the whole pass's,
and nothing of the pass before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import build
from tests.wrap.hand import LR, RHO, sam_step, sgd
from tram_ds.algorithms.stepper import Stepper
from tram_ds.checkpoint.export import full_state

# which branch each micro-batch of a step takes: one a step, and the other one in the next; both,
# each of them last once, and one of them in no other but the first or the last
STEPS = ("a", "b", "ba", "ab", "aab", "bba", "aa")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 7)
        self.branches = nn.ModuleDict({name: nn.Linear(7, 3) for name in "ab"})

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return self.branches[branch](torch.tanh(self.trunk(x)))


def forward(model: Any, batch: Any) -> tuple[Tensor, int, Tensor]:
    logits = model(batch[0], batch[2])
    return F.cross_entropy(logits, batch[1], reduction="sum"), len(logits), logits


def rows(rank: int, step: int) -> list[Any]:
    made = torch.Generator().manual_seed(10 * step + rank)
    count = 4 - 2 * rank
    return [
        (torch.randn(count, 5, generator=made), torch.randint(3, (count,), generator=made), branch)
        for branch in STEPS[step]
    ]


def gap(built: Callable[[nn.Module], Stepper]) -> tuple[str, float]:
    """From the steps by hand over the rows of all ranks, the largest over parameters."""
    stepper, hand = built(Branches()), Branches()
    optimizer = sgd(hand)
    for step in range(len(STEPS)):
        stepper.step(rows(dist.get_rank(), step), forward)
        everywhere = [b for rank in range(dist.get_world_size()) for b in rows(rank, step)]
        sam_step(hand, optimizer, everywhere, forward)
    state = full_state(stepper.engine)
    names = dict(hand.named_parameters())
    worst = max((float((v - names[k].detach()).abs().max()) for k, v in state.items()), default=0.0)
    build.stop(stepper)
    return "holds", worst


def of(engine: str) -> tuple[str, float]:
    """Of an engine of tests/parity/build.py."""
    made = lambda p: torch.optim.SGD(p, lr=LR)  # noqa: E731
    return gap(lambda model: build.stepper(engine, model, "sam", 1, optimizer=made, rho=RHO))
