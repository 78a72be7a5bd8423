"""What one step computes and sends, and how long a run takes at an assumed efficiency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tram_ds.algorithm import Algorithm
from tram_ds.analysis.flops import cost as passes_of
from tram_ds.planning.memory import FP32, Setup
from tram_ds.planning.sizes import Size
from tram_ds.region import AtWeights, Previous

PEAK = {  # dense TFLOP/s per GPU from the vendors' data sheets: (bf16, fp32 without tensor cores), GB of memory
    "a100": (312.0, 19.5, 80),
    "h100": (989.0, 67.0, 80),
    "h200": (989.0, 67.0, 141),
}


@dataclass(frozen=True)
class Cost:
    """One step. model_flops: of the whole job, recomputation left out; hardware_flops: with it.

    sent: bytes per kind of collective, of the whole tensors, as one rank takes part in them. units: forward passes' worth.
    """

    units: int
    model_flops: float
    hardware_flops: float
    sent: dict[str, int]

    def hours(self, steps: int, gpus: int, tflops: float, mfu: float) -> float:
        """Of the run, if `mfu` of the GPUs' `tflops` each is model FLOPs. ValueError beyond what a GPU can do."""
        if not 0 < mfu <= 1:
            raise ValueError(f"--mfu {mfu}: a share of the GPU's peak, above 0 and at most 1 (0.45 is usual)")
        return steps * self.model_flops / (gpus * tflops * 1e12 * mfu) / 3600


def cost(setup: Setup, size: Size, row: Algorithm, section: Mapping[str, Any]) -> Cost:
    """`section`: the recipe's algorithm section, from which `row` was made."""
    passes = passes_of(section)
    forward = float(size.forward_flops) * setup.micros * setup.world
    recomputed = passes.backward if setup.checkpointing else 0
    sent = traffic(setup, size.parameters, row, passes.forward)
    return Cost(passes.units, passes.units * forward, (passes.units + recomputed) * forward, sent)


def traffic(setup: Setup, n: int, row: Algorithm, forwards: int) -> dict[str, int]:
    """Bytes of the whole tensors per collective and step. forwards: forward passes per micro-batch."""
    if setup.world == 1:
        return {}
    backwards = 1 + (row.ascent is not None) + (row.fisher_pass is not None)
    remembered = sum(isinstance(r.reference, AtWeights | Previous) for r in row.regions)
    moves = remembered + (row.ascent is not None)
    micros, working = setup.micros, setup.working
    if setup.engine == "fsdp2":
        gathers = micros * (forwards + backwards) if setup.reshard else micros * backwards + remembered
        reduced = {"reduce_scatter": micros * backwards * FP32 * n} if setup.shards > 1 else {}
        gathered = {"allgather": gathers * working * n} if setup.shards > 1 else {}
        hybrid = {"allreduce": micros * backwards * FP32 * n // setup.shards} if setup.shards < setup.world else {}
        return {**gathered, **reduced, **hybrid}
    if setup.engine in ("replicated", "zero0"):
        return {"allreduce": backwards * setup.gradient * n}
    sent = setup.working if setup.half else FP32  # DeepSpeed sends gradients as the working copy's type
    if setup.engine == "zero3":
        kept = n <= setup.live  # then parameters stay gathered from the forward to its backward pass
        gathers = (backwards + remembered) if kept else micros * (forwards + backwards)
        return {"allgather": gathers * working * n, "reduce_scatter": micros * backwards * sent * n}
    reductions = backwards * (micros if setup.engine == "zero2" else 1)
    return {"allgather": (2 * moves + 1) * working * n, "allreduce": reductions * sent * n}
