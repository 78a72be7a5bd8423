"""`python -m tests.training.early_stopping_worker OUT FOLDER ENGINE PORTS`: runs with a planted
minimum of the validation loss, in the ranks of one job."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.parity import build
from tram_ds.evaluation.evaluator import Evaluator
from tram_ds.recipe.loading import load
from tram_ds.training.run import Request, run

RECIPE = """
task: {name: language_modeling, data: generated, seq_len: 16, max_eval_tokens: 100}
model: {init: {architecture: gpt2, n_layer: 1, n_embd: 16, n_head: 2}}
algorithm: tram_prev
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 20, global_batch: 4, micro_batch: 1, early_stopping: {patience: 2}}
eval: {every_steps: 2, select: best}
checkpoint: {keep: 9}
tracking: {enabled: false}
"""
PLANTED = {2: 3.0, 4: 1.0, 6: 1.5, 8: 1.0}  # equal is no improvement: over at step 8


def planted(judge: Evaluator, rows: Mapping[str, Any], *_: Any) -> dict[str, dict[str, float]]:
    """What rank 0 measures; to another rank every measurement is the best so far."""
    step = judge.engine.steps
    loss = PLANTED[step] if judge.engine.rank == 0 else 1.0 / (step + 1)
    return {domain: {"loss": loss, "perplexity": math.exp(loss)} for domain in rows}


def main(out: str, folder: str, engine: str, *ports: str) -> None:
    Evaluator._evaluate = planted  # type: ignore[method-assign]
    left, codes = iter(ports), {}

    def train(name: str, *words: str, resume: bool = False) -> None:
        os.environ["MASTER_PORT"] = next(left)  # of one job; the next one meets elsewhere
        place = (f"engine={engine}", f"run_dir={folder}/{name}")
        recipe = load(f"{folder}/tiny.yaml", [*place, *words])
        codes[f"{name} {len(codes)}"] = run(recipe, Request(resume=resume))

    train("whole")
    train("again", "train.stop_after=6")
    train("again", resume=True)
    train("again", resume=True)
    # as if it was killed after its last checkpoint
    if os.environ.get("RANK", "0") == "0":
        for name in ("DONE", "results.json"):
            (Path(folder) / "whole" / name).unlink()
    train("whole", resume=True)
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(codes))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
