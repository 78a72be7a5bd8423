"""One step of a recipe as one rank of W runs it, without its memory and without the other ranks:
what a formula counts, counted in the step itself.

Tensors are torch's fake ones (shapes and storages, no values), the process group answers at once,
and torch's memory tracker looks on, with counters of FLOPs (by torch's formulas) and of
collectives. A fake tensor is on the CPU, so that the sizes by which a GPU works are put in place,
and fused attention is the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.bound import bind
from tram_ds.algorithms.options import Climb
from tram_ds.algorithms.reference import Previous
from tram_ds.algorithms.said import NO_DISTANCE, NO_EFFECT, Said
from tram_ds.algorithms.stepper import Stepper, UserForward
from tram_ds.bench.operators import Operators
from tram_ds.bench.tracker import tracked
from tram_ds.engines import fsdp2, replicated
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import PART
from tram_ds.models.logit_chunks import CHUNK_ELEMENTS
from tram_ds.models.output import Batch, Output
from tram_ds.planning import outline
from tram_ds.planning.plan import setup_for
from tram_ds.planning.setup import RunSetup
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.recipe import Recipe
from tram_ds.tasks import causal
from tram_ds.training.optimizer import make


@dataclass(frozen=True)
class Trace:
    """One rank. peak: bytes by kind, as torch's tracker has them, at the moment of the largest sum,
    which is `total`. calls, bytes: of each kind of collective, as bench/measure.py:Traffic. flops:
    of the rank's own arithmetic, with what is recomputed."""

    peak: dict[str, int]
    total: int
    calls: dict[str, int]
    bytes: dict[str, int]
    flops: int


def refusal(recipe: Recipe, world: int) -> str | None:
    """One line on why this cannot be traced, and what can; None where it can."""
    setup = setup_for(recipe, world)
    if setup.engine.startswith("zero"):
        return (
            "DeepSpeed moves and casts the parameters that an optimizer holds, which torch refuses "
            "for fake ones: engine={name: fsdp2, config: shard.yaml} is traced"
        )
    if setup.engine == "replicated" and world > 1:
        return (
            "DistributedDataParallel reads values of its buckets, which fake tensors have not: one "
            "GPU is traced (--gpus 1), and a rank of several holds its gradients beside that"
        )
    if setup.offload_states:
        return (
            "the tensors of a trace are all on one device, so nothing can be offloaded in it: "
            "engine={name: fsdp2, config: shard.yaml} is traced"
        )
    if recipe.algorithm.distance == "mmd":
        return (
            "algorithm.distance=mmd asks how many rows each rank has, and fake ones have none: "
            "algorithm.distance=kl is traced"
        )
    return None


def refuse(recipe: Recipe, world: int) -> None:
    """ValueError where `refusal` has a line."""
    if why := refusal(recipe, world):
        raise ValueError(
            f"--trace: not on {world} GPU(s): {why}; without --trace the formula plans this recipe"
        )


def trace(recipe: Recipe, world: int) -> Trace:
    """The step of `recipe` that holds the most, as rank 0 of `world`. ValueError where `refusal`
    has a line.

    Of a row whose reference is theta_{t-1} the peak is of the steps before, at and after a
    checkpoint, and the collectives are those of all the others.
    """
    refuse(recipe, world)
    setup = setup_for(recipe, world)
    row = bind(recipe.algorithm, _noise_site(recipe))
    with _alone(world), _as_on_a_gpu(PART), _as_on_a_gpu(CHUNK_ELEMENTS):
        model = outline.model(recipe)
        if setup.engine == "fsdp2":  # outside fake tensors: its mesh has values
            fsdp2.shard(model, dtype=_dtype(recipe), **_config(recipe))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            with Operators():
                engine = _engine(recipe, setup, model)
            with tracked(engine, mode) as tracker, Operators() as operators:
                _steps(recipe, setup, row, engine, operators)
    return _found(tracker, operators)


def _steps(
    recipe: Recipe, setup: RunSetup, row: Algorithm, engine: Engine, operators: Operators
) -> None:
    """The last of them counted."""
    batches = [outline.batch(recipe)] * setup.micros
    forward, counts = _forward(recipe, engine.module)
    rounds = _rounds(row, batches)
    # of a row that climbs now and then, the last one climbs
    first = -(len(rounds) - 1) % row.of(Climb).perturb_every
    said = Said({NO_DISTANCE, NO_EFFECT}, started=True)  # of values, which are not there
    stepper = Stepper(engine, row, recipe.train.seed, first, said=said)
    for at, upcoming in enumerate(rounds, start=1):
        operators.counting = at == len(rounds)
        stepper.step(batches, forward, counts, upcoming=upcoming)


def _found(tracker: MemTracker, operators: Operators) -> Trace:
    snapshot = next(iter(tracker.get_tracker_snapshot("peak").values()))
    peak = {getattr(kind, "value", str(kind)): size for kind, size in snapshot.items()}
    total, traffic = peak.pop("Total"), operators.traffic
    return Trace(peak, total, dict(traffic.calls), dict(traffic.bytes), operators.flops)


def _rounds(row: Algorithm, batches: list[Batch]) -> list[list[Batch] | None]:
    """What each step is told of the next one's batch. A reference at remembered weights remembers
    them in the first."""
    if any(isinstance(r.reference, Previous) for r in row.regions):
        return [None, batches, batches]
    return [None, batches] if row.references else [batches]


@contextmanager
def _alone(world: int) -> Iterator[None]:
    """Rank 0 of a process group of `world` that nobody else is in."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_on_a_gpu(elements: dict[str, int]) -> Iterator[None]:
    """Inside, the CPU works in parts of the size that a GPU does."""
    own = elements["cpu"]
    elements["cpu"] = elements["cuda"]
    try:
        yield
    finally:
        elements["cpu"] = own


def _engine(recipe: Recipe, setup: RunSetup, model: nn.Module) -> Engine:
    outline.materialise_all(model)
    if setup.engine == "fsdp2":
        model.to("cpu")  # where it is already: FSDP2 then looks for the new parameters
    optimizer = make(recipe.optimizer, model)
    for group in optimizer.param_groups:
        group["foreach"] = True  # torch's default on a GPU
    _warm_up(optimizer)
    clip_norm = recipe.train.clip_norm
    if setup.engine == "fsdp2":
        every = setup.reduce_each
        return fsdp2.over(model, optimizer, clip_norm=clip_norm, reduce_every_micro_batch=every)
    return replicated.over(model, optimizer, dtype=_dtype(recipe), clip_norm=clip_norm)


def _warm_up(optimizer: torch.optim.Optimizer) -> None:
    """Moments as after a step. Before the tracker looks on: DTensor works out once for each
    operator how it is sharded, on whole tensors that are not the rank's."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _forward(
    recipe: Recipe, model: nn.Module
) -> tuple[UserForward, Callable[[Batch], tuple[int, int]]]:
    """(forward, counts) as the recipe's task has them."""
    if outline.HEADS[recipe.task.name] == "AutoModelForCausalLM":
        return causal.chunked(model, recipe.model) or causal.output, causal.counts
    return _classified, lambda batch: (len(batch["labels"]), len(batch["labels"]))


def _classified(model: nn.Module, batch: Batch) -> Output:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    loss = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
    return Output(loss, len(logits), logits, rows=len(logits))


def _noise_site(recipe: Recipe) -> str:
    return "pixel_values" if recipe.task.name == "image_classification" else "embedding"


def _dtype(recipe: Recipe) -> torch.dtype:
    return getattr(torch, recipe.model.dtype)


def _config(recipe: Recipe) -> dict[str, Any]:
    found = engine_config(recipe.engine.model_copy(update={"name": "fsdp2"}))
    return {key: value for key, value in found.items() if key != "reduce_every_micro_batch"}
