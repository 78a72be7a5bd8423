"""The one protocol behind which every engine hides its sharding, and the parts of it that are the
same for all.

Communication contract. Every rank of the job calls every method in the same order with the same
number of micro-batches. `norm`, `data_sum`, `backward`, `moved` and `descend` are collective;
`params`, `grads` and `working` are local. A pass has one
small all-reduce: its sums and the squared norm of its gradient travel together. Everything a method
returns is identical on all ranks where it is a scalar, and rank-local where it is Shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tram_ds.engines.shards import Lazy, Shards

Schedule = Callable[[int], float]  # optimizer steps taken so far -> factor on every group's lr


@dataclass(frozen=True)
class Terms:
    """What one micro-batch adds to a pass.

    objective: () with its graph, a sum over this micro-batch's counted targets.
    sums: (4,) float64: task loss, counted targets, distance, and the positions the distance is
    summed over.
    """

    objective: Tensor
    sums: Tensor


Objective = Callable[[int, Any], Terms]
# (theta, g, g), a part of each -> what is to be measured of g
Weighted = Callable[[Shards, Shards, Shards], Shards]


@dataclass(frozen=True)
class Means:
    """Global means of one pass, () float64 each, the same on every rank. norm: of its (weighted)
    mean gradient."""

    loss: Tensor
    distance: Tensor
    targets: Tensor
    norm: Tensor

    @staticmethod
    def of(sums: Tensor) -> Means:
        """From Terms.sums and the squared norm of the summed gradient, (5,), over all ranks."""
        loss, targets, distance, positions, squares = sums.unbind()
        counted = targets.clamp(min=1)
        return Means(
            loss / counted, distance / positions.clamp(min=1), targets, squares.sqrt() / counted
        )


@dataclass(frozen=True)
class StepInfo:
    """What `descend` did."""

    lr: float
    skipped: bool


class Engine(Protocol):
    """What the step and everything around it know of an engine."""

    model: Any  # what a forward pass calls: the wrapped module
    module: nn.Module  # the bare module inside, for its hooks, modes and names
    device: torch.device
    rank: int
    world_size: int
    dtype: torch.dtype  # of the working copy
    # the ranks over which params() is cut into pieces; None: every rank has all of it
    shard_group: Any | None
    owns: bool  # this rank's pieces are the ones to write where replicas hold the same
    steps: int  # base-optimizer steps taken
    undivided: bool  # a rank can have a whole gradient of its own
    # inside moved(): the working copy is not theta_t, and nothing may be saved or loaded
    displaced: bool

    def params(self, keep: bool = False) -> Shards:
        """theta_t of this rank, fp32 masters. Valid until descend(), or for good with `keep`; never
        written by the caller."""
        ...

    def grads(self) -> Lazy:
        """The last pass's gradient: reduced, mean over the global batch, fp32, unclipped; layout as
        params().

        Read from the engine's own buffers: gone with the next backward(); realise() what must last.
        """
        ...

    def put_gradient(self, g: Shards | Lazy) -> None:
        """Makes `g`, a mean over the global batch, the gradient that descend() uses, instead of the
        last pass's."""
        ...

    def working(self) -> Lazy:
        """What the next forward pass reads of this rank's spans, in the working copy's precision,
        as fp32."""
        ...

    def norm(self, x: Shards | Lazy) -> Tensor:
        """() float64: global 2-norm, every parameter element counted once in the job.
        Collective."""
        ...

    def data_sum(self, x: Tensor) -> Tensor:
        """The sum of x over the data-parallel ranks, as a new tensor. Collective."""
        ...

    def moved(self, to: Shards | Lazy, until_descent: bool = False) -> AbstractContextManager[None]:
        """Working copy := `to`; on exit, also by an exception, theta_t is back bit for bit.
        Collective.

        until_descent: the caller promises that no forward pass comes before descend(), which
        overwrites the working copy
        anyway: where it is apart from the masters, a normal exit then leaves it, `displaced`, and
        saves a gather.
        """
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context of every forward pass."""
        ...

    def backward(
        self,
        batches: Sequence[Any],
        objective: Objective,
        weighted: Weighted | None = None,
        alone: bool = False,
    ) -> Means:
        """Clears the gradient, runs forward and backward over every micro-batch, reduces.
        Collective.

        weighted: an element-wise rule, linear in g, whose norm is to be measured; None: g itself.
        alone: nothing is reduced; gradient and Means are this rank's own. Only where `undivided`.
        """
        ...

    def descend(self, finite: Tensor, grad_norm: Tensor) -> StepInfo:
        """Clips, takes one base-optimizer step, publishes; leaves weights and moments untouched and
        says so if not finite.

        finite: () bool, the same on every rank: whether the passes before were. grad_norm: () of
        the gradient to descend by.
        """
        ...

    def clear(self) -> None:
        """Drops the gradient."""
        ...

    def moments(self) -> dict[str, Shards]:
        """The base optimizer's per-parameter state by its torch name (exp_avg, ...), live, layout
        as params()."""
        ...

    def load(self, params: Shards, moments: dict[str, Shards], steps: int) -> None:
        """Overwrites masters, moments and the count of base steps, and publishes. Collective."""
        ...


class Passes(Protocol):
    """What `run_pass` and `take_step` need of an engine; every engine module provides it."""

    device: torch.device
    world_size: int
    replicas: int  # ranks that hold the same piece
    clip_norm: float | None
    schedule: Schedule | None
    steps: int
    targets: Tensor

    def params(self) -> Shards: ...
    def data_sum(self, x: Tensor) -> Tensor: ...
    def clear(self) -> None: ...
    def backward_one(self, loss: Tensor, last: bool) -> None: ...
    # of the sum over the global batch, live, in the engine's own precision
    def raw_gradient(self) -> Shards: ...
    def optimizer_groups(self) -> list[dict[str, Any]]: ...
    def optimizer_step(self) -> None: ...


def run_pass(
    engine: Passes,
    batches: Sequence[Any],
    objective: Objective,
    weighted: Weighted | None,
    alone: bool = False,
) -> Means:
    """Engine.backward for every engine.

    Gradients are of sums; engines average over ranks, so the loss is multiplied by world_size. The
    division by the global count of targets happens once, after the single reduction that also
    brings the count and the norm: no mean of means.
    """
    engine.clear()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for index, batch in enumerate(batches):
        terms = objective(index, batch)
        engine.backward_one(
            terms.objective * (1 if alone else engine.world_size), last=index == len(batches) - 1
        )
        sums += terms.sums
    squares = squared_norm(engine, weighted) / (1 if alone else engine.replicas)
    found = torch.cat([sums, squares[None]])
    means = Means.of(found if alone else engine.data_sum(found))
    engine.targets = means.targets.clamp(min=1)
    return means


def squared_norm(engine: Passes, weighted: Weighted | None) -> Tensor:
    """() float64: of this rank's pieces of the summed gradient, weighted."""
    g = wide(engine.raw_gradient())
    x = g if weighted is None else Lazy(lambda theta, g: weighted(theta, g, g), engine.params(), g)
    return x.square_sum(engine.device).to(engine.device)


def wide(shards: Shards) -> Shards | Lazy:
    """fp32, part by part where the pieces are not."""
    return (
        shards
        if all(t.dtype in (torch.float32, torch.float64) for t in shards)
        else Lazy(Shards.wide, shards)
    )


def mean_gradient(engine: Passes) -> Lazy:
    """Engine.grads for every engine."""
    factor = 1.0 / engine.targets
    return Lazy(lambda g: g.wide() * factor, engine.raw_gradient())


def take_step(engine: Passes, finite: Tensor, grad_norm: Tensor) -> StepInfo:
    """Engine.descend for every engine: one host synchronisation, to decide whether the step is
    taken."""
    gradient = engine.raw_gradient()
    groups = engine.optimizer_groups()
    base_lr = [group.setdefault("initial_lr", group["lr"]) for group in groups]
    if engine.schedule is not None:
        for group, lr in zip(groups, base_lr, strict=True):
            group["lr"] = lr * engine.schedule(engine.steps)
    lr = float(groups[0]["lr"])
    if not bool(finite.to(grad_norm.device) & torch.isfinite(grad_norm)):
        engine.clear()
        return StepInfo(lr, skipped=True)
    factor = 1.0 / engine.targets
    if engine.clip_norm is not None:
        factor = factor * (engine.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    gradient.scale_(factor)
    engine.optimizer_step()
    engine.steps += 1
    engine.clear()
    return StepInfo(lr, skipped=False)


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Trainable parameters -> unsharded names, tied parameters once, in the module's order. The
    layout every engine uses."""
    return {p: name for name, p in module.named_parameters() if p.requires_grad}


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps a torch optimizer has taken, from its own state; 0 before the first."""
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return int(max(counts, default=0.0))


def named_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """The tensors in a torch optimizer's state that are as large as their parameter, by name; the
    step count is not one."""
    keys = [
        k
        for k, v in optimizer.state.get(parameters[0], {}).items()
        if isinstance(v, Tensor) and k != "step"
    ]
    return {key: [optimizer.state[p][key] for p in parameters] for key in keys}


def refuse_half_precision(module: nn.Module) -> None:
    """ValueError where a trainable parameter is not fp32: an ascent step smaller than bf16's
    spacing would vanish in it."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"parameter {name} is {parameter.dtype}: most of a perturbation is lost in "
                "half-precision weights. Load the "
                "model in float32 and set model.dtype: bfloat16 for a bf16 working copy over fp32 "
                "masters"
            )


def load_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    moments: dict[str, Shards],
    steps: int,
) -> None:
    """Fills a torch optimizer's state for `parameters`, in order, from shards with one piece per
    parameter."""
    for index, parameter in enumerate(parameters):
        state: dict[str, Any] = {key: torch.zeros_like(parameter.detach()) for key in moments}
        for key, shards in moments.items():
            whole = state[key]
            local = whole.to_local() if isinstance(whole, DTensor) else whole
            local.copy_(shards[index].view(local.shape))
        if "exp_avg" in state:
            state["step"] = step_count(optimizer, steps, parameter.device)
        optimizer.state[parameter] = state


def step_count(optimizer: torch.optim.Optimizer, steps: int, device: torch.device) -> Tensor | int:
    """A new step count of the kind this optimizer keeps: DeepSpeed's are numbers, torch's fused
    ones lie on the device."""
    if type(optimizer).__module__.startswith("deepspeed"):
        return steps
    there = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(steps), device=device if there else "cpu")
