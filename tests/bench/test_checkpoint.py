"""Seconds and bytes of a checkpoint, and what a background save costs the steps it runs beside.
Prints; asserts bytes only."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.checkpoint.resume import Saver

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

WIDTH, LAYERS, STEPS = 1024, 8, 6


def build() -> Stepper:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    return wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-4), "tram_prev")


def forward(m: nn.Module, x: torch.Tensor) -> Any:
    y = m(x)
    return y.square().sum(), len(x), y


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def test_save_load_and_background_save(tmp_path: Path) -> None:
    built, x = build(), torch.randn(256, WIDTH)
    step = lambda: built.step([x], forward)  # noqa: E731
    step()
    with Saver(tmp_path / "run", built) as saver:
        alone = min(seconds(step) for _ in range(STEPS))
        save = seconds(saver.save)
        step()
        blocked = seconds(lambda: saver.save(asynchronous=True))
        beside = seconds(step)
        waited = seconds(saver.wait)
    path = checkpoint.latest(tmp_path / "run")
    assert path is not None
    other = build()
    load = seconds(lambda: checkpoint.load(other, path))
    assert other.engine.params().equal(built.engine.params()) is False, (
        "one step lies between the save and now"
    )

    # theta, two moments, theta_{t-1}, fp32
    tensors = sum(p.numel() for p in built.engine.module.parameters()) * 4 * 4
    written = sum(file.stat().st_size for file in path.iterdir())
    megabytes = tensors / 2**20
    print(
        f"\n{megabytes:.0f} MiB: save {save:.2f} s ({megabytes / save:.0f} MiB/s with sync and "
        f"sha256), load {load:.2f} s "
        f"({megabytes / load:.0f} MiB/s with sha256); background save: blocks for {blocked:.3f} "
        "s, the step beside it takes "
        f"{beside:.2f} s instead of {alone:.2f} s, done {waited:.2f} s later"
    )
    assert tensors <= written <= tensors + 2**18
