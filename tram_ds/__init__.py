"""TRAM (Trust Region Aware Minimization, arXiv 2310.03646) and its peers on sharded training
engines.

What a loop of one's own imports: `wrap` makes a `Stepper`, whose `step` gives a `StepReport`; a
`forward` returns an `Output`, or is a `Chunked`, which never holds all the logits of a language
model at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tram_ds.runtime.lazy import lazily

if TYPE_CHECKING:
    from tram_ds.algorithms.step import StepReport
    from tram_ds.algorithms.stepper import Stepper, wrap
    from tram_ds.models.chunked import Chunked
    from tram_ds.models.output import Output

__version__ = "0.1.0"
__all__ = ["Chunked", "Output", "StepReport", "Stepper", "wrap"]

# reading a recipe should not wait for torch
__getattr__ = lazily(
    __name__,
    {
        "Chunked": "models.chunked",
        "Output": "models.output",
        "StepReport": "algorithms.step",
        "Stepper": "algorithms.stepper",
        "wrap": "algorithms.stepper",
    },
)
