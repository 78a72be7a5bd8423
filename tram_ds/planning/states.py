"""How many values a run keeps, from its recipe alone, and how large a checkpoint of them is."""

from __future__ import annotations

from typing import Any

import torch

from tram_ds.algorithms.bound import bind
from tram_ds.algorithms.references import names
from tram_ds.models.config import load_config
from tram_ds.planning import outline, sizes
from tram_ds.recipe.recipe import Recipe

FP32 = 4


def parameters(recipe: Recipe, task: Any) -> int:
    """Elements of the model's parameters that train, tied ones once. Reads its configuration, not
    its weights."""
    if recipe.model.lora is not None:
        return sizes.size(recipe).trained
    if recipe.model.path is None:
        with torch.device("meta"):
            model = task.model()
    else:
        # with its head, which may be weights of its own
        config = load_config(recipe.model)
        model = outline.on_meta(config, recipe.model, recipe.task.name, torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def references(recipe: Recipe) -> int:
    """Weights beside theta that the algorithm keeps from step to step: theta_{t-1}, theta_0,
    EMA."""
    return len(names(bind(recipe.algorithm)))


def moments(recipe: Recipe) -> int:
    """Values the optimizer keeps per parameter."""
    return int(recipe.optimizer.momentum > 0) if recipe.optimizer.name == "sgd" else 2


def checkpoint_bytes(recipe: Recipe, count: int) -> int:
    """One checkpoint: masters, moments and references in fp32."""
    return FP32 * count * (1 + moments(recipe) + references(recipe))
