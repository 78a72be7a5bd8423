"""accelerate's DeepSpeed plugin, which Trainer's `deepspeed` is as well.

The engine that accelerate prepares is wrapped, and steps inside Stepper.step, with the scheduler
that it may have; what accelerate would call of it, backward() and step() behind it, is not called.
"""

from __future__ import annotations

import os
from typing import Any


def refusals(accelerator: Any) -> list[tuple[Any, str]]:
    """(whether it is so, what is said) of the plugin, if there is one."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        # without GPUs accelerate lets go of it and says nothing: the variable tells what was asked
        wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        return [
            (
                wanted,
                "deepspeed: accelerate runs it on the GPUs of a job alone, and here would train "
                "whole weights without a word: start it with torchrun on GPUs, or leave deepspeed "
                "out",
            )
        ]
    stage = plugin.get_value("zero_optimization.stage", 0)
    parts = plugin.get_value("tensor_parallel.autotp_size", 0)
    return [
        (
            stage not in (1, 2, 3),
            f"deepspeed: zero_optimization.stage {stage} shards nothing, and a resume of it would "
            "lose the optimizer's state: use stage 1, 2 or 3, or leave deepspeed out (DDP)",
        ),
        (
            parts > 1,
            f"deepspeed: tensor_parallel.autotp_size {parts}: its ranks share a batch, which "
            "wrap() does not know: leave it out",
        ),
    ]


def clip_norm(accelerator: Any, asked: float | None) -> float | None:
    """What the second gradient is clipped to: as asked, or what DeepSpeed's config says (None
    leaves it to wrap). ValueError where both say something, and not the same."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    told = None if plugin is None else plugin.get_value("gradient_clipping")
    if asked is not None and told and float(told) != asked:
        raise ValueError(
            f"clip_norm {asked} and gradient_clipping {told} of DeepSpeed's config, which "
            "accelerate fills in as 1.0 where it says auto: leave clip_norm out, or say the same"
        )
    return asked


def set_clip_norm(accelerator: Any, norm: float) -> None:
    """DeepSpeed's config clips to `norm` where it says nothing, and not to DeepSpeed's own
    default, which is for a norm of 0 too."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        # setdefault: what the user's config says is compared with clip_norm above, and stays
        plugin.deepspeed_config.setdefault("gradient_clipping", norm)


def bare(optimizer: Any) -> Any:
    """The torch optimizer in what accelerate has wrapped."""
    wrapped = getattr(optimizer, "optimizer", optimizer)
    return wrapped.optimizer if _of_deepspeed(optimizer) else wrapped


def note_skipped(optimizer: Any, skipped: bool) -> None:
    """What accelerate's schedulers and Trainer ask the optimizer that accelerate has wrapped.

    Say False before a step: DeepSpeed's engine asks too, and moves no scheduler after it.
    """
    optimizer._is_overflow = skipped
    if _of_deepspeed(optimizer):
        # accelerate asks for `overflow` only if it was there when it wrapped the optimizer
        optimizer.__has_overflow__ = True
        optimizer.optimizer.overflow = skipped


def _of_deepspeed(optimizer: Any) -> bool:
    """Whether accelerate has wrapped what DeepSpeed has wrapped."""
    return hasattr(optimizer, "__has_overflow__")
