"""Optimizers that cannot take the second gradient, cannot be saved or do not keep what a row moves
along: refused by name, before the first step where that can be told."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tram_ds.engines.optimizer_state import (
    FIRST_MOMENTS,
    SECOND_MOMENT,
    moment_keys,
    moment_names,
)

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
    # torch's AdamW has decoupled_weight_decay among its defaults, and does not take it
    wanted = inspect.signature(kind.__init__).parameters
    # a matrix: what keeps row and column sums keeps them of these alone
    parameter = torch.zeros(2, 2, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    try:
        like = kind([parameter], **{k: v for k, v in optimizer.defaults.items() if k in wanted})
        like.step()
    except (TypeError, ValueError, RuntimeError):  # a fused or capturable one steps on a GPU alone
        return None
    return like


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
