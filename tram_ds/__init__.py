"""TRAM (Trust Region Aware Minimization, arXiv 2310.03646) and its peers on sharded training engines."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Output", "StepReport", "Stepper", "wrap"]

_HOME = {
    "Output": "tasks.protocol",
    "StepReport": "algorithms.step",
    "Stepper": "algorithms.stepper",
    "wrap": "algorithms.stepper",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: reading a recipe should not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tram_ds' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tram_ds.{_HOME[name]}"), name)
    globals()[name] = value
    return value
