"""What one step computes and sends, and how long a run takes at an assumed efficiency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.cost import mean_cost
from tram_ds.algorithms.options import BesideAscent, Climb, WeightNoise
from tram_ds.algorithms.reference import Previous, WeightReference
from tram_ds.planning.setup import FP32, RunSetup
from tram_ds.planning.sizes import ModelSize

FP64 = 8
# dense TFLOP/s per GPU from the vendors' data sheets: (bf16, fp32 without tensor cores), GB of
# memory
PEAK = {
    "a100": (312.0, 19.5, 80),
    "h100": (989.0, 67.0, 80),
    "h200": (989.0, 67.0, 141),
}


@dataclass(frozen=True)
class Cost:
    """One step; the mean over steps that climb and steps that do not. model_flops: of the whole
    job, recomputation left out;
    hardware_flops: with it.

    sent: bytes per kind of collective, of the whole tensors, as one rank takes part in them. units:
    forward passes' worth.
    """

    units: float
    model_flops: float
    hardware_flops: float
    sent: dict[str, int]

    def hours(self, steps: int, gpus: int, tflops: float, mfu: float) -> float:
        """Of the run, if `mfu` of the GPUs' `tflops` each is model FLOPs. ValueError beyond what a
        GPU can do."""
        if not 0 < mfu <= 1:
            raise ValueError(
                f"--mfu {mfu}: a share of the GPU's peak, above 0 and at most 1 (0.45 is usual)"
            )
        return steps * self.model_flops / (gpus * tflops * 1e12 * mfu) / 3600


def cost(setup: RunSetup, size: ModelSize, row: Algorithm) -> Cost:
    """Of a model and a batch of this size under algorithm `row`."""
    step = mean_cost(row)
    forward = float(size.forward_flops) * setup.micros * setup.world
    recomputed = step.backward if setup.checkpointing else 0
    again = _logits_again(size, row) * setup.micros * setup.world
    sent = traffic(setup, size, row, step.forward)
    units = step.units_of(size.trained / size.parameters)
    return Cost(units, units * forward, (units + recomputed) * forward + again, sent)


def _logits_again(size: ModelSize, row: Algorithm) -> float:
    """FLOPs of a micro-batch's step: pass 2 multiplies out the hidden states of pass 1, whose
    dL/dlogits it descends through, a chunk at a time. Whole, it is kept."""
    if not (row.stored_gradient and size.chunked):
        return 0.0
    return 2 * size.positions * size.width * size.classes / row.of(Climb).perturb_every


def traffic(setup: RunSetup, size: ModelSize, row: Algorithm, forwards: float) -> dict[str, int]:
    """Bytes of the whole tensors per collective and step. forwards: forward passes per micro-batch.
    What is frozen is gathered where it is sharded, and never reduced.

    A step after a checkpoint, which moves to theta_{t-1} although it may look ahead, is left out.
    """
    if setup.world == 1:
        return {}
    counts = _counts(setup, row, forwards)
    if setup.engine == "fsdp2":
        found = _fsdp2(setup, counts)
    elif setup.engine in ("replicated", "zero0"):
        o = row.of(Climb)
        # `rank`: epsilon is made of the rank's own gradient, and the descent's alone is reduced
        passes = 1 if o.perturbation_scope == "rank" else counts.backwards
        found = {"allreduce": counts.each * passes * setup.gradient}
    elif setup.engine == "zero3":
        found = _zero3(setup, size, row, counts)
    else:
        found = _zero_1_2(setup, row, counts)
    whole = setup.engine in ("fsdp2", "zero3")  # frozen weights are sharded, too
    gathered = size.parameters if whole else size.trained
    each_of = {"allgather": gathered}
    sent = {
        name: round(copies * each_of.get(name, size.trained))
        for name, copies in found.items()
        if copies
    }
    if WeightNoise in row.parts and setup.shards > 1:  # the size of every row
        sent["allreduce"] = sent.get("allreduce", 0) + FP64 * size.trained_rows
    return sent


def _moves(reference: Any) -> bool:
    return isinstance(reference, WeightReference) or (
        isinstance(reference, Previous) and not reference.lookahead
    )


@dataclass(frozen=True)
class _Counts:
    """Of a step on the mean. climbs: ascents. moves: to the weights of a reference. backwards: per
    micro-batch. each: reductions of a pass that is reduced once, and ascents of a step that climbs.
    fresh: gathers of the whole model where every pass gathers anew. stay: where what the forward
    pass gathered is there for its backward pass. reduced: where every micro-batch is reduced.
    twice: passes whose graph goes through the model twice."""

    climbs: float
    moves: float
    backwards: float
    each: int
    fresh: float
    stay: float
    reduced: float
    twice: float


def _counts(setup: RunSetup, row: Algorithm, forwards: float) -> _Counts:
    o, micros = row.of(Climb), setup.micros
    climbs = 1 / o.perturb_every if row.ascent is not None else 0
    twice = row.through_reference * (1 + climbs * (row.of(BesideAscent).penalty_passes == "both"))
    backwards = 1 + climbs * (1 + (row.fisher_pass is not None))
    moves = sum(
        1 / o.perturb_every if region is row.radius else 1
        for region in row.regions
        if _moves(region.reference)
    )
    return _Counts(
        climbs=climbs,
        moves=moves,
        backwards=backwards,
        each=micros if o.accumulation == "micro" else 1,
        fresh=micros * (forwards + backwards + twice),
        stay=micros * backwards + moves,
        reduced=micros * backwards,
        twice=twice,
    )


# Bytes per parameter and kind of collective, of one engine each.


def _zero_1_2(setup: RunSetup, row: Algorithm, counts: _Counts) -> dict[str, float]:
    each, micro = counts.each, row.of(Climb).accumulation == "micro"
    # the descent is the way back from theta + epsilon, except between micro-batches
    ascents = counts.climbs * each * (2 if micro else 1)
    # 1 after the descent; 2 to a reference's weights and back
    gathers = 1 + 2 * counts.moves + (row.shift is not None) + ascents
    reduced = counts.reduced if setup.engine == "zero2" else each * counts.backwards
    return {"allgather": gathers * setup.working, "allreduce": reduced * setup.working}


def _zero3(setup: RunSetup, size: ModelSize, row: Algorithm, counts: _Counts) -> dict[str, float]:
    # Kept from forward to backward once DeepSpeed has seen a plain pass, which is the self-check's,
    # where there is one.
    plain = row.ascent is not None or not row.regions
    kept = size.parameters <= setup.live and not counts.twice and plain
    gathers = counts.stay if kept else counts.fresh
    return {
        "allgather": gathers * setup.working,
        "reduce_scatter": counts.reduced * setup.working,
    }


def _fsdp2(setup: RunSetup, counts: _Counts) -> dict[str, float]:
    sharded, hybrid = setup.shards > 1, setup.shards < setup.world
    gathers = counts.fresh if setup.reshard else counts.stay
    reduced = counts.reduced if setup.reduce_each else counts.each * counts.backwards
    return {
        "allgather": gathers * setup.working * sharded,
        "reduce_scatter": reduced * FP32 * sharded,
        # each rank's shard, over the groups that have one of it
        "allreduce": reduced * FP32 / setup.shards * hybrid,
    }
