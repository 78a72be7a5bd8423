"""The step as a person would write it in plain torch: what wrap() is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tram_ds.algorithms.stepper import wrap

RHO, LR = 0.5, 0.1
Forward = Callable[[Any, Any], Any]


def sam_step(model, optimizer, batches, forward, rho=RHO):
    def gradient():
        optimizer.zero_grad()
        found = [forward(model, batch) for batch in batches]
        (sum(loss for loss, _, _ in found) / sum(count for _, count, _ in found)).backward()

    gradient()  # pass 1, at theta
    buffers = [b.clone() for b in model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    theta = [p.detach().clone() for p in trained]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in trained]
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    with torch.no_grad():
        for p, g in zip(trained, grads, strict=True):
            p.add_(rho * g / (norm + 1e-12))
    gradient()  # pass 2, at theta + epsilon
    with torch.no_grad():
        for now, before in zip([*trained, *model.buffers()], [*theta, *buffers], strict=True):
            now.copy_(before)
    optimizer.step()


def forward(model: Any, batch: Any) -> tuple[Tensor, int, Tensor]:
    """Summed cross-entropy over (inputs, classes)."""
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1], reduction="sum"), len(logits), logits


def batches(n: int = 2, rows: int = 6, d: int = 5, classes: int = 3, seed: int = 1) -> list[Any]:
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, d, generator=made), torch.randint(classes, (rows,), generator=made))
        for _ in range(n)
    ]


def mlp(*norm: nn.Module, seed: int = 0, d: int = 5, h: int = 8, c: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, h), *norm, nn.Tanh(), nn.Linear(h, c))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=LR)


def gap(one: Any, other: Any) -> float:
    """Largest difference of two models' parameters and buffers."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def agree(
    make: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    data: Sequence[Any] | None = None,
    run: Forward = forward,
    between: Callable[[int, nn.Module, torch.optim.Optimizer], None] | None = None,
    steps: int = 3,
) -> float:
    """gap() of `steps` steps by hand and by wrap(), parameters and buffers. between(step, model,
    optimizer): what the user does before each step."""
    data = batches() if data is None else data
    ours, theirs = make(), make()
    hand, wrapped = optimizer(ours), optimizer(theirs)
    stepper = wrap(theirs, wrapped, "sam", rho=RHO)
    for step in range(steps):
        if between:
            between(step, ours, hand)
            between(step, theirs, wrapped)
        sam_step(ours, hand, data, run)
        stepper.step(data, run)
    return gap(ours, theirs)


def frozen_copy(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())
