"""Tokens per second and model FLOPs utilisation (MFU) of the steps a run takes.

MFU = model FLOPs of a step / (seconds of a step x peak FLOP/s), both of one rank: all ranks do the
same amount of work. Model
FLOPs are counted, not estimated: those of one forward pass over the first micro-batch, times the
micro-batches, times the forward passes' worth of the algorithm at that step. What activation
checkpointing recomputes is not among them.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tram_ds.algorithms.cost import cost_of
from tram_ds.algorithms.stepper import Stepper, UserForward
from tram_ds.recipe.recipe import Recipe

TERA = 1e12


@dataclass
class Throughput:
    """Times steps, each from the end of the one before to add(). restart() leaves out what else a
    run does in between.

    peak: FLOP/s of one device; None: MFU is not known. units: step -> what it is worth in forward
    passes. flops: of this rank's forward passes over the micro-batches of a step, 0 until count().
    rank: only 0 warns. clock: seconds.
    """

    peak: float | None
    units: Callable[[int], float]
    rank: int = 0
    clock: Callable[[], float] = time.monotonic
    flops: float = 0.0
    _began: float = 0.0
    _seconds: float = 0.0
    _units: float = 0.0
    _tokens: Tensor | float = 0.0
    _warned: bool = False

    def count(self, stepper: Stepper, forward: UserForward, batches: Sequence[Any]) -> None:
        """Counts the FLOPs of a forward pass, once, if the peak is known; not timed. Collective.

        batches: this rank's micro-batches of a step. Called after a step: DeepSpeed's stage 3
        learns from its first passes which parameters to keep, and a forward pass alone teaches it
        to gather twice.
        """
        if self.peak is not None and not self.flops:
            self.flops = float(forward_flops(stepper, forward, batches)) * len(batches)
            self.restart()

    def restart(self) -> None:
        """A step begins now: before the first one, and after whatever is no part of one (a
        validation, a checkpoint)."""
        self._began = self.clock()

    def add(self, step: int, tokens: Tensor) -> None:
        """Step `step` was taken. tokens: () targets of the global batch; left on the device."""
        self._lap()
        self._units += self.units(step)
        self._tokens = self._tokens + tokens

    def rates(self) -> dict[str, float]:
        """tokens_per_second and, where it can be told, mfu, of the steps since the last call. Waits
        for the device."""
        # float() waits for the device, and with it for all steps that are timed here
        tokens = float(self._tokens)
        self._lap()  # the wait belongs to the steps
        seconds, flops = self._seconds, self.flops * self._units
        self._seconds, self._units, self._tokens = 0.0, 0.0, 0.0
        if seconds <= 0.0:
            return {}
        return {"tokens_per_second": tokens / seconds, **self._mfu(flops, seconds)}

    def _lap(self) -> None:
        now = self.clock()
        self._seconds, self._began = self._seconds + now - self._began, now

    def _mfu(self, flops: float, seconds: float) -> dict[str, float]:
        if self.peak is None or not flops:
            return {}
        mfu = flops / (seconds * self.peak)
        if mfu <= 1.0:
            return {"mfu": mfu}
        if self.rank == 0 and not self._warned:
            text = (
                f"mfu = {mfu:.3g} is above 1, so it is not recorded: {self.peak / TERA:g} "
                "TFLOP/s is not this device's peak; "
            )
            warnings.warn(f"{text}set train.peak_tflops to the one at model.dtype", stacklevel=2)
        self._warned = True
        return {}


def throughput(recipe: Recipe, stepper: Stepper) -> Throughput:
    """For the steps of a run."""
    engine, algorithm = stepper.engine, stepper.algorithm
    given = recipe.train.peak_tflops
    peak = given * TERA if given is not None else device_peak(engine.device, recipe.model.dtype)
    sizes = [(parameter_size(p), p.requires_grad) for p in engine.module.parameters()]
    # a frozen weight has no gradient of its own, so a backward pass costs less
    share = sum(n for n, trains in sizes if trains) / sum(n for n, _ in sizes)
    return Throughput(peak, lambda step: cost_of(algorithm.at(step)).units_of(share), engine.rank)


def parameter_size(parameter: Any) -> int:
    """Elements of the whole parameter, whatever this rank holds of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def forward_flops(stepper: Stepper, forward: UserForward, batches: Sequence[Any]) -> int:
    """FLOPs of one forward pass over the first of `batches`: whole layers, however the weights are
    sharded. Collective.

    In eval mode and without a gradient, so weights, running statistics and random state stay as
    they were. Compiled blocks run
    uncompiled: the counter sees operators only. Kernels of other packages (flash-attn) are not
    counted.
    """
    # lazily; a CPU's attention, which torch has no formula for
    from tram_ds.planning.sizes import CPU_ATTENTION

    # display: a table of its own would go to the terminal
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with torch.no_grad(), stepper.quiet(), torch.compiler.set_stance("force_eager"), counter:
        stepper.bind(forward, batches)(0, batches[0], masks="flops", train=False)
    return counter.get_total_flops()


def device_peak(device: torch.device, dtype: str) -> float | None:
    """FLOP/s of a device at `dtype`, a recipe's model.dtype; None where it is not known."""
    return gpu_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def gpu_peak(name: str, dtype: str) -> float | None:
    """FLOP/s of a GPU by its driver's name; None for one that is not known, or only as a slower
    kind or part of a known one."""
    from tram_ds.planning.cost import PEAK  # lazily: it is only asked on a GPU

    words = re.findall(r"[a-z0-9]+", name.lower())
    known = [PEAK[word] for word in words if word in PEAK]
    # H100 PCIe and NVL are slower than the H100 of the table, MIG is a part of one
    if not known or "mig" in words or "nvl" in words or {"h100", "pcie"} <= set(words):
        return None
    half, single, _ = known[0]
    return (half if dtype == "bfloat16" else single) * TERA
