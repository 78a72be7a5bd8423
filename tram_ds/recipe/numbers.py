"""Which keys of a recipe decide what a run computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# keys that change where, how fast or how safely a run trains, not what it computes
SAME_NUMBERS = (
    "name",
    "run_dir",
    "engine",
    "tracking",
    "checkpoint",
    "eval.every_steps",
    "eval.domains",
    "eval.generate",
    "eval.batch",
    "eval.splits",
    "eval.initial",
    "model.activation_checkpointing",
    "model.attention",
    "task.cache_dir",
    "train.seed",
    "train.micro_batch",
    "train.log_every",
    "train.probe_every",
    "train.effect_every",
    "train.peak_tflops",
    "train.stop_after",
    "train.max_skipped",
    "train.timeout",
    "train.self_check",
)


def deciding(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The recipe without those keys: what all seeds of a method have in common."""
    return {
        key: deciding(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in recipe.items()
        if f"{prefix}{key}" not in SAME_NUMBERS
    }
