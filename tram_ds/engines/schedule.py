"""The learning rate of the step that comes."""

from __future__ import annotations

from collections.abc import Callable

import torch

Schedule = Callable[[int], float]  # optimizer steps taken so far -> factor on every group's lr


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule | None, steps: int) -> float:
    """Every group's lr at step `steps`; returns the first one's, NaN where the optimizer sets its
    own (Adafactor)."""
    groups = optimizer.param_groups
    if schedule is not None:
        for group in groups:
            # where torch's own schedulers keep the rate they multiply
            base = group.setdefault("initial_lr", group["lr"])
            group["lr"] = base * schedule(steps)
    lr = groups[0]["lr"]
    return float("nan") if lr is None else float(lr)
