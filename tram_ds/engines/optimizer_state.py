"""What a torch optimizer remembers between steps, in names that do not depend on the sharding.

Three kinds: moments, as large as their parameter; numbers, one per parameter (a step count, NAdam's
mu_product); and tensors of another shape (Adafactor's row and column sums). The last are kept by
replicated weights only: cut parameters have no rows.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Extras:
    """An optimizer's state beside its moments.

    numbers: key -> parameter -> value; a parameter without state has no "step" and none else.
    Empty: every parameter has taken base_steps steps. others: "parameter/key" -> tensor, live.
    """

    numbers: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps a torch optimizer has taken, from its own state; 0 before the first."""
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    # max: one that some passes did not reach has counted fewer
    return int(max(counts, default=0.0))


def moment_keys(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[str]:
    """The keys whose tensors are as large as their parameter, for every parameter that has them."""
    found: dict[str, bool] = {}
    for p in parameters:
        for key, value in optimizer.state.get(p, {}).items():
            # by name: of a () parameter the count has the shape of a moment
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
    # told over all parameters: a key that is a moment of some and not of others is none
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
        # it had none then: with one of zeros its bias correction would not start at its first step
        if counted is not None and name not in counted:
            optimizer.state.pop(parameter, None)
            continue
        old = optimizer.state.get(parameter, {})
        # in place where there is one: a new one beside it would stay in the allocator's heap
        state: dict[str, Any] = {key: _like(parameter, old.get(key)) for key in moments}
        for key, shards in moments.items():
            whole = state[key]
            local = whole.to_local() if isinstance(whole, DTensor) else whole
            # cast as well: a checkpoint's fp32 into whatever the optimizer keeps
            local.copy_(shards[index].view(local.shape))
        if "exp_avg" in state:
            state["step"] = step_count(optimizer, steps, parameter.device)
        for key, values in extras.numbers.items():
            if name in values:
                state[key] = number(values[name], key, optimizer, parameter)
        for path, tensor in extras.others.items():
            owner, _, key = path.rpartition("/")
            if owner == name:
                # copy: extras() hands out another optimizer's live tensors
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


def moment_names(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """What an optimizer that we know keeps per parameter, before it has; None for others."""
    group, name = optimizer.param_groups[0], type(optimizer).__name__
    # by name: DeepSpeed's and torch's share no class, and neither is imported for it
    if name in ("Adam", "AdamW", "NAdam", "RAdam", "FusedAdam", "DeepSpeedCPUAdam"):
        return {"exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])}
    if name == "SGD":
        return {"momentum_buffer"} if group["momentum"] else set()
    return None
