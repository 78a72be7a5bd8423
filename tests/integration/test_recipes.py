"""Every shipped recipe runs: --smoke, the same code path made tiny, on 2 ranks under both
launchers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_train import LAUNCHERS, TRAIN
from tests.ranks import ROOT, environment
from tram_ds.recipe.recipe import load

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("launcher", ("deepspeed", "torchrun"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_smoke(recipe: str, launcher: str, tmp_path: Path) -> None:
    command = [*LAUNCHERS[launcher], TRAIN, "--recipe", recipe, "--smoke"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run_dir = tmp_path / load(recipe, smoke=True).resolved_run_dir()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
    assert all(r["skipped"] == 0 for r in rows if "loss" in r)
    assert (run_dir / "DONE").exists() and (run_dir / "results.json").exists()
