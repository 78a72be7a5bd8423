"""How large a run's states are, in bytes, from its recipe alone: a plain count that
tram_ds.planning may replace."""

from __future__ import annotations

from typing import Any

import torch

from tram_ds import planning
from tram_ds.algorithms.table import algorithm
from tram_ds.engines import choose as engines
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.ranks import Job

FP32 = 4


def parameters(recipe: Recipe, task: Any) -> int:
    """Elements of the model's parameters, tied ones once. Reads its configuration, not its
    weights."""
    if recipe.model.path is None:
        with torch.device("meta"):
            model = task.model()
    else:
        from transformers import AutoModel

        from tram_ds.models.pretrained import load_config

        with torch.device("meta"):
            model = AutoModel.from_config(load_config(recipe.model))
    return sum(parameter.numel() for parameter in model.parameters())


def references(recipe: Recipe) -> int:
    """Weights beside theta that the algorithm keeps from step to step: theta_{t-1}, theta_0,
    EMA."""
    section = recipe.algorithm
    # where noise goes changes no count, and a recipe may leave it to the task
    row = algorithm(section.name, **{**section.options(), "noise_site": "embedding"})
    return sum(len(region.reference.names()) for region in row.regions)


def moments(recipe: Recipe) -> int:
    """Values the optimizer keeps per parameter."""
    return int(recipe.optimizer.momentum > 0) if recipe.optimizer.name == "sgd" else 2


def checkpoint_bytes(recipe: Recipe, count: int) -> int:
    """One checkpoint: masters, moments and references in fp32."""
    return FP32 * count * (1 + moments(recipe) + references(recipe))


def rank_bytes(recipe: Recipe, count: int, job: Job) -> int:
    """Weights, gradients, moments, references and the copy of theta during the ascent, on one rank
    of `job`.

    `tram_ds.planning.rank_bytes(recipe, world)` is asked instead where it exists.
    """
    world = job.world_size
    if (planned := getattr(planning, "rank_bytes", None)) is not None:
        return int(planned(recipe, world))
    name = engines.choose(recipe.engine.name, job)
    config = engine_config(recipe.engine.model_copy(update={"name": name}))
    zero = config.get("zero_optimization", {})
    stage = {"replicated": 0, "fsdp2": 3}.get(name, int(zero.get("stage", 0)))
    # optimizer states, gradients, working copy
    split = [world if stage >= least else 1 for least in (1, 2, 3)]
    working = 2 if recipe.model.dtype == "bfloat16" else FP32
    kept = FP32 * (1 + moments(recipe) + references(recipe) + 1)
    if zero.get("offload_optimizer") or config.get("offload"):
        kept = 0
    return int(count * (kept / split[0] + working / split[1] + working / split[2]))
