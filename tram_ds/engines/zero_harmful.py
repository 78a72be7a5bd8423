"""What of a DeepSpeed config's zero_optimization cannot be trained right with two passes a step.
This file imports neither torch nor deepspeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

HARMFUL: dict[str, tuple[Callable[[Any], bool], str]] = {  # key -> whether it is on, why not
    "round_robin_gradients": (bool, "it makes DeepSpeed address the wrong parameters"),
    "zero_quantized_weights": (bool, "quantised weights lose the perturbation"),
    "zero_quantized_nontrainable_weights": (bool, "quantised weights lose the perturbation"),
    "zero_quantized_gradients": (bool, "quantised gradients change the perturbation"),
    "zero_hpz_partition_size": (
        lambda value: isinstance(value, int) and value > 1,
        "the second copy of the weights, which passes gather from, is not perturbed",
    ),
    "mics_shard_size": (
        lambda value: isinstance(value, int) and value > 0,
        "it has not been verified that its groups of ranks take the same step",
    ),
}


def harmful(section: Mapping[str, Any]) -> str | None:
    """The first such setting of `section`, why, and the way out."""
    for key, (on, reason) in HARMFUL.items():
        if on(section.get(key)):
            said = str(section[key]).lower()  # as JSON has it
            return f"zero_optimization.{key} = {said} is refused: {reason}; leave it out"
    return None
