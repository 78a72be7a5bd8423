"""What a model card says beyond the recipe and the scores: where base and data come from, under
which licence, and what trained. Kept in results.json, so that a card can be written later too."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.git import git_commit
from tram_ds.tracking.dataset import MADE_HERE

PACKAGES = ("tram_ds", "torch", "transformers", "peft", "deepspeed")
LICENCE = ("license", "license_name", "license_link")  # the hub's keys, and a config's


def facts(recipe: Recipe, task: Any, engine: Any) -> dict[str, Any]:
    """Plain data. Asks no network. Called on rank 0."""
    path, data = recipe.model.path, recipe.task.data
    config = getattr(engine.module, "config", None)
    return {
        "base_model": path if on_hub(path) else None,
        "base_license": licence(path, recipe.model.revision) if path else {},
        "datasets": [data] if on_hub(data) and data not in MADE_HERE else [],
        "data_digest": task.data_digest(),
        "contents": task.contents(),
        "num_labels": getattr(config, "num_labels", None) if task.classification else None,
        "world_size": engine.world_size,
        "device": engine.device.type,
        "commit": git_commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def on_hub(path: str | None) -> bool:
    """Whether a name of the recipe is one of the hub's: there is nothing of that name here."""
    return path is not None and not Path(path).exists()


def licence(path: str, revision: str | None) -> dict[str, str]:
    """What the model's own card, else its config, names, under the hub's keys; {} where neither
    names one, or neither is here: of a hub's model only the local cache is looked at."""
    return _named(_card(path, revision)) or _named(_config(path, revision))


def _named(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not isinstance(found.get(LICENCE[0]), str):
        return {}
    return {key: found[key] for key in LICENCE if isinstance(found.get(key), str)}


def _card(path: str, revision: str | None) -> Any:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    file = _file(path, revision, "README.md")
    try:
        return None if file is None else metadata_load(file)
    except (OSError, ValueError, YAMLError):
        return None  # somebody's text, which need not be a card


def _config(path: str, revision: str | None) -> Any:
    file = _file(path, revision, "config.json")
    try:
        return None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _file(path: str, revision: str | None, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if not on_hub(path):
        return Path(path) / name if (Path(path) / name).is_file() else None
    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except ValueError:
        return None  # no name of the hub's
    return Path(found) if isinstance(found, str) else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
