"""Bytes on one GPU of what a run keeps of the model: ZeRO's model states, the gradients kept beside
the one that is being made, and what references keep from step to step and during the passes."""

from __future__ import annotations

from dataclasses import dataclass

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.options import Climb
from tram_ds.algorithms.reference import Previous, WeightReference
from tram_ds.planning.setup import FP32, RunSetup
from tram_ds.planning.sizes import ModelSize


def fp32_shard(setup: RunSetup, size: ModelSize) -> int:
    """Bytes of a sharded fp32 copy of the parameters that train on this GPU."""
    return 0 if setup.offload_states else FP32 * -(-size.trained // setup.shards)


def states(setup: RunSetup, size: ModelSize, row: Algorithm) -> dict[str, int]:
    """By part, between two steps: fields of `memory.Memory`."""
    n, share = size.parameters, -(-size.parameters // setup.shards)
    shard, frozen = fp32_shard(setup, size), size.parameters - size.trained
    # what is frozen is where theta is, but for DeepSpeed's masters, which are of what trains
    beside = {"replicated": FP32 * frozen, "fsdp2": FP32 * -(-frozen // setup.shards)}
    masters = shard + (0 if setup.offload_states else beside.get(setup.engine, 0))
    moves = row.perturbs or any(
        isinstance(r.reference, WeightReference | Previous) for r in row.regions
    )
    # autocast keeps its casts of fp32 weights until it is left; FSDP2 casts what it gathers
    working = {
        "replicated": 2 * n if setup.half else 0,
        "fsdp2": 0,
        "zero3": 0 if setup.offload_parameters else share * setup.working,
    }
    plain = setup.engine == "zero0" and not setup.half  # the masters are the working copy
    whole = (frozen if plain else n) * setup.working
    return {
        "masters": masters,
        "moments": setup.kept * shard,
        "gradients": shard * setup.gradient // FP32,
        "working_copy": working.get(setup.engine, whole),
        "theta_snapshot": shard if moves and not setup.separate else 0,
    }


def copies(setup: RunSetup, size: ModelSize, row: Algorithm) -> tuple[int, int]:
    """Bytes of gradients beside the one being made: (the total of the micro-batches so far, where
    each has an epsilon; the first of Algorithm 2, while F is estimated)."""
    if row.ascent is None:
        return 0, 0
    shard = fp32_shard(setup, size)
    total = shard if row.of(Climb).accumulation == "micro" and setup.micros > 1 else 0
    return total, shard if row.fisher_pass is not None else 0


@dataclass(frozen=True)
class References:
    """Bytes. weights: kept always; previous: theta_{t-1}, from the descent to the next reference
    forward, where it is kept. saved: what a checkpoint still writes of before the step while its
    passes run.

    heads, rows: of the predictions held during the passes; *_ahead: of those among them that are of
    the next step's batch.
    """

    weights: int
    previous: int
    saved: int
    heads: int
    rows: int
    heads_ahead: int
    rows_ahead: int


def references(setup: RunSetup, size: ModelSize, row: Algorithm) -> References:
    """Of the row, at this batch."""
    kept = [r.reference for r in row.regions if isinstance(r.reference, WeightReference)]
    previous = [r for r in row.regions if isinstance(r.reference, Previous)]
    ahead = sum(
        r.reference.lookahead and row.after_climb().asks(r.reference)
        for r in previous
        if isinstance(r.reference, Previous)
    )
    # what dL/dlogits is, or is made from, is as large as a prediction
    predictions = len(kept) + len(previous) + ahead + row.stored_gradient
    shard = fp32_shard(setup, size)
    saved = shard if setup.background else 0
    # one copy serves all micro-batches
    head = size.classes * size.width * setup.working if size.chunked else 0
    rows = (
        setup.micros
        * size.positions
        * (size.width if size.chunked else size.classes)
        * setup.working
    )
    return References(
        (len(kept) + (row.anchor is not None)) * shard,
        len(previous) * shard,
        # each step replaces these, and the old ones live until they are written
        (len(previous) + sum(r.name == "average" for r in kept)) * saved,
        predictions * head,
        predictions * rows,
        ahead * head,
        ahead * rows,
    )
