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
from tram_ds.algorithms.reference import WeightReference
from tram_ds.engines.shards import PART
from tram_ds.planning.activations import activations, logits
from tram_ds.planning.buffers import buffers
from tram_ds.planning.model_states import copies, fp32_shard, references, states
from tram_ds.planning.setup import FP32, RunSetup
from tram_ds.planning.sizes import ModelSize

# fp32 copies of a part of the shards while epsilon is computed over it; Algorithm 2 has one more,
# and so has what Adam divides by
FORMULA = 3


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
    every = (_losses, _backwards, _distance, _ascent, _descents, _reference, _at_average)
    moments = [found for part in every for found in part(setup, size, row)]
    return max(moments, key=lambda m: m.total)


def _losses(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    seen, rows = references(setup, size, row), logits(setup, size, row)
    before, there = _going_forward(setup, size, row), buffers(setup, size, rows.head)
    yield Memory(
        f"the loss of {_last_pass(row)}",
        **before,
        logits=seen.rows + rows.loss,
        buffers=_at_loss(setup, size, row),
    )
    if setup.engine == "fsdp2":
        yield Memory(
            f"the gathering after the loss of {_last_pass(row)}",
            **before,
            logits=seen.rows + rows.backward,
            buffers=there.after,
        )


def _backwards(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    seen, rows = references(setup, size, row), logits(setup, size, row)
    there = buffers(setup, size, rows.head)
    kept, recomputed = activations(setup, size, row)
    # what a block keeps is made anew while the inputs of all of them are there
    yield Memory(
        f"the backward of {_last_pass(row)}",
        **{**_going_forward(setup, size, row), "activations": kept + recomputed},
        logits=seen.rows + rows.backward,
        buffers=there.block,
    )
    held = {**_pass_states(setup, size, row), **_beside(setup, size, row), "logits": seen.rows}
    when = f"the last block of {_last_pass(row)}"
    yield Memory(when, **held, activations=recomputed, buffers=there.last)
    yield Memory(f"the end of {_last_pass(row)}", **held, activations=0, buffers=there.end)


def _distance(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    if not row.regions:
        return
    seen, rows = references(setup, size, row), logits(setup, size, row)
    before = _going_forward(setup, size, row)
    # in pass 1: Algorithm 2's second gradient is not there yet, nor is a copy of theta, unless the
    # weights have moved before
    total, _ = copies(setup, size, row)
    moved = bool(seen.weights or seen.previous or total)
    pass_1 = {**before, "ascent": total, "theta_snapshot": moved * before["theta_snapshot"]}
    yield Memory(
        "the distance",
        **pass_1,
        logits=seen.rows + rows.compared,
        buffers=_at_loss(setup, size, row),
    )


def _last_pass(row: Algorithm) -> str:
    return "pass 2" if row.ascent is not None else "the pass"


def _pass_states(setup: RunSetup, size: ModelSize, row: Algorithm) -> dict[str, int]:
    """The states while gradients of the micro-batches are summed."""
    held = states(setup, size, row)
    summed = setup.micros > 1 and row.of(Climb).accumulation != "micro"
    if setup.engine == "fsdp2" and summed and not setup.reduce_each:
        held["gradients"] = FP32 * size.trained  # until the last micro-batch's backward
    return held


def _going_forward(setup: RunSetup, size: ModelSize, row: Algorithm) -> dict[str, int]:
    """All but logits and buffers, of the last micro-batch before its backward pass."""
    held = _pass_states(setup, size, row)
    # clear() has freed them, and the first backward pass makes them anew
    early = held if setup.keeps_gradients or setup.micros > 1 else {**held, "gradients": 0}
    kept, _ = activations(setup, size, row)
    return {**early, **_beside(setup, size, row), "activations": kept}


def _beside(setup: RunSetup, size: ModelSize, row: Algorithm) -> dict[str, int]:
    """What stays from pass to pass."""
    seen = references(setup, size, row)
    kept = seen.weights + seen.saved + seen.heads
    return {"references": kept, "ascent": sum(copies(setup, size, row))}


def _at_loss(setup: RunSetup, size: ModelSize, row: Algorithm) -> int:
    head = logits(setup, size, row).head
    there = buffers(setup, size, head)
    return there.head + head if size.chunked else there.outside


def _ascent(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    if row.ascent is None:
        return
    seen, (total, realised) = references(setup, size, row), copies(setup, size, row)
    more = bool(realised) + row.of(Gradient).precondition
    # epsilon is lazy: never there as a whole, but for a part of it at a time
    formula = (FORMULA + more) * min(fp32_shard(setup, size), FP32 * PART["cuda"])
    yield Memory(
        "the ascent",
        **states(setup, size, row),
        references=seen.weights + seen.saved + seen.heads,
        ascent=total + realised + formula,
        activations=0,
        logits=seen.rows,
        buffers=buffers(setup, size, 0).outside,
    )


def _descents(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    held, seen = states(setup, size, row), references(setup, size, row)
    # the shard is Adam's own temporary
    there = buffers(setup, size, 0).outside + fp32_shard(setup, size)
    nothing = {"ascent": 0, "activations": 0, "buffers": there}
    kept = seen.weights + seen.heads_ahead
    yield Memory("the descent", **held, **nothing, references=kept, logits=seen.rows_ahead)
    # elsewhere theta's snapshot is what is kept
    kept = seen.weights + (seen.previous if setup.separate else 0)
    yield Memory("the descent before a checkpoint", **held, **nothing, references=kept, logits=0)


def _reference(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    seen = references(setup, size, row)
    if not ((seen.weights or seen.previous) and seen.rows):  # an anchor predicts nothing
        return
    held = states(setup, size, row)
    early = held if setup.keeps_gradients else {**held, "gradients": 0}
    whole = 0 if size.chunked else 2 * FP32 * size.positions * size.classes
    # theta_{t-1} is there, whether it is being written or not
    kept = seen.weights + max(seen.previous, seen.saved)
    yield Memory(
        "the reference",
        **early,
        references=kept + seen.heads - seen.heads_ahead,
        ascent=0,
        activations=size.saved_block,
        logits=seen.rows - seen.rows_ahead + whole,
        buffers=buffers(setup, size, 0).head,
    )


def _at_average(setup: RunSetup, size: ModelSize, row: Algorithm) -> Iterator[Memory]:
    """While the moving average with theta_{t+1} in it, a copy of its own, is scored, by batches of
    the training's size."""
    kept = [r for r in row.references if isinstance(r, WeightReference) and r.name == "average"]
    if not (setup.average and kept):
        return
    held = states(setup, size, row)
    early = held if setup.keeps_gradients else {**held, "gradients": 0}
    yield Memory(
        "the scores of the average",
        **early,
        references=references(setup, size, row).weights + fp32_shard(setup, size),
        ascent=0,
        activations=size.saved_block,
        logits=0 if size.chunked else 2 * FP32 * size.positions * size.classes,
        buffers=buffers(setup, size, 0).head,
    )
