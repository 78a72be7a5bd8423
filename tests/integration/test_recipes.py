"""Every shipped recipe runs: --smoke, the same code path made tiny, on 2 ranks. Forks of one
process stand for a launcher's ranks, with its mark; each launcher itself starts one recipe."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import ranks
from tests.integration.test_train import TRAIN, launched
from tests.zygote import RANK_HERE, ROOT
from tram_ds.recipe.loading import load

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
ENGINES = {recipe: load(recipe, smoke=True).engine.name for recipe in RECIPES}
# The mark decides nothing but where the engine is left to it; the small ones try both anyway.
BOTH = {recipe for recipe, engine in ENGINES.items() if engine in ("auto", "replicated")}
OF_LAUNCHER = {"deepspeed": ("zero",), "torchrun": ("fsdp2",)}


@pytest.mark.parametrize(
    ("recipe", "launcher"),
    [
        (recipe, launcher)
        for recipe in RECIPES
        for launcher, engines in OF_LAUNCHER.items()
        if ENGINES[recipe] in engines or recipe in BOTH
    ],
)
def test_smoke(recipe: str, launcher: str, tmp_path: Path) -> None:
    ranks.store(tmp_path)
    mark = [f"--local_rank={RANK_HERE}"] if launcher == "deepspeed" else []
    words = ["--recipe", recipe, "--smoke", *mark]
    shown(recipe, tmp_path, ranks.script(TRAIN, *words, cwd=tmp_path, world=2))


@pytest.mark.parametrize(
    ("mark", "engine"),
    [
        ([f"--local_rank={RANK_HERE}"], "engine=fsdp2"),
        ([], "engine={name: zero, config: zero3.json}"),
    ],
    ids=("fsdp2-deepspeed", "zero3-torchrun"),
)
def test_an_engine_under_the_other_launcher(mark: list[str], engine: str, tmp_path: Path) -> None:
    ranks.store(tmp_path)
    words = ["--recipe", "xnli_e5", "--smoke", *mark, engine]
    shown("xnli_e5", tmp_path, ranks.script(TRAIN, *words, cwd=tmp_path, world=2))


@pytest.mark.parametrize("launcher", OF_LAUNCHER)
def test_smoke_by_the_launcher_itself(launcher: str, tmp_path: Path) -> None:
    """The one whose engine follows from the launcher."""
    ranks.store(tmp_path)
    recipe = "cifar100_vit"
    assert ENGINES[recipe] == "auto"
    shown(recipe, tmp_path, launched(tmp_path, launcher, "--recipe", recipe, "--smoke"))


def shown(recipe: str, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run_dir = folder / load(recipe, smoke=True).resolved_run_dir()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
    assert all(r["skipped"] == 0 for r in rows if "loss" in r)
    assert (run_dir / "DONE").exists() and (run_dir / "results.json").exists()
