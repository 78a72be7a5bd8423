"""Run folders written by hand, in the format of launch/train.py, with scores that are known."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tram_ds.evaluation import row_scores
from tram_ds.evaluation.row_scores import RowScores

S2ORC = [
    "math_l1",
    "Art",
    "astro-ph_l1",
    "cond-mat_l1",
    "cs_l1",
    "econ_l1",
    "nlin_l1",
    "Philosophy",
    "physics_l1",
    "q-bio_l1",
    "stat_l1",
]


def recipe(
    algorithm: str | Mapping[str, Any], seed: int, task: str = "language_modeling", **task_keys: Any
) -> dict[str, Any]:
    section = {"name": algorithm} if isinstance(algorithm, str) else dict(algorithm)
    return {
        "name": "made",
        "task": {"name": task, "data": "machelreid/m2d2", **task_keys},
        "model": {"path": "openai-community/gpt2", "init": None},
        "algorithm": section,
        "optimizer": {"name": "adam", "lr": 2e-5},
        "engine": {"name": "replicated", "config": None},
        "train": {"steps": 8, "global_batch": 4, "micro_batch": 2, "seed": seed},
        "tracking": {"experiment": "made"},
        "run_dir": "runs/{recipe}-{algorithm}-{seed}",
    }


def write(
    folder: Path,
    made: Mapping[str, Any],
    scores: Mapping[str, float],
    metric: str = "perplexity",
    initial: Mapping[str, float] | None = None,
    train: str | None = None,
    loss: float = 2.0,
    seconds: float = 0.5,
    order: float | None = None,
    device: str = "cpu",
) -> Path:
    """A finished run. scores: domain -> value of `metric` (accuracies as fractions), the training
    domain first."""
    train = train or next(iter(scores))
    run_dir = folder / f"{made['name']}-{made['algorithm']['name']}-{made['train']['seed']}"
    while run_dir.exists():
        run_dir = run_dir.with_name(run_dir.name + "x")
    run_dir.mkdir(parents=True)

    def split(values: Mapping[str, float]) -> dict[str, Any]:
        return {"test": {domain: {"loss": 1.0, metric: value} for domain, value in values.items()}}

    others = [value for domain, value in scores.items() if domain != train]
    results = {
        "train_domains": [train],
        "selected": {"step": made["train"]["steps"]},
        "scores": split(scores),
        "zero_shot_average": {"test": {metric: sum(others) / len(others) if others else None}},
        "initial": split(initial) if initial else None,
    }
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(dict(made), sort_keys=False))
    (run_dir / "results.json").write_text(json.dumps(results, indent=2))
    steps = range(1, made["train"]["steps"] + 1)
    rows = [
        {
            "step": s,
            "time": 0.0,
            "loss": loss + 1.0 / s,
            "seconds": seconds,
            "tokens": 64,
            "skipped": 0,
        }
        for s in steps
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = {"world_size": "2", "launcher": "torchrun", "engine": "fsdp2"}
    tags |= {"device": device, "train_rows": "16"}
    (run_dir / "tracking.json").write_text(json.dumps({"tags": tags}))
    if order is not None:
        os.utime(run_dir / "results.json", (order, order))
    return run_dir


def keep_rows(run_dir: Path, rng: np.random.Generator, rows: int = 40, digest: str = "") -> None:
    """rows.npz of a made run: rows that differ by a tenth and make its scores. digest: of the rows
    of each domain, beside the domain's name."""
    found: dict[str, RowScores] = {}
    scores = json.loads((run_dir / "results.json").read_text())["scores"]["test"]
    for domain, score in scores.items():
        if "accuracy" in score:
            value = (np.arange(rows) < round(score["accuracy"] * rows)).astype(np.int32)
            weight = np.ones(rows, np.int32)
        else:
            noise = rng.normal(0, 0.1, rows)
            weight = np.full(rows, 8, np.int32)
            value = (np.log(score["perplexity"]) + noise - noise.mean()).astype(np.float32) * 8
        found[domain] = RowScores(value, weight, domain + digest)
    (run_dir / "rows.npz").write_bytes(row_scores.packed({"test": found}))
