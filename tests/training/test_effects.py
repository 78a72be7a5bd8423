"""When a run looks at what its steps do, and what it makes of that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import ROOT, environment
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.effect import Effect
from tram_ds.recipe.loading import load
from tram_ds.training.effects import due, effect_of, record_of, resolved, warning


def test_early_steps_and_every_k_th_are_looked_at() -> None:
    row = algorithm("asam")

    def steps(every: int | None, log_every: int = 1, row: Any = row) -> list[int]:
        return [step for step in range(1, 2001) if due(step, every, log_every, row)]

    assert steps(500) == [3, 30, 100, 500, 1000, 1500, 2000]
    assert steps(None) == steps(1, row=algorithm("base")) == []
    assert steps(1000, row=algorithm("trpo")) == [3, 30, 100, 1000, 2000]
    # a step that is not logged has no line to stand in: the next that is
    assert steps(750, 20) == [20, 40, 100, 760, 1500]


def a_record(step: int, *, change: float | None = None, masks: float = 0.0, **other: Any) -> dict:
    record = {"step": step, "loss": 2.0, "sharpness_gap": 0.1, "distance": 0.0, "radius": 0.1}
    if change is not None:
        record |= record_of(Effect(step, 2.0, 0.1, 0.0, 0.1, 0.1, change, 0.9, masks))
    return record | other


def test_a_record_says_what_was_measured() -> None:
    found = effect_of(a_record(3, change=0.5, masks=0.7))
    assert found == Effect(3, 2.0, 0.1, 0.0, 0.1, 0.1, 0.5, 0.9, 0.7)
    assert effect_of(a_record(3)) is None


def said(*records: dict, name: str = "tram_x", last: int = 100) -> str | None:
    return warning(algorithm(name), records, last)


def test_a_run_that_does_nothing_is_told_what_to_raise() -> None:
    text = said(a_record(3, change=1e-5, masks=1.2), a_record(30, change=1.1e-3, masks=1.2))
    assert text is not None and "at most 0.0011 of its length, below 0.001 of the 1.2" in text
    assert "raise algorithm.radius_scale or algorithm.sigma" in text
    # without dropout the gradient's own length is the scale
    assert said(a_record(3, change=0.9e-3)) is not None
    assert said(a_record(3, change=1.1e-3)) is None


def test_one_step_that_acts_is_enough_and_nothing_measured_says_nothing() -> None:
    assert said(a_record(3, change=1e-5), a_record(30, change=0.1)) is None
    assert said(a_record(1), a_record(2)) is None
    assert said() is None


def test_a_run_that_climbs_too_far_is_told_what_to_lower() -> None:
    """The gap is above half of the loss in the mean over the steps, not in one of them."""
    text = said(a_record(1, sharpness_gap=1.0), a_record(2, sharpness_gap=1.2), name="asam")
    assert text is not None and "raised the loss by 1.1" in text and "lower algorithm.rho" in text
    assert said(a_record(1, sharpness_gap=0.7), a_record(2, sharpness_gap=1.2)) is None


def test_skipped_steps_and_later_ones_do_not_count() -> None:
    assert said(a_record(1), a_record(2, sharpness_gap=100.0, skipped=1)) is None
    assert said(a_record(1), a_record(101, sharpness_gap=100.0)) is None
    assert said(a_record(3, change=1e-5), a_record(101, change=1.0)) is not None


def test_a_calibrated_scale_is_known_once_a_distance_was_seen() -> None:
    """rho over the mean of the first two: .3 / ((.1 + .5) / 2) = 1, whatever came later."""
    row = algorithm("tram_prev", radius_scale="auto", rho=0.3, calibration_steps=2)
    region: Any = row.radius
    assert resolved(row) == {} == resolved(algorithm("tram_prev")) == resolved(algorithm("asam"))
    region.seen, found = torch.zeros(2, dtype=torch.float64), []
    for d in (0.0, 0.1, 0.5, 7.0):
        region.seen = region.rule.after(torch.tensor(d, dtype=torch.float64), region.seen)
        found.append(resolved(row).get("algorithm.radius_scale"))
    assert found[0] is None and found[1:] == pytest.approx([3.0, 1.0, 1.0])


RECIPE = """
task: {name: language_modeling, data: generated, seq_len: 16, max_eval_tokens: 64, cache_dir: cache}
model: {init: {architecture: llama, num_hidden_layers: 1, hidden_size: 16, intermediate_size: 16,
  num_attention_heads: 2, num_key_value_heads: 2}}
algorithm: tram_prev
optimizer: {name: adam, lr: 1e-6}
train: {steps: 4, global_batch: 4, micro_batch: 2}
tracking: {enabled: false}
run_dir: run
"""


@pytest.mark.integration
def test_a_run_says_it_at_the_start_at_the_end_and_in_its_files(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    words = [sys.executable, str(ROOT / "launch" / "train.py"), "--recipe", "tiny.yaml"]
    # as a user sees it, warnings included
    shown = {k: v for k, v in environment().items() if k != "PYTHONWARNINGS"}

    def run(*more: str) -> tuple[str, list[dict], dict]:
        done = subprocess.run(
            [*words, *more], cwd=tmp_path, env=shown, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / (more[0].partition("=")[2] if more else "run")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return done.stdout + done.stderr, records, json.loads((folder / "results.json").read_text())

    text, records, results = run()
    assert "the model has no active dropout" in text and "step 3: |epsilon|" in text
    (warned,) = results["warnings"]
    assert "over the first 4 steps tram_prev changed the gradient by at most" in warned
    assert text.count(f"warning: {warned}") == 2  # when it was known, and under the results
    assert results["resolved"] == {}
    assert [("effect" in r) for r in records if "loss" in r] == [False, False, True, False]
    assert records[2]["effect_masks"] == 0.0 and 0.0 <= records[2]["effect"] < 1e-3
    sized = "algorithm={name: tram_x, radius_scale: auto, rho: 0.05}"
    text, records, results = run("run_dir=other", "train.effect_every=null", sized)
    assert results["warnings"] == [] and "warning:" not in text
    assert not any("effect" in r for r in records)
    # the scale that auto found, in the recipe as a comment: a run by that file finds it again
    last, scale = records[-1], results["resolved"]["algorithm.radius_scale"]
    assert scale == pytest.approx(last["radius"] / last["distance"])
    resolved = tmp_path / "other" / "recipe.yaml"
    assert resolved.read_text().endswith(f"# algorithm.radius_scale: found to be {scale!r}\n")
    assert load(str(resolved)).algorithm.radius_scale == "auto"
