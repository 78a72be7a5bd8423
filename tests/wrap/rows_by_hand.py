"""Steps of the other rows as a person would write them in plain torch, beside hand.sam_step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.wrap.hand import Forward
from tram_ds.models.randomness import StepRandomness

RADIUS = {"sam": 0.5, "asam": 0.5, "fsam": 0.1}
ROWS = ("sam", "asam", "fsam", "trpo", "mesa", "tram_prev", "tram_x")
WEIGHT, DECAY, ETA, SIGMA, SCALE = 0.1, 0.5, 0.1, 0.2, 10.0
OPTIONS: dict[str, dict[str, float]] = {
    "sam": {"rho": RADIUS["sam"]},
    "mesa": {"decay": DECAY},
    "tram_prev": {"radius_scale": SCALE},  # as large as errors are that should be seen
    "tram_x": {"radius_scale": SCALE, "sigma": SIGMA},
}


@dataclass
class RowByHand:
    """One row over one model. site: the module whose output tram_x adds its noise to."""

    row: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward: Forward
    site: nn.Module
    steps: int = 0
    trained: list[nn.Parameter] = field(init=False)
    before: list[Tensor] = field(init=False)  # theta_{t-1}
    average: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.before = self.average = self.values()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trained]

    def put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.trained, values, strict=True):
                p.copy_(value)

    def step(self, batches: Sequence[Any]) -> None:
        theta, references = self.values(), self.references(batches)
        d = self.gradient(batches, references)  # pass 1, at theta
        buffers = [b.clone() for b in self.model.buffers()]
        if self.row not in ("trpo", "mesa"):
            # the paper's d <= rho, 0.5 unless radius_max says otherwise
            radius = RADIUS[self.row] if self.row in RADIUS else (SCALE * d).clamp(max=0.5)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
            self.put(
                [t + e for t, e in zip(theta, self.epsilon(theta, grads, radius), strict=True)]
            )
            self.gradient(batches, None)  # pass 2, at theta + epsilon
            self.put(theta)
            for now, kept in zip(self.model.buffers(), buffers, strict=True):
                now.copy_(kept)
        self.optimizer.step()
        self.before, self.steps = theta, self.steps + 1
        pairs = zip(self.average, self.values(), strict=True)
        self.average = [DECAY * a + (1 - DECAY) * now for a, now in pairs]

    def references(self, batches: Sequence[Any]) -> list[Tensor] | None:
        """The logits that d is measured from."""
        buffers, theta = [b.clone() for b in self.model.buffers()], self.values()
        with torch.no_grad():
            if self.row == "tram_x":
                found = [self.noised(j, batch) for j, batch in enumerate(batches)]
            elif self.row in ("trpo", "tram_prev", "mesa"):
                self.put(self.average if self.row == "mesa" else self.before)
                self.model.eval()
                found = [self.forward(self.model, batch)[2] for batch in batches]
                self.model.train()
            else:
                return None
            self.put(theta)
            for now, kept in zip(self.model.buffers(), buffers, strict=True):
                now.copy_(kept)
        return found

    def noised(self, j: int, batch: Any) -> Tensor:
        def add(_: Any, __: Any, out: Tensor) -> Tensor:
            draws = StepRandomness(0, self.steps)
            return out + draws.noise(torch.empty(out.shape), j, SIGMA, "normal")

        handle = self.site.register_forward_hook(add)
        try:
            return self.forward(self.model, batch)[2]
        finally:
            handle.remove()

    def gradient(self, batches: Sequence[Any], references: list[Tensor] | None) -> Tensor:
        """Leaves the objective's in .grad; () the mean distance."""
        self.optimizer.zero_grad()
        found = [self.forward(self.model, batch) for batch in batches]
        loss = sum(loss for loss, _, _ in found) / sum(count for _, count, _ in found)
        d = torch.zeros(())
        if references is not None:
            kl = [divergence(r, out[2]) for r, out in zip(references, found, strict=True)]
            d = torch.stack(kl).sum() / sum(len(out[2]) for out in found)
        (loss + WEIGHT * d if self.row in ("trpo", "mesa") else loss).backward()
        return d.detach()

    def epsilon(self, theta: Any, g: list[Tensor], radius: Any) -> list[Tensor]:
        if self.row == "sam":
            weighted, direction = g, g
        elif self.row == "fsam":
            inverse = [1 / (1 + ETA * x**2) for x in g]
            weighted = [i.sqrt() * x for i, x in zip(inverse, g, strict=True)]
            direction = [i * x for i, x in zip(inverse, g, strict=True)]
        else:
            weighted = [t.abs() * x for t, x in zip(theta, g, strict=True)]
            direction = [t**2 * x for t, x in zip(theta, g, strict=True)]
        norm = torch.stack([x.double().square().sum() for x in weighted]).sum().sqrt()
        return [(radius / (norm + 1e-12)).to(x.dtype) * x for x in direction]


def divergence(reference: Tensor, current: Tensor) -> Tensor:
    """KL(reference || current), summed over positions."""
    p, q = reference.log_softmax(-1), current.log_softmax(-1)
    return (p.exp() * (p - q)).sum()
