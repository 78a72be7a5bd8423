"""Base optimizers, their parameter groups, and learning-rate schedules as pure functions of the
step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tram_ds.engines.schedule import Schedule
from tram_ds.recipe.sections import OptimizerSection, ScheduleSection


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_filter: str
) -> list[dict[str, Any]]:
    """One group, or two where only matrices decay (biases and norms do not). Call it before the
    parameters are flattened."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not weight_decay or decay_filter == "all":
        return [{"params": parameters, "weight_decay": weight_decay}]
    groups = [
        {"params": [p for p in parameters if _rank(p) > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if _rank(p) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _rank(parameter: nn.Parameter) -> int:
    """Dimensions of the whole: a partition of ZeRO-3 is flat, and remembers its shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def make(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's base optimizer over the trainable parameters of `model`."""
    groups = parameter_groups(model, section.weight_decay, section.decay_filter)
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=section.lr, betas=section.betas, eps=section.eps)


def schedule(section: ScheduleSection, peak_lr: float, total_steps: int) -> Schedule:
    """step -> factor on the learning rate: linear warm-up from 0 over warmup_steps, then the curve
    down to end_lr.

    The last of `total_steps` steps is taken at one curve step before end_lr, as Hugging Face's
    schedules do.
    """
    # a factor, not a rate: engines multiply every group's own lr by it
    warmup, end = section.warmup_steps, section.end_lr / peak_lr if peak_lr else 0.0
    curves = {
        "constant": lambda left: 1.0,
        "linear": lambda left: end + (1.0 - end) * left,
        "polynomial": lambda left: end + (1.0 - end) * left**section.power,
        "cosine": lambda left: end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * (1.0 - left))),
    }
    curve = curves[section.name]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        # max: a warm-up as long as the run leaves no curve
        left = (total_steps - step) / max(1, total_steps - warmup)
        return curve(min(1.0, max(0.0, left)))

    return factor
