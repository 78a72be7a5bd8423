"""Bytes on one GPU that grow with the micro-batch: activations kept for the backward pass, and
logits, whole or in chunks."""

from __future__ import annotations

from dataclasses import dataclass

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.reference import NoiseReference
from tram_ds.models.logit_chunks import CHUNK_ELEMENTS
from tram_ds.planning.setup import FP32, RunSetup
from tram_ds.planning.sizes import ModelSize

# fp32 copies of logits while a distance is measured: both sides, their log-softmax, their
# difference
COMPARING = 5
# bytes: tram_ds.algorithms.distance works on whole logits in chunks of this much fp32
COMPARED = 64 * 2**20


def activations(setup: RunSetup, size: ModelSize, row: Algorithm) -> tuple[int, int]:
    """(kept for the backward pass, recomputed during it): with checkpointing the blocks' inputs,
    and one block at a time."""
    # a reference that a gradient flows through keeps its own graph until that is taken
    graphs = 1 + row.through_reference
    block = size.block_input if setup.checkpointing else size.saved_block
    return graphs * (
        block * size.layers + size.saved_rest
    ), size.saved_block if setup.checkpointing else 0


@dataclass(frozen=True)
class Logits:
    """Bytes of a micro-batch's logits at its loss, while a distance is measured, and until the
    backward pass has read them.

    head: of the output head's gradient, which chunks make on the way forward.
    """

    loss: int
    compared: int
    backward: int
    head: int


def logits(setup: RunSetup, size: ModelSize, row: Algorithm) -> Logits:
    """As `distance` and `chunked` compute them."""
    one, working = size.positions * size.classes, setup.working
    noised = any(isinstance(r.reference, NoiseReference) for r in row.regions)
    # with a graph nothing is computed in place
    comparing = COMPARING + 2 * (row.penalty is not None)
    if not size.chunked:
        compared = one * (working * (1 + noised) + FP32) + comparing * min(COMPARED, FP32 * one)
        # logits that a penalty's gradient is recomputed from
        differentiated = 0 if row.penalty is None else 1 + noised
        return Logits((3 * FP32 + working * differentiated) * one, compared, working * one, 0)
    chunk = min(CHUNK_ELEMENTS["cuda"], one)
    head = size.classes * size.width * size.head_trained
    states = size.positions * size.width * working
    gradient = (1 + row.through_reference) * states
    # a chunk's share of the head's gradient, not yet added
    added = head * working + 2 * chunk * working if setup.half else 0
    # beside the loss's own chunk, that of pass 1's logits
    own = (3 * FP32 + working * (1 + row.stored_gradient)) * chunk
    loss = gradient + max(own, added)
    return Logits(
        loss, gradient + noised * states + (comparing + 2) * FP32 * chunk, gradient, FP32 * head
    )
