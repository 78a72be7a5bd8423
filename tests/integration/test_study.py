"""One arm of the registered study E-XNLI (docs/evidence.md) in small: its folders, its recipe and
cell, on the real encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from tests.real import study
from tram_ds.jobs import sweep

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def test_an_arm_is_trained_and_scored_in_three_languages(tmp_path: Path) -> None:
    sample = Path(os.environ.get("TRAM_DS_DATA", "")) / "xnli_sample"
    if not sample.is_dir():
        pytest.skip("TRAM_DS_DATA does not point at a folder with xnli_sample")
    study.make(sample, tmp_path / "study", rows=24)
    cells = sweep.cells(sweep.read("frontier_e5"))
    (cell,) = [c for c in cells if c.recipe.algorithm.name == "tram_x" and c.recipe.train.seed == 0]
    small = ["train.steps=3", "schedule.warmup_steps=1", "tracking.enabled=false"]
    command = [*cell.command([sys.executable]), *small]
    done = subprocess.run(
        command, cwd=tmp_path, env=ranks.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / cell.run_dir
    results = json.loads((run_dir / "results.json").read_text())
    assert results["train_domains"] == ["en"]
    assert set(results["scores"]["test"]) == set(study.LANGUAGES)
    assert all(0.0 <= s["accuracy"] <= 1.0 for s in results["scores"]["test"].values())
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lengths = [r["perturbation_length"] for r in records if r.get("perturbation_length")]
    # rho 0.5 as the mean of the radius: a size, where the paper's rule has 1e-5 (docs/choosing.md)
    assert lengths and max(lengths) > 0.05
