"""Every shipped recipe runs: --smoke, the same code path made tiny, on 2 ranks as both launchers
start them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import ranks
from tests.integration.test_train import TRAIN, launched
from tests.zygote import RANK_HERE, ROOT
from tram_ds.recipe.loading import load

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("launcher", ("deepspeed", "torchrun"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_smoke(recipe: str, launcher: str, tmp_path: Path) -> None:
    words = ["--recipe", recipe, "--smoke"]
    if recipe == "quickstart":  # by the launcher itself, with a database of its own
        done = launched(tmp_path, launcher, *words)
    else:  # the deepspeed launcher's mark is --local_rank
        ranks.store(tmp_path)
        words += [f"--local_rank={RANK_HERE}"] if launcher == "deepspeed" else []
        done = ranks.script(TRAIN, *words, cwd=tmp_path, world=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run_dir = tmp_path / load(recipe, smoke=True).resolved_run_dir()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
    assert all(r["skipped"] == 0 for r in rows if "loss" in r)
    assert (run_dir / "DONE").exists() and (run_dir / "results.json").exists()
