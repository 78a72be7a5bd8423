"""Early stopping: what is an improvement, when a run ends, and that it ends there on all ranks and
after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from tests.training import early_stopping_worker as worker
from tram_ds.recipe.sections import EarlyStoppingSection
from tram_ds.training.early_stopping import EarlyStopping


def counting(patience: int = 2, min_delta: float = 0.0) -> EarlyStopping:
    section = EarlyStoppingSection(patience=patience, min_delta=min_delta)
    return EarlyStopping(section, "validation_loss")


@pytest.mark.parametrize(
    ("min_delta", "values", "since"),
    [
        (0.0, [3.0, 2.0, 2.5, 1.0], [0, 0, 1, 0]),
        (0.0, [1.0, 1.0, 1.0], [0, 1, 2]),  # as good is not better
        (0.5, [3.0, 2.5, 2.4, 1.9], [0, 1, 0, 1]),  # 3 - 0.5 is not below 2.5; 2.4 - 0.5 not 1.9
        (0.0, [math.nan, 2.0, math.inf, -math.inf], [1, 0, 1, 2]),
    ],
)
def test_an_improvement_is_better_than_the_best_by_more_than_min_delta(
    min_delta: float, values: list[float], since: list[int]
) -> None:
    stopping, found = counting(2, min_delta), []
    for step, value in enumerate(values, start=1):
        may = stopping.running_out
        stopping.note(step, value)
        found.append(stopping.since)
        assert stopping.over == (stopping.since >= 2) and (may or not stopping.over)
    assert found == since


def test_a_run_goes_on_from_the_counts_of_its_key_alone() -> None:
    stopping, other = counting(), counting()
    for step, value in ((2, 0.1), (4, 0.3)):
        stopping.note(step, value)
    other.load(json.loads(json.dumps(stopping.state())))
    assert other == stopping and other.since == 1
    fresh = EarlyStopping(other.section, "validation/Art/loss")
    fresh.load(stopping.state())
    fresh.load({})  # of a version that kept none
    assert fresh.best is None and not fresh.running_out
    off = EarlyStopping(None, "validation_loss")
    off.note(2, math.nan)
    assert not off.over and off.state() == {}


def test_why_a_run_ended_is_told_of_one_that_ended_early() -> None:
    stopping = counting()
    for step, value in ((2, 0.5), (4, 0.75), (6, 0.5)):
        stopping.note(step, value)
    why = "validation_loss did not improve on the 0.5 of step 2 in 2 measurements"
    assert stopping.told(6, 20) == {"step": 6, "of": 20, "why": why}
    assert stopping.told(20, 20) is None


def lines(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


TIMES = ("time", "seconds", "tokens_per_second")


@pytest.mark.parametrize(("world", "engine"), [(1, "replicated"), (2, "fsdp2")])
def test_a_planted_minimum_ends_the_run_and_is_selected(
    tmp_path: Path, world: int, engine: str
) -> None:
    """By what rank 0 measures. Stopped with one of two measurements used up and resumed it is the
    same run; a later one finds nothing to do; and one that was killed before its end only ends."""
    (tmp_path / "tiny.yaml").write_text(worker.RECIPE)
    module, ports = worker.__name__, [str(ranks.free_port()) for _ in range(5)]
    codes = ranks.run(module, str(tmp_path), engine, *ports, world=world)
    assert list(codes.values()) == [0, 75, 0, 0, 0]
    whole, again = tmp_path / "whole", tmp_path / "again"
    for run in (whole, again):
        results = json.loads((run / "results.json").read_text())
        why = "validation_loss did not improve on the 1 of step 4 in 2 measurements"
        assert results["stopped_early"] == {"step": 8, "of": 20, "why": why}
        assert results["selected"] == {"step": 4, "validation_loss": 1.0}
        assert (run / "DONE").exists() and not (run / "REQUEUE").exists()
    assert lines(whole) == lines(again)
    assert [row["step"] for row in lines(whole) if "loss" in row] == list(range(1, 9))
    best, again_best = (load_file(run / "export/model.safetensors") for run in (whole, again))
    assert all(torch.equal(best[name], again_best[name]) for name in best)
    step = json.loads((again / "checkpoints/step-00000006/manifest.json").read_text())
    assert step["early_stopping"]["since"] == 1
