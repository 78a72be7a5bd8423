"""What a torch optimizer remembers between steps, in names that do not depend on the sharding.

Three kinds: moments, as large as their parameter; numbers, one per parameter (a step count, NAdam's
mu_product); and tensors of another shape (Adafactor's row and column sums). The last are kept by
replicated weights only: cut parameters have no rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tram_ds.engines.shards import Shards

# A number as JSON can hold it. One that the optimizer keeps as a () tensor is a list of one.
Number = int | float | list[float]

# where optimizers keep the running sum or mean of gradients that their step goes against
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENT = "exp_avg_sq"  # and of their squares, in all that are kinds of Adam
# These look at a whole parameter: over its pieces they would be other methods.
WHOLE_MATRICES = ("Adafactor", "Muon", "Shampoo", "SOAP", "LAMB", "Lamb", "LARS", "FusedLamb")
# Settings of torch's optimizers that no step of ours can honour.
FLAGS = {
    "differentiable": "keeps the graph: set it to False",
    "maximize": "goes up the loss, as the ascent does, which is then no adversary: return minus "
    "the loss and set it to False",
}
# These send a compressed gradient or momentum themselves, past the reduction that the norm is of.
OWN_REDUCTION = ("OnebitAdam", "ZeroOneAdam", "OnebitLamb", "ZeroRedundancyOptimizer")


@dataclass(frozen=True)
class Extras:
    """An optimizer's state beside its moments.

    numbers: key -> parameter -> value; a parameter without state has no "step" and none else.
    Empty: every parameter has taken base_steps steps. others: "parameter/key" -> tensor, live.
    """

    numbers: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)


def refuse_optimizer(optimizer: Any, *, sharded: bool, allowed: Sequence[str] = ()) -> None:
    """ValueError for an optimizer that cannot take the second gradient, or whose state could not be
    saved, by name. allowed: see refuse_state."""
    name = type(optimizer).__name__
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        raise ValueError(f"optimizer={optimizer!r} is no torch optimizer: pass the optimizer")
    needed = [
        p.name
        for p in inspect.signature(optimizer.step).parameters.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name != "self"  # torch's schedulers put an unbound function in its place
    ]
    if needed:
        raise ValueError(
            f"{name}.step() needs a {needed[0]}, which evaluates the loss at weights of its own "
            "choice: use an optimizer that steps by the gradient it is given, such as AdamW or SGD"
        )
    if name == "SparseAdam":
        raise ValueError(
            "SparseAdam needs sparse gradients, and the second gradient is dense: use Adam"
        )
    for key, why in FLAGS.items():
        if any(group.get(key) for group in optimizer.param_groups):
            raise ValueError(f"an optimizer with {key}=True {why}")
    captured = [g for g in optimizer.param_groups if g.get("capturable")]
    if any(p.device.type == "cpu" for group in captured for p in group["params"]):
        raise ValueError(
            "an optimizer with capturable=True steps on a GPU alone, and its parameters are on the "
            "CPU: set it to False, or move the model before wrap()"
        )
    if name in OWN_REDUCTION:
        raise ValueError(
            f"{name} exchanges gradients or weights itself, so replicas differ between its steps: "
            "use Adam or AdamW"
        )
    if sharded and name in WHOLE_MATRICES:
        raise ValueError(
            f"{name} looks at whole parameters, and sharded weights have pieces of them: use "
            "replicated weights (DistributedDataParallel), or AdamW"
        )
    if sharded and (shown := _shown(optimizer)) is not None:
        refuse_state(shown, shown.param_groups[0]["params"], allowed)


def _shown(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Its like over one small parameter, after a step: what it keeps shows only then. None for an
    optimizer that is not made from its defaults alone: its own first step has to show it."""
    kind = type(optimizer)
    if not kind.__module__.startswith(("torch.optim.", "transformers.")):
        return None
    wanted = inspect.signature(kind.__init__).parameters
    parameter = torch.zeros(2, 2, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    try:
        like = kind([parameter], **{k: v for k, v in optimizer.defaults.items() if k in wanted})
        like.step()
    except (TypeError, ValueError, RuntimeError):  # a fused or capturable one steps on a GPU alone
        return None
    return like


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps a torch optimizer has taken, from its own state; 0 before the first."""
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return int(max(counts, default=0.0))


def _is_moment(value: Any, parameter: Tensor, key: str) -> bool:
    return isinstance(value, Tensor) and key != "step" and value.shape == parameter.shape


def moment_keys(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[str]:
    """The keys whose tensors are as large as their parameter, for every parameter that has them."""
    found: dict[str, bool] = {}
    for p in parameters:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and key != "step":
                found[key] = found.get(key, True) and value.shape == p.shape
    return [key for key, always in found.items() if always]


def named_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """The moments, by key, one tensor per parameter; zeros for a parameter without state."""
    return {
        key: [_moment(optimizer.state.get(p, {}).get(key), p) for p in parameters]
        for key in moment_keys(optimizer, parameters)
    }


def _moment(value: Any, parameter: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.zeros_like(parameter.detach())


def named_extras(optimizer: torch.optim.Optimizer, names: Mapping[Any, str], steps: int) -> Extras:
    """What is no moment. names: of the parameters under which the optimizer files its state."""
    moments = set(moment_keys(optimizer, list(names)))
    numbers: dict[str, dict[str, Number]] = {}
    others: dict[str, Tensor] = {}
    for p, name in names.items():
        for key, value in optimizer.state.get(p, {}).items():
            if key in moments or value is None:
                continue
            if isinstance(value, Tensor) and value.dim():
                others[f"{name}/{key}"] = value
            elif isinstance(value, Tensor):
                numbers.setdefault(key, {})[name] = [value.item()]
            else:
                numbers.setdefault(key, {})[name] = value
    if (
        numbers.keys() == {"step"}
        and "exp_avg" in moments
        and _plain(numbers["step"], len(names), steps)
    ):
        numbers = {}
    return Extras(numbers, others)


def _plain(counts: Mapping[str, Number], parameters: int, steps: int) -> bool:
    """Whether base_steps says it all."""
    values = [c[0] if isinstance(c, list) else c for c in counts.values()]
    return len(values) == parameters and all(v == steps for v in values)


def load_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Any, str],
    moments: Mapping[str, Shards],
    steps: int,
    extras: Extras,
) -> None:
    """Fills a torch optimizer's state, parameter by parameter, from shards with one piece per
    parameter."""
    counted = extras.numbers.get("step")
    for index, (parameter, name) in enumerate(names.items()):
        if counted is not None and name not in counted:
            optimizer.state.pop(parameter, None)
            continue
        old = optimizer.state.get(parameter, {})
        # in place where there is one: a new one beside it would stay in the allocator's heap
        state: dict[str, Any] = {key: _like(parameter, old.get(key)) for key in moments}
        for key, shards in moments.items():
            whole = state[key]
            local = whole.to_local() if isinstance(whole, DTensor) else whole
            local.copy_(shards[index].view(local.shape))
        if "exp_avg" in state:
            state["step"] = step_count(optimizer, steps, parameter.device)
        for key, values in extras.numbers.items():
            if name in values:
                state[key] = number(values[name], key, optimizer, parameter)
        for path, tensor in extras.others.items():
            owner, _, key = path.rpartition("/")
            if owner == name:
                state[key] = tensor.detach().to(parameter.device, copy=True)
        if state:
            optimizer.state[parameter] = state
        else:  # an empty one would be taken for one that has been made
            optimizer.state.pop(parameter, None)


def _like(parameter: Tensor, there: Any) -> Tensor:
    """`there`, or zeros where it is no tensor of a parameter's kind."""
    p = parameter.detach()
    alike = isinstance(there, Tensor) and type(there) is type(p)
    if alike and (there.shape, there.dtype, there.device) == (p.shape, p.dtype, p.device):
        return there
    return torch.zeros_like(p)


def number(value: Number, key: str, optimizer: torch.optim.Optimizer, p: Tensor) -> Any:
    """As torch's own load_state_dict places it: a step count stays on the host but where a fused
    step reads it."""
    if not isinstance(value, list):
        return value
    there = key != "step" or _step_on_device(optimizer)
    wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(value[0], dtype=wide, device=p.device if there else "cpu")


def _step_on_device(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def step_count(optimizer: torch.optim.Optimizer, steps: int, device: torch.device) -> Tensor | int:
    """A new step count of the kind this optimizer keeps: DeepSpeed's and transformers' are numbers,
    torch's fused ones lie on the device."""
    if not type(optimizer).__module__.startswith("torch."):
        return steps
    return torch.tensor(float(steps), device=device if _step_on_device(optimizer) else "cpu")


def refuse_state(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], allowed: Sequence[str] = ()
) -> None:
    """ValueError where cut parameters have state that is neither a moment nor the step count nor
    one of `allowed`: it could not be saved. An unknown optimizer shows its state only after its
    first step."""
    moments = {*moment_keys(optimizer, parameters), "step", *allowed}
    strange = {
        key
        for p in parameters
        for key, value in optimizer.state.get(p, {}).items()
        if key not in moments and value is not None
    }
    if strange:
        raise ValueError(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(strange))} for every piece, which "
            "sharded weights cannot save: use replicated weights, or AdamW"
        )


def moment_names(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """What an optimizer that we know keeps per parameter, before it has; None for others."""
    group, name = optimizer.param_groups[0], type(optimizer).__name__
    if name in ("Adam", "AdamW", "NAdam", "RAdam", "FusedAdam", "DeepSpeedCPUAdam"):
        return {"exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])}
    if name == "SGD":
        return {"momentum_buffer"} if group["momentum"] else set()
    return None


def refuse_without_first_moment(
    optimizer: torch.optim.Optimizer, kept: set[str] | None = None
) -> None:
    """ValueError where it keeps none of FIRST_MOMENTS. kept: what it keeps, where that is seen;
    None: what is known of it, which of some optimizers is nothing before their first step."""
    kept = _kept(optimizer) if kept is None else kept
    if kept is not None and not kept & set(FIRST_MOMENTS):
        raise ValueError(
            f"algorithm.name = msam moves along the optimizer's first moment, and "
            f"{type(optimizer).__name__} as it is set keeps none: use Adam, AdamW, or SGD with "
            "momentum above 0"
        )


def refuse_without_second_moment(
    optimizer: torch.optim.Optimizer, kept: set[str] | None = None
) -> None:
    """ValueError where it keeps no SECOND_MOMENT, or not by one beta_2 and eps. kept: as above."""
    kept = _kept(optimizer) if kept is None else kept
    groups = optimizer.param_groups
    if (kept is not None and SECOND_MOMENT not in kept) or "betas" not in groups[0]:
        raise ValueError(
            f"algorithm.precondition divides by the square root of Adam's second moments, and "
            f"{type(optimizer).__name__} keeps none: use Adam or AdamW, or set it to false"
        )
    if len({(float(group["betas"][1]), float(group["eps"])) for group in groups}) > 1:
        raise ValueError(
            "algorithm.precondition divides all weights alike, and the optimizer's groups differ "
            "in betas or eps: give them the same, or set it to false"
        )


def _kept(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """The moments that it keeps, known or shown; None where only its first step can tell."""
    kept = moment_names(optimizer)
    shown = _shown(optimizer) if kept is None else None
    return kept if shown is None else set(moment_keys(shown, shown.param_groups[0]["params"]))
