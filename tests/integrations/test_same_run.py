"""What a resumed run has in common with the one that saved, line by line."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from tests.wrap.hand import mlp
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations.same_run import about, differences, made


def told(
    algorithm: Any = "sam", seed: int = 0, clip: float | None = None, **adamw: Any
) -> dict[str, Any]:
    """about() of a run, as it comes back from its file."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    stepper = wrap(model, optimizer, algorithm, seed=seed, clip_norm=clip)
    return json.loads(json.dumps(about(stepper, made(optimizer))))


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ({}, {"fused": True}, []),  # the same step
        ({}, {"lr": 0.1}, ["optimizer.lr: 0.001 -> 0.1"]),
        ({}, {"betas": (0.8, 0.999)}, ["optimizer.betas: [0.9, 0.999] -> [0.8, 0.999]"]),
        ({"clip": 1.0}, {}, ["clip_norm: 1.0 -> None"]),
        ({"seed": 3}, {}, ["seed: 3 -> 0"]),
        ({}, {"algorithm": "asam"}, ["algorithm.name: 'sam' -> 'asam'"]),
        ({}, {"algorithm": {"name": "sam", "rho": 0.2}}, ["algorithm.rho: None -> 0.2"]),
        (
            {"algorithm": "tram_prev"},
            {"algorithm": {"name": "tram_prev", "lookahead": False}},  # the same numbers
            [],
        ),
        (
            {"algorithm": "tram_prev"},
            {"algorithm": {"name": "tram_prev", "temperature": 2.0, "positions": "labelled"}},
            ["algorithm.positions: 'all' -> 'labelled'", "algorithm.temperature: 1.0 -> 2.0"],
        ),
    ],
)
def test_what_changes_the_step_is_a_line(
    then: dict[str, Any], now: dict[str, Any], lines: list[str]
) -> None:
    assert differences(told(**then), told(**now)) == lines


def test_what_a_version_did_not_write_is_what_it_did() -> None:
    now = told({"name": "asam", "rho": 0.2}, clip=1.0)
    assert differences({"algorithm": "asam", "seed": 0}, now) == []
    assert differences({"algorithm": "sam", "seed": 1}, now) == [
        "algorithm.name: 'sam' -> 'asam'",
        "seed: 1 -> 0",
    ]
    then = copy.deepcopy(now)
    del then["options"]["perturb_every"]  # before there was one, every step climbed
    del then["optimizer"]["groups"][0]["amsgrad"]  # an older torch
    assert differences(then, now) == []
    del then["options"]["rho"]
    assert differences(then, now) == ["algorithm.rho: None -> 0.2"]


def test_the_rate_is_the_one_that_a_scheduler_multiplies() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    before = made(optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert made(optimizer) == before and before["groups"][0]["lr"] == 0.5


def test_another_optimizer_is_one_line() -> None:
    then, now = told(), told()
    now["optimizer"] = made(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    assert differences(then, now) == ["optimizer: AdamW -> SGD"]
    first, *rest = mlp().parameters()
    then = told()
    then["optimizer"] = made(torch.optim.AdamW([{"params": [first]}, {"params": rest}]))
    assert differences(then, told()) == ["optimizer groups: 2 -> 1"]


def test_a_module_that_noise_is_added_at_has_its_name() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    stepper = wrap(model, optimizer, {"name": "tram_x", "noise_site": model[0]})
    assert about(stepper, made(optimizer))["options"]["noise_site"] == "0"
