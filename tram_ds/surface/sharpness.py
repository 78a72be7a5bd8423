"""epsilon-sharpness (Keskar et al. 2017; Eq. 10-11 of the paper, A = I): how far the loss rises
inside a small box.

    100 (max over z in C of loss(theta + z) - loss(theta)) / (1 + loss(theta)),
    C = {|z_i| <= epsilon (|theta_i| + 1)}

The maximum is searched by projected gradient ascent: SGD over one pass of the split. What the paper
leaves open is decided
so: the ascent is in eval mode (one function is maximised, not a random one), its gradient is the
mean over the accumulated rows, the loss of the whole split is taken after every step, and the best
counts: a maximum "inside the box" is not the last point. `juneja` is the code of Juneja et al.
(2023), which the paper names: the box epsilon (theta_i + 1) keeps the sign of theta_i, the ascent
runs in train mode, the gradients of the accumulated batches add up, the last loss counts. At the
paper's learning rate many elements never reach the box: `at_bound` says how many did, and the value
then depends on the number of rows. Compare numbers of equal settings only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from tram_ds.engines.shards import Shards
from tram_ds.runtime.checked import Positive, Section
from tram_ds.surface.subject import Subject

Above0 = Annotated[float, Field(gt=0)]


class Options(Section):
    """Settings of the measurement; the defaults are the paper's."""

    variant: Literal["paper", "juneja"] = "paper"
    """See the module: box, mode, gradient scale and which loss counts."""
    epsilon: Above0 = 1e-5
    """Half the side of the box, relative to |theta| + 1."""
    lr: Above0 = 8e-5
    """Learning rate of the ascent."""
    batch: Positive = 32
    """Rows of a batch, over all ranks."""
    accumulation: Positive = 4
    """Batches of one ascent step."""


def measure(subject: Subject, options: Options) -> dict[str, Any]:
    """{value, loss, max_loss, steps, at_bound} and the options. Collective; the weights are as
    before afterwards.

    Costs a backward pass over the split and, for `paper`, one evaluation of the split per step of
    batch x accumulation rows.
    """
    engine, juneja = subject.engine, options.variant == "juneja"
    theta = engine.params(keep=True)
    bound = ((theta if juneja else abs(theta)) + 1.0) * options.epsilon
    z, base, stride = theta * 0.0, subject.loss(), options.batch * options.accumulation
    losses = [] if juneja else [base]  # z = 0 lies in the box
    for start in range(0, subject.rows, stride):
        stop = min(start + stride, subject.rows)
        gradient = subject.gradient(theta + z, start, stop, train=juneja)
        # gradient() is a mean over the rows; juneja adds up the means of its batches
        summed = -(-(stop - start) // options.batch) if juneja else 1
        z = clamp(z + gradient * (options.lr * summed), bound)
        if not juneja or stop == subject.rows:
            losses.append(subject.loss(theta + z))
    highest = max(losses)
    found = {"value": 100 * (highest - base) / (1 + base), "loss": base, "max_loss": highest}
    steps = -(-subject.rows // stride)
    return found | {
        "steps": steps,
        "at_bound": share_at(subject, z, bound),
        "rows": subject.rows,
        **options.model_dump(),
    }


def clamp(z: Shards, bound: Shards) -> Shards:
    """Each element into [-bound, bound]; where the bound is negative (juneja, theta < -1) it
    becomes +bound, as in torch."""
    return Shards((torch.clamp(a, -b, b) for a, b in zip(z, bound, strict=True)), z.layout)


def share_at(subject: Subject, z: Shards, bound: Shards) -> float:
    """The fraction of all parameter elements whose displacement reached the box. Collective over
    shard_group."""
    at = Shards(
        (
            ((a.abs() - b.abs()) >= -1e-6 * b.abs()).to(a.dtype)
            for a, b in zip(z, bound, strict=True)
        ),
        z.layout,
    )
    # by norm(), which counts each element once, whatever the sharding: a sum of ones squared
    count, total = (subject.engine.norm(x).square() for x in (at, z * 0.0 + 1.0))
    return float(count / total)
