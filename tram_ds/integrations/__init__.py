"""TRAM inside other people's trainers: transformers' Trainer, accelerate, Lightning, and forwards
for their models.

Whoever imports a name from here needs its library; nothing of tram_ds does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tram_ds.runtime.lazy import lazily

if TYPE_CHECKING:
    from tram_ds.integrations.accelerated import AcceleratedStepper
    from tram_ds.integrations.forwards import causal_lm, classification
    from tram_ds.integrations.lightning_callback import TramCallback
    from tram_ds.integrations.transformers_trainer import TramTrainer

__all__ = ["AcceleratedStepper", "TramCallback", "TramTrainer", "causal_lm", "classification"]

# each needs a library that others do without
__getattr__ = lazily(
    __name__,
    {
        "AcceleratedStepper": "accelerated",
        "TramCallback": "lightning_callback",
        "TramTrainer": "transformers_trainer",
        "causal_lm": "forwards",
        "classification": "forwards",
    },
)
