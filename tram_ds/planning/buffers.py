"""Bytes of parameters that are gathered and of gradients on their way, beside what a GPU keeps of
them: by engine, at the moments of a pass."""

from __future__ import annotations

from dataclasses import dataclass

from tram_ds.planning.setup import FP32, RunSetup
from tram_ds.planning.sizes import ModelSize


@dataclass(frozen=True)
class Buffers:
    """Bytes. outside: between passes. head: at the output head, going forward. after: between the
    loss and the first block's backward. block, last, end: while the gradient of a block is reduced,
    of the one that is the last in backward, and of what comes before the blocks."""

    outside: int
    head: int
    after: int
    block: int
    last: int
    end: int


def buffers(setup: RunSetup, size: ModelSize, head_gradient: int) -> Buffers:
    """head_gradient: bytes of the output head's that chunks of logits have made on the way
    forward."""
    if setup.engine == "fsdp2":
        return _fsdp2(setup, size, head_gradient)
    if setup.engine == "replicated":
        gathered = backward = 0  # DDP's buckets are the gradients
    else:
        bucket = min(setup.bucket, size.trained) * setup.working
        gathered = setup.working * (
            min(setup.live, size.parameters) if setup.engine == "zero3" else 0
        )
        # every parameter's gradient, until it is cut
        whole = size.trained * setup.working if setup.engine == "zero1" else 0
        backward = gathered + bucket + whole
    # it waits in the output head's own parameter, to the end of the blocks
    waiting = backward + head_gradient
    return Buffers(gathered, gathered, waiting, waiting, backward, backward)


def _fsdp2(setup: RunSetup, size: ModelSize, head_gradient: int) -> Buffers:
    """A unit is copied out of what was gathered, and its gradient in the working precision into the
    fp32 one that is reduced, which is let go when the next unit's is made."""
    working, block, head = setup.working, size.trained_block, size.trained_head
    rest = size.root - size.embedding - size.head
    trained_rest = size.trained_root - size.trained_embedding - head
    # tied, the head's gradient waits for the rest of the root's
    tied = bool(head_gradient) and not size.head
    waiting = size.classes * size.width * working * tied
    end = max(
        trained_rest * (working + FP32) + 2 * size.trained_embedding * working,
        size.trained_embedding * (working + FP32),
    )
    if not setup.reshard:
        whole = size.parameters * working
        reduced = whole + block * working + FP32 * max(block, head) + waiting
        after = whole + max(head * working + head_gradient, head * (working + FP32))
        end = whole + max(trained_rest * (working + FP32), end - whole)
        return Buffers(
            whole - rest * working, whole + size.head * working, after, reduced, reduced, end
        )
    ahead = size.block * (size.layers > 1)  # the next one is gathered ahead of time
    after = 2 * rest * working + head_gradient
    if size.head:
        made = head * (setup.half or not head_gradient)  # in fp32 it is there already
        gathered = max(2 * size.head, size.head + made + size.block) * working
        after = rest * working + max(
            gathered + head_gradient, size.block * working + head * (working + FP32)
        )
    return Buffers(
        outside=0,
        head=(rest + max(size.block, 2 * size.head)) * working,
        after=after,
        block=(rest + size.block + ahead + block) * working + FP32 * max(block, head) + waiting,
        last=(rest + size.block + max(ahead, size.embedding) + block) * working
        + FP32 * block
        + waiting,
        end=end,  # its parameters are let go before they are reduced
    )
