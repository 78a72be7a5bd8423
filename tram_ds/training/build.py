"""From a recipe to the engine that trains it."""

from __future__ import annotations

import os
from typing import Any

import torch

from tram_ds.engines import choose as engines
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.ranks import Job
from tram_ds.training.optimizer import make, schedule


def threads_per_rank(job: Job) -> int:
    """Cores of this node shared by its ranks; OMP_NUM_THREADS wins where it is set."""
    ranks = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or job.world_size
    )
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // ranks))


def build_engine(
    recipe: Recipe, name: str, model: Any, job: Job, micros: int, total_steps: int
) -> Any:
    """The recipe's engine around `model`. Collective."""
    settings = engines.Settings(
        job=job,
        optimizer=lambda module: make(recipe.optimizer, module),
        config=engine_config(recipe.engine.model_copy(update={"name": name})),
        dtype=getattr(torch, recipe.model.dtype),
        micro_batch=recipe.train.micro_batch,
        accumulation=micros,
        clip_norm=recipe.train.clip_norm,
        schedule=schedule(recipe.schedule, recipe.optimizer.lr, total_steps),
    )
    return engines.build(name, model, settings)
