"""Bytes per GPU of one run, part by part, as tram_ds's engines hold them: counted from the code,
checked against real tensors.

The peak may be the loss of a pass (activations, logits or chunks of them, the output head's
gradient), its backward (gradients and gathered parameters instead), the distance, the reference's
forward pass, the ascent or the optimizer's step. Where theta_{t-1} is a reference it is taken to be
the step before or after a checkpoint, which hold the most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.options import Climb, Gradient
from tram_ds.algorithms.reference import NoiseReference, Previous, WeightReference
from tram_ds.engines.shards import PART
from tram_ds.models.chunked import CHUNK_ELEMENTS
from tram_ds.planning.buffers import buffers
from tram_ds.planning.setup import FP32, RunSetup
from tram_ds.planning.sizes import ModelSize

# fp32 copies of a part of the shards while epsilon is computed over it; Algorithm 2 has one more,
# and so has what Adam divides by
FORMULA = 3
# fp32 copies of logits while a distance is measured: both sides, their log-softmax, their
# difference
COMPARING = 5
# bytes: tram_ds.algorithms.distance works on whole logits in chunks of this much fp32
COMPARED = 64 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak; moment: when that is.

    references: weights beside theta and copies of the output head, for predictions and a stored
    dL/dlogits. ascent: copies of the gradient, and what epsilon is computed in. logits: or, in
    chunks, what stands for them; the predictions of references are part of it.
    """

    moment: str
    masters: int
    moments: int
    gradients: int
    working_copy: int
    theta_snapshot: int
    references: int
    ascent: int
    activations: int
    logits: int
    buffers: int

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.total - self.activations - self.logits

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}


def peak(setup: RunSetup, size: ModelSize, row: Algorithm) -> Memory:
    """The parts at the moment of the largest sum."""
    moments = [*_passes(setup, size, row), *_between(setup, size, row)]
    return max([*moments, *_at_average(setup, size, row)], key=lambda m: m.total)


def _passes(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    states = _states(setup, size, row)
    seen = _references(setup, size, row)
    logits = _logits(setup, size, row)
    summed = setup.micros > 1 and row.of(Climb).accumulation != "micro"
    if setup.engine == "fsdp2" and summed and not setup.reduce_each:
        states["gradients"] = FP32 * size.trained  # until the last micro-batch's backward
    early = states if setup.keeps_gradients or setup.micros > 1 else {**states, "gradients": 0}
    total, realised = _copies(setup, size, row)
    held = {"references": seen.weights + seen.heads, "ascent": total + realised}
    kept, recomputed = _activations(setup, size, row)
    there = buffers(setup, size, logits.head)
    at_loss = there.head + logits.head if size.chunked else there.outside
    before = {**early, **held, "activations": kept}
    moment = "pass 2" if row.ascent is not None else "the pass"
    yield Memory(f"the loss of {moment}", **before, logits=seen.rows + logits.loss, buffers=at_loss)
    if setup.engine == "fsdp2":
        yield Memory(
            f"the gathering after the loss of {moment}",
            **before,
            logits=seen.rows + logits.backward,
            buffers=there.after,
        )
    # what a block keeps is made anew while the inputs of all of them are there
    yield Memory(
        f"the backward of {moment}",
        **{**before, "activations": kept + recomputed},
        logits=seen.rows + logits.backward,
        buffers=there.block,
    )
    for when, activations, held_then in (
        ("the last block", recomputed, there.last),
        ("the end", 0, there.end),
    ):
        yield Memory(
            f"{when} of {moment}",
            **states,
            **held,
            activations=activations,
            logits=seen.rows,
            buffers=held_then,
        )
    if row.regions:  # measured in pass 1
        moved = bool(seen.weights or seen.previous or total)  # the weights have moved before
        pass_1 = {**before, "ascent": total, "theta_snapshot": moved * states["theta_snapshot"]}
        yield Memory("the distance", **pass_1, logits=seen.rows + logits.compared, buffers=at_loss)


def _between(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    states = _states(setup, size, row)
    seen = _references(setup, size, row)
    shard = _shard(setup, size)
    there = buffers(setup, size, 0)
    if row.ascent is not None:
        total, realised = _copies(setup, size, row)
        more = bool(realised) + row.of(Gradient).precondition
        formula = (FORMULA + more) * min(shard, FP32 * PART["cuda"])
        held = {"references": seen.weights + seen.heads, "ascent": total + realised + formula}
        yield Memory(
            "the ascent", **states, **held, activations=0, logits=seen.rows, buffers=there.outside
        )
    # the shard is Adam's own temporary
    nothing = {"ascent": 0, "activations": 0, "buffers": there.outside + shard}
    references = seen.weights + seen.heads_ahead
    yield Memory("the descent", **states, **nothing, references=references, logits=seen.rows_ahead)
    # elsewhere theta's snapshot is what is kept
    references = seen.weights + (seen.previous if setup.separate else 0)
    yield Memory(
        "the descent before a checkpoint", **states, **nothing, references=references, logits=0
    )
    if (seen.weights or seen.previous) and seen.rows:  # an anchor predicts nothing
        early = states if setup.keeps_gradients else {**states, "gradients": 0}
        held = {
            "references": seen.weights + seen.previous + seen.heads - seen.heads_ahead,
            "ascent": 0,
        }
        rows = (
            seen.rows
            - seen.rows_ahead
            + (0 if size.chunked else 2 * FP32 * size.positions * size.classes)
        )
        yield Memory(
            "the reference",
            **early,
            **held,
            activations=size.saved_block,
            logits=rows,
            buffers=there.head,
        )


def _at_average(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    """While the moving average with theta_{t+1} in it, a copy of its own, is scored, by batches of
    the training's size."""
    kept = [r for r in row.references if isinstance(r, WeightReference) and r.name == "average"]
    if not (setup.average and kept):
        return
    states = _states(setup, size, row)
    early = states if setup.keeps_gradients else {**states, "gradients": 0}
    references = _references(setup, size, row).weights + _shard(setup, size)
    yield Memory(
        "the scores of the average",
        **early,
        references=references,
        ascent=0,
        activations=size.saved_block,
        logits=0 if size.chunked else 2 * FP32 * size.positions * size.classes,
        buffers=buffers(setup, size, 0).head,
    )


def _shard(setup: RunSetup, size: ModelSize) -> int:
    """Bytes of a sharded fp32 copy of the parameters that train on this GPU."""
    return 0 if setup.offload_states else FP32 * -(-size.trained // setup.shards)


def _states(setup: RunSetup, size: ModelSize, row: Algorithm) -> dict[str, int]:
    n, share = size.parameters, -(-size.parameters // setup.shards)
    shard, frozen = _shard(setup, size), size.parameters - size.trained
    # what is frozen is where theta is, but for DeepSpeed's masters, which are of what trains
    beside = {"replicated": FP32 * frozen, "fsdp2": FP32 * -(-frozen // setup.shards)}
    masters = shard + (0 if setup.offload_states else beside.get(setup.engine, 0))
    moves = row.perturbs or any(
        isinstance(r.reference, WeightReference | Previous) for r in row.regions
    )
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


def _copies(setup: RunSetup, size: ModelSize, row: Algorithm) -> tuple[int, int]:
    """Bytes of gradients beside the one being made: (the total of the micro-batches so far, where
    each has an epsilon; the first of Algorithm 2, while F is estimated)."""
    if row.ascent is None:
        return 0, 0
    shard = _shard(setup, size)
    total = shard if row.of(Climb).accumulation == "micro" and setup.micros > 1 else 0
    return total, shard if row.fisher_pass is not None else 0


def _activations(setup: RunSetup, size: ModelSize, row: Algorithm) -> tuple[int, int]:
    """(kept for the backward pass, recomputed during it): with checkpointing the blocks' inputs,
    and one block at a time."""
    graphs = 1 + row.through_reference
    block = size.block_input if setup.checkpointing else size.saved_block
    return graphs * (
        block * size.layers + size.saved_rest
    ), size.saved_block if setup.checkpointing else 0


@dataclass(frozen=True)
class _References:
    """Bytes. weights: kept always; previous: theta_{t-1}, from the descent to the next reference
    forward, where it is kept.

    heads, rows: of the predictions held during the passes; *_ahead: of those among them that are of
    the next step's batch.
    """

    weights: int
    previous: int
    heads: int
    rows: int
    heads_ahead: int
    rows_ahead: int


def _references(setup: RunSetup, size: ModelSize, row: Algorithm) -> _References:
    kept = [r for r in row.regions if isinstance(r.reference, WeightReference)]
    previous = [r for r in row.regions if isinstance(r.reference, Previous)]
    ahead = sum(
        r.reference.lookahead and row.at(1).asks(r.reference)
        for r in previous
        if isinstance(r.reference, Previous)
    )
    # what dL/dlogits is, or is made from, is as large as a prediction
    predictions = len(kept) + len(previous) + ahead + row.stored_gradient
    shard = _shard(setup, size)
    # one copy serves all micro-batches
    head = size.classes * size.width * setup.working if size.chunked else 0
    rows = (
        setup.micros
        * size.positions
        * (size.width if size.chunked else size.classes)
        * setup.working
    )
    return _References(
        (len(kept) + (row.anchor is not None)) * shard,
        len(previous) * shard,
        predictions * head,
        predictions * rows,
        ahead * head,
        ahead * rows,
    )


@dataclass(frozen=True)
class _Logits:
    """Bytes of a micro-batch's logits at its loss, while a distance is measured, and until the
    backward pass has read them.

    head: of the output head's gradient, which chunks make on the way forward.
    """

    loss: int
    compared: int
    backward: int
    head: int


def _logits(setup: RunSetup, size: ModelSize, row: Algorithm) -> _Logits:
    one, working = size.positions * size.classes, setup.working
    noised = any(isinstance(r.reference, NoiseReference) for r in row.regions)
    # with a graph nothing is computed in place
    comparing = COMPARING + 2 * (row.penalty is not None)
    if not size.chunked:
        compared = one * (working * (1 + noised) + FP32) + comparing * min(COMPARED, FP32 * one)
        # logits that a penalty's gradient is recomputed from
        differentiated = 0 if row.penalty is None else 1 + noised
        return _Logits((3 * FP32 + working * differentiated) * one, compared, working * one, 0)
    chunk = min(CHUNK_ELEMENTS["cuda"], one)
    head = size.classes * size.width * size.head_trained
    states = size.positions * size.width * working
    gradient = (1 + row.through_reference) * states
    # a chunk's share of the head's gradient, not yet added
    added = head * working + 2 * chunk * working if setup.half else 0
    # beside the loss's own chunk, that of pass 1's logits
    own = (3 * FP32 + working * (1 + row.stored_gradient)) * chunk
    loss = gradient + max(own, added)
    return _Logits(
        loss, gradient + noised * states + (comparing + 2) * FP32 * chunk, gradient, FP32 * head
    )
