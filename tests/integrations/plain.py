"""The model, rows and schedule of the page's scripts, for the plain loop that they are compared
with."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

STEPS = 6  # 22 rows, 11 micro-batches of 2, 5 windows of 2 and one of 1


def made(**config: Any) -> tuple[GPT2LMHeadModel, list[dict[str, torch.Tensor]]]:
    """Without the cache, which Trainer turns off too."""
    torch.manual_seed(0)
    small = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**{**small, "use_cache": False, **config}))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (22, 8))]
    return model, rows


def factor(step: int, steps: int = STEPS) -> float:
    """Linear with 2 steps of warm-up, as transformers has it."""
    return step / 2 if step < 2 else (steps - step) / (steps - 2)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def ran(script: Path, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a script of the page left behind."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    return runpy.run_path(str(script))
