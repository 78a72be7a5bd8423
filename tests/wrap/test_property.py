"""Random small models, rows and optimizers: three steps are those by hand, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.wrap.hand import batches, forward, gap
from tests.wrap.rows_by_hand import OPTIONS, ROWS, RowByHand
from tram_ds.algorithms.stepper import wrap

O = torch.optim  # noqa: E741
Make = Callable[[Any], torch.optim.Optimizer]
# without a division by the root of small squares, which would make rounding errors large
FAR = {"lr": 0.05, "eps": 0.1}
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: O.SGD(p, lr=0.1),
    "momentum": lambda p: O.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: O.Adam(p, **FAR),
    "amsgrad": lambda p: O.Adam(p, amsgrad=True, weight_decay=0.01, **FAR),
    "adamw": lambda p: O.AdamW(p, weight_decay=0.1, **FAR),
    "nadam": lambda p: O.NAdam(p, **FAR),
    "asgd": lambda p: O.ASGD(p, lr=0.1, t0=1),
    "lbfgs": O.LBFGS,
    "sparse_adam": O.SparseAdam,
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "batch": lambda: nn.BatchNorm1d(6),
    "batch_mean": lambda: nn.BatchNorm1d(6, momentum=None),
    "layer": lambda: nn.LayerNorm(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "rms": lambda: nn.RMSNorm(6),
}


@dataclass(frozen=True)
class Plan:
    """A model of the grammar: `blocks` of (norm, run how, frozen), a head tied to the first block
    or not, and what is odd about one parameter."""

    blocks: tuple[tuple[str, str, bool], ...]
    tied: bool
    odd: str
    double: bool
    seed: int


class Model(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.entry = nn.Identity()  # where tram_x adds its noise
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), NORMS[norm](), nn.Tanh()) for norm, _, _ in plan.blocks
        )
        self.head = nn.Linear(6, 6)
        if plan.tied:
            self.head.weight = self.blocks[0][0].weight
        for block, (_, _, frozen) in zip(self.blocks, plan.blocks, strict=True):
            block.requires_grad_(not frozen)
        base = torch.linspace(0.5, 1.5, 12).view(6, 2)
        column = base[:, 0] if plan.odd == "strided" else base[:, 0].clone()
        self.scale = nn.Parameter(column, requires_grad=plan.odd != "frozen")
        if plan.double:
            self.scale.data = self.scale.data.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block, (_, how, _) in zip(self.blocks, self.plan.blocks, strict=True):
            if how == "plain":
                x = block(x)
            else:
                x = checkpoint(block, x.requires_grad_(), use_reentrant=how == "reentrant")
        if self.plan.odd == "unused":
            return self.head(x)
        return self.head(x) * self.scale.to(x.dtype)


blocks = st.tuples(
    st.sampled_from(sorted(NORMS)),
    st.sampled_from(["plain", "reentrant", "non_reentrant"]),
    st.booleans(),
)
plans = st.builds(
    Plan,
    blocks=st.lists(blocks, min_size=1, max_size=3).map(tuple),
    tied=st.booleans(),
    odd=st.sampled_from(["no", "no", "strided", "frozen", "unused"]),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
CHECKPOINTED = Plan((("batch", "reentrant", False), ("rms", "plain", True)), True, "no", True, 0)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    plan=plans,
    row=st.sampled_from(ROWS),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    micros=st.integers(1, 2),
)
@example(plan=CHECKPOINTED, row="sam", optimizer="momentum", micros=1)
@example(plan=CHECKPOINTED, row="tram_prev", optimizer="adamw", micros=1)
@example(plan=CHECKPOINTED, row="tram_x", optimizer="adam", micros=1)
def test_three_steps_are_those_by_hand_or_refused(
    plan: Plan, row: str, optimizer: str, micros: int
) -> None:
    ours, theirs = Model(plan), Model(plan)
    strided = plan.odd == "strided" and not plan.double  # which is a copy
    refused = optimizer in ("lbfgs", "sparse_adam") or strided
    recomputed = any(how != "plain" for _, how, _ in plan.blocks)
    # by hand all micro-batches are differentiated at once, which orders recomputed statistics
    # otherwise
    micros = 1 if recomputed else micros
    options: dict[str, Any] = dict(OPTIONS.get(row, {}))
    if row == "tram_x":
        options["noise_site"] = theirs.entry
    made = OPTIMIZERS[optimizer]
    try:
        stepper = wrap(theirs, made(list(theirs.parameters())), row, **options)
    except ValueError as error:
        assert refused and len(str(error)) > 40, error
        return
    assert not refused
    hand = RowByHand(row, ours, made(list(ours.parameters())), forward, ours.entry)
    for step in range(3):
        data = batches(micros, d=6, classes=6, seed=step)
        hand.step(data)
        stepper.step(data, forward)
    assert gap(ours, theirs) < 1e-4  # three fp32 steps through tanh and norms
