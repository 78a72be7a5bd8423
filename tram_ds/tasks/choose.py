"""Tasks are found by name: `task: language_modeling` is tram_ds.tasks.language_modeling.build,
imported when asked for."""

from __future__ import annotations

import importlib
from typing import Any


def build(recipe: Any, training: bool = True) -> Any:
    """The recipe's task. Its data and its model's config are checked here (ValueError), before any
    weight is read. training: False reads what is scored alone."""
    return importlib.import_module(f"tram_ds.tasks.{recipe.task.name}").build(recipe, training)
