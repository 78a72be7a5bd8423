"""Memory, traffic and hours of a run at any number of GPUs, from its recipe alone, before a GPU is
asked for.

Imports recipe and below.
"""

from __future__ import annotations

from typing import Any


def rank_bytes(recipe: Any, world: int) -> int:
    """Bytes one GPU of `world` needs for everything that does not depend on the batch; activations
    and logits come on top."""
    # lazily: plan imports the engines, which import nothing of this
    from tram_ds.planning.plan import rank_bytes as planned

    return planned(recipe, world)
