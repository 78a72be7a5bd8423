"""What an optimizer remembers goes through state() and load(), and through a checkpoint, bit for
bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.wrap.hand import batches, forward, mlp
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.engines import fsdp2, optimizer_refusals

Make = Callable[[Any], torch.optim.Optimizer]
O = torch.optim  # noqa: E741


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters)


MAKERS: dict[str, Make] = {
    "sgd": lambda p: O.SGD(p, lr=0.05),
    "momentum": lambda p: O.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: O.Adam(p, lr=0.05),
    "amsgrad": lambda p: O.AdamW(p, lr=0.05, amsgrad=True),
    "nadam": lambda p: O.NAdam(p, lr=0.05),
    "radam": lambda p: O.RAdam(p, lr=0.05),
    "adamax": lambda p: O.Adamax(p, lr=0.05),
    "adagrad": lambda p: O.Adagrad(p, lr=0.05, lr_decay=0.1),
    "adadelta": lambda p: O.Adadelta(p, lr=0.5),
    "rmsprop": lambda p: O.RMSprop(p, lr=0.05, momentum=0.5, centered=True),
    "rprop": lambda p: O.Rprop(p, lr=0.05),
    "asgd": lambda p: O.ASGD(p, lr=0.05, t0=2),
    "adafactor": lambda p: O.Adafactor(p, lr=0.05),
    "transformers_adafactor": adafactor,
}


class Partly(nn.Sequential):
    """Its last layer is used from the third call of `used` on: its step count stays behind."""

    used = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](self[1](self[0](x))) + (self[3](x) if self.used else 0.0)


def model(seed: int = 0) -> Partly:
    torch.manual_seed(seed)
    return Partly(*mlp(seed=seed), nn.Linear(5, 3))


def stepper(make: Make, seed: int = 0) -> tuple[Partly, Stepper]:
    made = model(seed)
    return made, wrap(made, make(list(made.parameters())), "tram_prev", radius_scale=5.0)


def same_after(one: tuple[Partly, Stepper], other: tuple[Partly, Stepper]) -> bool:
    """Both trained on, with the last layer in use."""
    for made, built in (one, other):
        made.used = True
        for _ in range(3):
            built.step(batches(), forward)
    pairs = zip(one[0].parameters(), other[0].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", MAKERS)
def test_state_and_load(name: str) -> None:
    first, second = stepper(MAKERS[name]), stepper(MAKERS[name], seed=4)
    for _ in range(3):
        first[1].step(batches(), forward)
    second[1].load(copy.deepcopy(first[1].state()))
    assert same_after(first, second)


@pytest.mark.parametrize("name", ["nadam", "adamax", "adagrad", "adafactor", "momentum"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint(name: str, tmp_path: Path) -> None:
    first, second = stepper(MAKERS[name]), stepper(MAKERS[name], seed=4)
    for _ in range(3):
        first[1].step(batches(), forward)
    with checkpoint.Saver(tmp_path, first[1]) as saver:
        saver.save()
    checkpoint.resume(second[1], tmp_path)
    assert same_after(first, second)


# what keeps more than moments and a step count, which cut parameters cannot save
KEEPS = {"nadam": "mu_product", "asgd": "eta, mu", "rprop": None, "adagrad": None, "adadelta": None}


@pytest.mark.parametrize("name", KEEPS)
def test_state_that_pieces_cannot_save_is_refused_before_a_step(name: str) -> None:
    """DeepSpeed cuts every parameter: of its like over a small one, the optimizer has taken a
    step."""
    optimizer = MAKERS[name]([nn.Parameter(torch.ones(3))])
    if KEEPS[name] is None:
        optimizer_refusals.refuse_optimizer(optimizer, sharded=True)
        return
    with pytest.raises(ValueError, match=f"keeps {KEEPS[name]} for every piece"):
        optimizer_refusals.refuse_optimizer(optimizer, sharded=True)
    optimizer_refusals.refuse_optimizer(optimizer, sharded=True, allowed=fsdp2.NUMBERS)
    optimizer_refusals.refuse_optimizer(optimizer, sharded=False)
    assert not optimizer.state, "it has taken none itself"
