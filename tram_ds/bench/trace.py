"""One step of a recipe as one rank of W runs it, without its memory and without the other ranks:
what a formula counts, counted in the step itself.

Tensors are torch's fake ones (shapes and storages, no values), the process group answers at once,
and torch's memory tracker looks on, with counters of FLOPs (by torch's formulas) and of
collectives. A fake tensor is on the CPU, so that the sizes by which a GPU works are put in place,
and fused attention is the CPU's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.bound import bind
from tram_ds.algorithms.options import Climb
from tram_ds.algorithms.reference import Previous
from tram_ds.algorithms.said import NO_DISTANCE, NO_EFFECT, Said
from tram_ds.algorithms.stepper import Stepper, UserForward
from tram_ds.bench.measure import Traffic
from tram_ds.engines import fsdp2, replicated
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import PART
from tram_ds.models.logit_chunks import CHUNK_ELEMENTS
from tram_ds.models.output import Batch, Output
from tram_ds.planning import outline
from tram_ds.planning.plan import setup_for
from tram_ds.planning.setup import RunSetup
from tram_ds.planning.sizes import CPU_ATTENTION
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
    """One line on why this cannot be traced; None where it can."""
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
        return "the tensors of a trace are all on one device, so nothing can be offloaded in it"
    if recipe.algorithm.distance == "mmd":
        return "algorithm.distance=mmd asks how many rows each rank has, and fake ones have none"
    return None


def trace(recipe: Recipe, world: int) -> Trace:
    """The step of `recipe` that holds the most, as rank 0 of `world`. ValueError where `refusal`
    has a line.

    Of a row whose reference is theta_{t-1} the peak is of the steps before, at and after a
    checkpoint, and the collectives are those of all the others.
    """
    if why := refusal(recipe, world):
        raise ValueError(f"--trace: {why}")
    setup = setup_for(recipe, world)
    row = bind(recipe.algorithm, _noise_site(recipe))
    with _alone(world), _as_on_a_gpu(PART), _as_on_a_gpu(CHUNK_ELEMENTS):
        model = outline.model(recipe)
        if setup.engine == "fsdp2":  # outside fake tensors: its mesh has values
            fsdp2.shard(model, dtype=_dtype(recipe), **_config(recipe))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, Values():
            engine = _engine(recipe, setup, model)
            with _tracked(engine, mode) as tracker:
                return _traced(recipe, setup, row, engine, tracker)


def _traced(
    recipe: Recipe, setup: RunSetup, row: Algorithm, engine: Engine, tracker: MemTracker
) -> Trace:
    batches = [outline.batch(recipe)] * setup.micros
    forward, counts = _forward(recipe, engine.module)
    rounds = _rounds(row, batches)
    # of a row that climbs now and then, the last one climbs
    first = -(len(rounds) - 1) % row.of(Climb).perturb_every
    said = Said({NO_DISTANCE, NO_EFFECT}, started=True)  # of values, which are not there
    stepper = Stepper(engine, row, recipe.train.seed, first, said=said)
    flops, traffic = Flops(), Traffic()
    for upcoming in rounds[:-1]:
        stepper.step(batches, forward, counts, upcoming=upcoming)
    with flops, traffic:
        stepper.step(batches, forward, counts, upcoming=rounds[-1])
    found = next(iter(tracker.get_tracker_snapshot("peak").values()))
    peak = {getattr(kind, "value", str(kind)): size for kind, size in found.items()}
    total = peak.pop("Total")
    return Trace(peak, total, dict(traffic.calls), dict(traffic.bytes), flops.total)


def _rounds(row: Algorithm, batches: list[Batch]) -> list[list[Batch] | None]:
    """What each step is told of the next one's batch. A reference at remembered weights remembers
    them in the first."""
    if any(isinstance(r.reference, Previous) for r in row.regions):
        return [None, batches, batches]
    return [None, batches] if row.references else [batches]


class Values(TorchDispatchMode):
    """What is asked of a tensor that has no values, answered so that a step goes its usual way:
    flags are set, tensors are equal, what is summed up to tell ranks apart is 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        if func is torch.ops.aten.equal.default:
            return True
        return func(*args, **(kwargs or {}))


class Flops(TorchDispatchMode):
    """total: of all operators inside, by torch's formulas. torch's own counter follows modules too,
    and its hooks keep tensors alive that a step lets go."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        of = func.overloadpacket
        if of in CPU_ATTENTION:
            self.total += CPU_ATTENTION[of](*(x.shape for x in args[:3]))
        elif of == ATTENTION_BACKWARD:
            self.total += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif of in flop_registry:
            self.total += flop_registry[of](*args, **(kwargs or {}), out_val=out)
        return out


ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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


@contextmanager
def _tracked(engine: Engine, mode: FakeTensorMode) -> Iterator[MemTracker]:
    """Inside, torch's tracker sees the model, the optimizer and every tensor that is made."""
    model, optimizer = engine.model, engine.weights.optimizer
    if isinstance(engine.weights, fsdp2.FSDP2):
        tracker: MemTracker = FSDPMemTracker(model, optimizer)
        # before it knows parameters and moments by name: whatever else is there
        tracker.track_inputs(tuple(_there(mode)))  # type: ignore[attr-defined]
    else:
        tracker = MemTracker()
        tracker.track_external(*_there(mode), model, optimizer)

    def forget(module: nn.Module, _: Any) -> None:
        if module is model:  # it counts by module, and knows one forward pass of each
            tracker.reset_mod_stats()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(forget).remove)
        yield stack.enter_context(tracker)


def _there(mode: FakeTensorMode) -> list[Tensor]:
    gc.collect()
    return [
        thing for thing in gc.get_objects() if type(thing) is FakeTensor and thing.fake_mode is mode
    ]


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
