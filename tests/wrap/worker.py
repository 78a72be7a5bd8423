"""The cases of one engine on two ranks, in one process group: name -> [verdict, detail] of rank 0.

A verdict is "holds", with the largest difference from the step by hand over the rows of all ranks,
or "refused", with the words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.parity import build
from tests.wrap import branches
from tests.wrap.hand import LR, RHO, batches, forward, mlp, sam_step, sgd
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.checkpoint.export import full_state
from tram_ds.engines import fsdp2

Make = Callable[[], nn.Module]
# engines that a model of branches runs on, in the process group of one
BRANCHES = {
    "fsdp2": ("fsdp2", "fsdp2_offload"),
    "zero2": ("zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload"),
}


def rows(rank: int, seed: int = 0) -> list[Any]:
    """Ragged: 6 targets on rank 0, 2 on rank 1."""
    return batches(1, 6 - 4 * rank, seed=1 + rank + seed)


def first(model: nn.Module) -> Any:
    return [p for p in model.parameters() if p.requires_grad]


def built(engine: str, model: nn.Module, pick: Any = first, optimizer: Any = None) -> Stepper:
    made = optimizer or (lambda p: torch.optim.SGD(p, lr=LR))
    if engine.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0, and wrap() honours it
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(engine[4])},
        }
        wrapped = deepspeed.initialize(model=model, optimizer=made(pick(model)), config=config)[0]
        return wrap(wrapped, algorithm="sam", rho=RHO)
    if engine == "fsdp2":
        fully_shard(model[0])  # type: ignore[index]
        fully_shard(model)
        return wrap(model, made(pick(model)), "sam", rho=RHO)
    return wrap(DDP(model), made(pick(model)), "sam", rho=RHO)


def by_hand(engine: str, make: Make, stepper: Stepper | None = None) -> tuple[str, float]:
    """Three steps; parameters from an export, so that sharded ones are whole."""
    rank, hand = dist.get_rank(), make()
    stepper = stepper or built(engine, make())
    optimizer = sgd(hand)
    for step in range(3):
        stepper.step(rows(rank, 10 * step), forward)
        sam_step(hand, optimizer, [b for k in range(2) for b in rows(k, 10 * step)], forward)
    state = full_state(stepper.engine)
    names = dict(hand.named_parameters())
    worst = max((float((v - names[k].detach()).abs().max()) for k, v in state.items()), default=0.0)
    build.stop(stepper)
    return "holds", worst


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


class Box(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def box(outside: bool) -> tuple[str, float]:
    model, hand = mlp(), mlp()
    boxed = Box(DDP(model))
    if outside:
        boxed.extra = nn.Linear(2, 2)
    stepper = wrap(boxed, sgd(boxed), "sam", rho=RHO)
    optimizer = sgd(hand)
    for step in range(3):
        stepper.step(rows(dist.get_rank(), step), forward)
        sam_step(hand, optimizer, [b for k in range(2) for b in rows(k, step)], forward)
    pairs = zip(model.parameters(), hand.parameters(), strict=True)
    return "holds", max(float((a - b).detach().abs().max()) for a, b in pairs)


def plain() -> tuple[str, float]:
    model = mlp()
    wrap(model, sgd(model))
    return "holds", 0.0


def loaded_apart() -> tuple[str, float]:
    model = DDP(mlp())
    with torch.no_grad():
        model.module[0].bias[0] += dist.get_rank()
    wrap(model, sgd(model))
    return "holds", 0.0


def drifting() -> tuple[str, float]:
    """One rank's weights written between two steps: found when that parameter's turn comes."""
    model = DDP(mlp())
    stepper = wrap(model, sgd(model))
    for step in range(6):
        stepper.step(rows(dist.get_rank()), forward)
        if step == 1:
            with torch.no_grad():
                model.module[2].bias += 1e-6 * dist.get_rank()
    return "holds", 0.0


def drifting_hybrid() -> tuple[str, float]:
    """The same of a shard that both ranks hold."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = mlp()
    fully_shard(model, mesh=mesh)
    stepper = wrap(model, sgd(model), "sam", rho=RHO)
    for step in range(6):
        stepper.step(rows(dist.get_rank()), forward)
        if step == 1:
            with torch.no_grad():
                model[2].bias.to_local().add_(1e-6 * dist.get_rank())
    return "holds", 0.0


def kept_hybrid() -> tuple[str, float]:
    """Nobody writes: nothing is found, and the step is the one by hand."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = mlp()
    fully_shard(model, mesh=mesh)
    return by_hand("fsdp2", mlp, wrap(model, sgd(model), "sam", rho=RHO))


def reduced_once() -> tuple[str, float]:
    """Gradients are reduced after the last of three micro-batches. One pass raises before that, and
    the step is taken again: nothing of it is left. Once with a bf16 working copy, whose sums are
    fp32, beside an engine that reduces every micro-batch."""
    steppers = [_once(False, torch.float32), *(_once(e, torch.bfloat16) for e in (False, True))]
    hand, calls = mlp(), {"n": 0}
    optimizer = sgd(hand)

    def run(model: Any, batch: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 5:  # the second micro-batch of pass 2
            raise MemoryError("out of memory")
        return forward(model, batch)

    def mine(rank: int, step: int) -> list[Any]:
        return [b for k in range(3) for b in rows(rank, 10 * step + 3 * k)]

    for step in range(3):
        for stepper in steppers:
            calls["n"] = 0
            if step == 1:
                try:
                    stepper.step(mine(dist.get_rank(), step), run)
                except MemoryError:
                    calls["n"] = 10
            assert step != 1 or calls["n"] == 10
            stepper.step(mine(dist.get_rank(), step), forward)
        sam_step(hand, optimizer, [b for k in range(2) for b in mine(k, step)], forward)
    once, half, each = (full_state(stepper.engine) for stepper in steppers)
    names = dict(hand.named_parameters())
    worst = max((float((v - names[k].detach()).abs().max()) for k, v in once.items()), default=0.0)
    return "holds", max([worst, *(float((half[k] - each[k]).abs().max()) for k in half)])


def _once(every: bool, dtype: torch.dtype) -> Stepper:
    model = mlp()
    fully_shard(model[0], mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    engine = fsdp2.over(model, sgd(model), reduce_every_micro_batch=every)
    return Stepper(engine, algorithm("sam", rho=RHO), 0)


def unused(**options: Any) -> tuple[str, float]:
    def make() -> nn.Module:
        model = mlp()
        model.extra = nn.Linear(3, 3)  # type: ignore[assignment]
        model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
        return model

    model = make()
    stepper = wrap(DDP(model, **options), sgd(model), "sam", rho=RHO)
    return by_hand("ddp", make, stepper)


def changed(engine: str) -> tuple[str, float]:
    """Frozen after the engine was built around it."""
    model = mlp()
    stepper = built(engine, model)
    try:
        stepper.step(rows(dist.get_rank()), forward)
        model[0].requires_grad_(False)
        stepper.step(rows(dist.get_rank()), forward)
    finally:
        build.stop(stepper)
    return "holds", 0.0


def buffers(engine: str) -> tuple[str, float]:
    """Every rank's statistics are those of pass 1: of a plain forward pass in train mode."""
    model, hand = mlp(nn.BatchNorm1d(8, momentum=None)), mlp(nn.BatchNorm1d(8, momentum=None))
    stepper = built(engine, model)
    stepper.step(rows(dist.get_rank()), forward)
    forward(hand, rows(dist.get_rank())[0])
    pairs = zip(stepper.engine.module.buffers(), hand.buffers(), strict=True)
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    build.stop(stepper)
    return "holds", worst


def raised(engine: str) -> tuple[str, float]:
    """In pass 2 of step 2, after the model's forward pass, on every rank; then taken again."""
    calls = {"n": 0, "at": 4}

    def run(model: Any, batch: Any) -> Any:
        calls["n"] += 1
        found = forward(model, batch)
        if calls["n"] == calls["at"]:
            raise MemoryError("out of memory")
        return found

    results = []
    for at in (0, 4):
        calls.update(n=0, at=at)
        stepper = built(engine, mlp())
        for step in range(3):
            try:
                stepper.step(rows(dist.get_rank(), step), run)
            except MemoryError:
                stepper.step(rows(dist.get_rank(), step), run)
        results.append(full_state(stepper.engine))
        build.stop(stepper)
    one, other = results
    return "holds", max((float((one[k] - other[k]).abs().max()) for k in one), default=0.0)


def state(engine: str, optimizer: Any) -> tuple[str, float]:
    """Three steps, state(), load() into a stepper of other weights, three steps of both."""
    one, other = (built(engine, mlp(seed=s), optimizer=optimizer) for s in (0, 4))
    try:
        for step in range(3):
            one.step(rows(dist.get_rank(), step), forward)
        other.load(one.state())
        for step in range(3):
            for stepper in (one, other):
                stepper.step(rows(dist.get_rank(), step), forward)
        pairs = zip(one.engine.params(), other.engine.params(), strict=True)
        worst = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    finally:
        build.stop(one)
        build.stop(other)
    return "holds", build.gather(worst)


def export_of_frozen(engine: str) -> tuple[str, float]:
    stepper, want = built(engine, frozen()), frozen()
    names = dict(want.named_parameters())
    found = full_state(stepper.engine)
    worst = max((float((found[k] - names[k].detach()).abs().max()) for k in found), default=0.0)
    build.stop(stepper)
    return "holds", worst


def cases(engine: str) -> dict[str, Callable[[], tuple[str, float]]]:
    optimizers = {
        "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    }
    last = lambda m: list(m[2].parameters())  # noqa: E731
    found: dict[str, Callable[[], tuple[str, float]]] = {
        "by hand": lambda: by_hand(engine, mlp),
        "frozen layer": lambda: by_hand(engine, frozen),
        "optimizer over some": lambda: by_hand(engine, mlp, built(engine, mlp(), last)),
        "changed after wrap": lambda: changed(engine),
        "buffers": lambda: buffers(engine),
        "a step that raised": lambda: raised(engine),
        "export of frozen": lambda: export_of_frozen(engine),
        **{f"state of {n}": lambda o=o: state(engine, o) for n, o in optimizers.items()},
    }
    if engine == "fsdp2":
        found |= {
            "hybrid": kept_hybrid,
            "drifting hybrid": drifting_hybrid,
            "reduced once": reduced_once,
        }
    for kind in BRANCHES.get(engine, ()):
        found[f"branches of {kind}"] = lambda kind=kind: branches.of(kind)
    if engine == "ddp":
        eager = lambda m: torch.compile(m, backend="eager")  # noqa: E731

        def around(wrapped: Callable[[nn.Module], nn.Module]) -> tuple[str, float]:
            model = mlp()
            return by_hand(engine, mlp, wrap(wrapped(model), sgd(model), "sam", rho=RHO))

        found |= {
            "compile of ddp": lambda: around(lambda m: eager(DDP(m))),
            "ddp of compile": lambda: around(lambda m: DDP(eager(m))),
            "module around ddp": lambda: box(False),
            "parameter outside ddp": lambda: box(True),
            "plain module": plain,
            "loaded apart": loaded_apart,
            "drifting": drifting,
            "unused": unused,
            "unused and looked for": lambda: unused(find_unused_parameters=True),
        }
    return found


def main(out: str, engine: str) -> None:
    rank, _ = build.start(engine)
    results = {}
    for name, case in cases(engine).items():
        try:
            verdict, detail = case()
            results[name] = [verdict, detail]
        except (ValueError, RuntimeError) as error:
            results[name] = ["refused", f"{type(error).__name__}: {error}"]
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
