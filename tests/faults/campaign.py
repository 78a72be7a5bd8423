"""Kills a real training run at random moments, again and again, and resumes it each time.

    python -m tests.faults.campaign --kills 200 [--seed 0] [--algorithm tram_prev]

Runs `tram_ds.training.run.run` (a checkpoint every step, every second run saving in the background)
in a process forked from one that has imported everything, and sends it SIGKILL after a random time:
while it starts, in any pass, inside a save. After each kill every commit in the folder must verify.
When a run is done its exported weights and its metrics are compared with those of one that was left
alone, and the next seed starts, until the kills are used up. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.test_train import RECIPE
from tram_ds.checkpoint.resume import candidates, verify
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.exits import CheckpointError
from tram_ds.training.run import Request, run

STEPS = 30


def recipe_at(folder: Path, algorithm: str, seed: int, asynchronous: bool) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    overrides = [
        f"algorithm={algorithm}",
        f"train.steps={STEPS}",
        f"train.seed={seed}",
        "checkpoint.every_steps=1",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
        "engine=replicated",
        "tracking.enabled=false",
        f"run_dir={folder}/run",
    ]
    return load(str(folder / "tiny.yaml"), overrides)


def child(recipe: Recipe, log: Path) -> int:
    """Forks a process that trains, resuming; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = run(recipe, Request(resume=True))
    finally:
        os._exit(code)


def torn(run_dir: Path) -> list[str]:
    """Names of commits that do not verify."""
    found = []
    for path in candidates(run_dir):
        try:
            verify(path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def killed_until_done(
    recipe: Recipe, folder: Path, dice: random.Random, kills: int, longest: float
) -> dict[str, Any]:
    """One run: killed up to `kills` times, then left to finish. longest: seconds after which a kill
    comes at the latest."""
    used, bad, phases = 0, [], {"before the first commit": 0, "later": 0}
    while True:
        pid = child(recipe, folder / "log")
        last = used >= kills
        deadline = time.monotonic() + (1e9 if last else dice.uniform(0.0, longest))
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.002)
        if done[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            used += 1
            phases["later" if candidates(folder / "run") else "before the first commit"] += 1
            bad += torn(folder / "run")
            continue
        code = os.waitstatus_to_exitcode(done[1])
        assert code == 0, (folder / "log").read_text()[-3000:]
        return {"kills": used, "torn": bad, "phases": phases}


def campaign(kills: int, seed: int, algorithm: str) -> dict[str, Any]:
    dice, total = (
        random.Random(seed),
        {"kills": 0, "runs": 0, "torn": 0, "different": 0, "before the first commit": 0},
    )
    with tempfile.TemporaryDirectory() as name:
        root, began = Path(name), time.monotonic()
        while total["kills"] < kills:
            number = total["runs"]
            plain = recipe_at(root / "plain", algorithm, number, False)
            started = time.monotonic()
            os.waitpid(child(plain, root / "plain" / "log"), 0)
            longest = 1.2 * (time.monotonic() - started)
            recipe = recipe_at(root / "killed", algorithm, number, number % 2 == 1)
            found = killed_until_done(
                recipe, root / "killed", dice, min(25, kills - total["kills"]), longest
            )
            total["kills"] += found["kills"]
            total["torn"] += len(found["torn"])
            total["before the first commit"] += found["phases"]["before the first commit"]
            total["different"] += int(
                outcome(root / "plain" / "run") != outcome(root / "killed" / "run")
            )
            total["runs"] += 1
            for folder in ("plain", "killed"):
                shutil.rmtree(root / folder)
        return {**total, "algorithm": algorithm, "seconds": round(time.monotonic() - began)}


def outcome(run_dir: Path) -> tuple[bytes, list[tuple[int, float]]]:
    """Exported weights, and (step, loss) of every step once."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return (run_dir / "export" / "model.safetensors").read_bytes(), [
        (r["step"], r["loss"]) for r in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithm", default="tram_prev")
    options = parser.parse_args()
    found = campaign(options.kills, options.seed, options.algorithm)
    print(json.dumps(found))
    return int(bool(found["torn"] or found["different"]))


if __name__ == "__main__":
    sys.exit(main())
