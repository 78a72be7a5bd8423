"""How large a trust region's radius is: from the distance d_t to a length. Every rule is a function
of d_t and of what it has seen, and what it has seen is replaced once a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DECAY = 0.99  # of the running mean of `relative`, per step: a memory of about a hundred steps


class Rule(Protocol):
    """seen: (2,) float64, a weighted sum of distances and the sum of the weights; zeros at first.
    The same on every rank, because d is."""

    def radius(self, d: Tensor, seen: Tensor) -> Tensor:
        """() float64, of the step whose distance is d."""
        ...

    def after(self, d: Tensor, seen: Tensor) -> Tensor:
        """`seen` when the step whose distance is d is over."""
        ...


@dataclass(frozen=True)
class Scaled:
    """radius = scale d_t (the paper's Eq. 7 where scale is 1). Remembers nothing."""

    scale: float = 1.0

    def radius(self, d: Tensor, seen: Tensor) -> Tensor:
        return d * self.scale

    def after(self, d: Tensor, seen: Tensor) -> Tensor:
        return seen


@dataclass(frozen=True)
class Relative:
    """radius = rho d_t / (running mean of d up to t): the trust region's shape in time, with ASAM's
    size on any model.

    The mean is exponential with DECAY, corrected for its start as Adam's are, so the first distance
    above 0 has radius rho. A distance that is 0 or not finite is not counted.
    """

    rho: float

    def radius(self, d: Tensor, seen: Tensor) -> Tensor:
        return _relative(self.rho, d, self.after(d, seen))

    def after(self, d: Tensor, seen: Tensor) -> Tensor:
        # both decay alike, so their quotient is a mean from the first step on
        return _counted(d, seen, DECAY * seen + (1 - DECAY) * _once(d))


@dataclass(frozen=True)
class Calibrated:
    """radius = scale d_t, where scale is rho / (mean of the first `steps` distances above 0): that
    of ASAM's |epsilon| over these. Until then the mean is of those so far."""

    rho: float
    steps: int

    def radius(self, d: Tensor, seen: Tensor) -> Tensor:
        return _relative(self.rho, d, self.after(d, seen))

    def after(self, d: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen[1] < self.steps, _counted(d, seen, seen + _once(d)), seen)

    def scale(self, seen: Tensor) -> float | None:
        """rho over the mean of the distances so far; None before the first. Host-synchronising."""
        total, count = seen.tolist()
        return self.rho * count / total if count else None


def nothing(like: Tensor) -> Tensor:
    """`seen` before the first step."""
    return torch.zeros(2, dtype=torch.float64, device=like.device)


def _once(d: Tensor) -> Tensor:
    return torch.stack([d, torch.ones_like(d)])


def _counted(d: Tensor, seen: Tensor, more: Tensor) -> Tensor:
    """`more` where d is a distance; without a question to the device."""
    return torch.where(torch.isfinite(d) & (d > 0), more, seen)


def _relative(rho: float, d: Tensor, seen: Tensor) -> Tensor:
    """0 where nothing above 0 was seen; NaN stays NaN, and its step is skipped."""
    total, weight = seen.unbind()
    # clamped, not tested: 0 * (0 / tiny) is 0, and no question to the device
    return rho * d * (weight / total.clamp(min=torch.finfo(torch.float64).tiny))
