"""CPU memory of a node that a run takes for each of its GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.planning.model_states import copies, references, states
from tram_ds.planning.setup import FP32, RunSetup
from tram_ds.planning.sizes import ModelSize

# a checkpoint adds at most this, pieces of 16 MiB and what the allocator keeps of them: measured on
# two ranks by tests/bench/test_host_memory.py
SAVING = 64 << 20


@dataclass(frozen=True)
class Host:
    """Bytes for one GPU, apart from what Python and the libraries take themselves.

    drawn: at the start, where no file has the model (see `drawing`); where one has, a rank reads
    what it holds. offloaded: of all that is kept beside the GPU, throughout; torch may round
    page-locked tensors up to a power of two, which is not counted. saving: while a checkpoint is
    written, in the background or not.
    """

    drawn: int
    offloaded: int
    saving: int

    @property
    def peak(self) -> int:
        """Bytes of the larger: what was drawn is on the GPU before the optimizer makes its
        moments."""
        return max(self.drawn, self.offloaded + self.saving)


def drawing(setup: RunSetup, size: ModelSize) -> int:
    """Bytes that a rank adds at most while model.init is drawn: its shards, in fp32, and the
    largest tensor. What is whole on every GPU is drawn into the GPU's memory."""
    held = 0 if setup.shards == 1 else -(-size.parameters // setup.shards)
    return FP32 * (held + size.largest)


def host(setup: RunSetup, size: ModelSize, row: Algorithm, drawn: bool) -> Host:
    """drawn: the recipe names no file to read the weights from."""
    kept_here = replace(setup, offload_states=False, offload_parameters=False)
    offloaded = _kept(kept_here, size, row) - _kept(setup, size, row)
    return Host(drawing(setup, size) if drawn else 0, offloaded, SAVING)


def _kept(setup: RunSetup, size: ModelSize, row: Algorithm) -> int:
    """Bytes on the GPU that are there however large the batch is."""
    seen = references(setup, size, row)
    beside = seen.weights + max(seen.previous, seen.saved) + sum(copies(setup, size, row))
    return sum(states(setup, size, row).values()) + beside
