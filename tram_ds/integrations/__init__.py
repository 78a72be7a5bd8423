"""TRAM inside other people's trainers: transformers' Trainer, accelerate, Lightning, and forwards
for their models.

Whoever imports a name from here needs its library; nothing of tram_ds does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tram_ds.integrations.accelerated import AcceleratedStepper
    from tram_ds.integrations.forwards import causal_lm, classification
    from tram_ds.integrations.lightning_callback import TramCallback
    from tram_ds.integrations.transformers_trainer import TramTrainer

__all__ = ["AcceleratedStepper", "TramCallback", "TramTrainer", "causal_lm", "classification"]

_HOME = {
    "AcceleratedStepper": "accelerated",
    "TramCallback": "lightning_callback",
    "TramTrainer": "transformers_trainer",
    "causal_lm": "forwards",
    "classification": "forwards",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: each needs a library that others do without."""
    if name not in _HOME:
        raise AttributeError(f"module 'tram_ds.integrations' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tram_ds.integrations.{_HOME[name]}"), name)
    globals()[name] = value
    return value
