"""Engine config files: found by name in configs/, and refused where they say what the recipe
says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tram_ds.engines.zero_harmful import harmful
from tram_ds.recipe.file import CONFIGS, RecipeError, find, read, read_json
from tram_ds.recipe.sections import EngineSection
from tram_ds.runtime.wording import hint, short

DEFAULTS = {"zero": "zero2.json", "fsdp2": "shard.yaml"}
FOLDERS = {"zero": CONFIGS / "deepspeed", "fsdp2": CONFIGS / "fsdp2"}
FSDP2_KEYS: dict[str, type | tuple[type, ...]] = {
    "reshard_after_forward": bool,
    "shard_size": (int, type(None)),
    "offload": bool,
    "reduce_every_micro_batch": bool,
}

OWNED = {  # key of a DeepSpeed config -> the recipe key that says it
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "activation_checkpointing": "model.activation_checkpointing",
}


def config_path(engine: EngineSection) -> Path | None:
    """The config file of an engine section; None for engines that have none (`auto` asks again once
    it has chosen)."""
    if engine.name not in DEFAULTS:
        return None
    default = DEFAULTS[engine.name]
    given, ends = engine.config or default, Path(default).suffix
    try:
        return find(given, FOLDERS[engine.name], "file", ends)
    except RecipeError as error:
        raise RecipeError(f"engine.config = {error}") from None


def engine_config(engine: EngineSection) -> dict[str, Any]:
    """The content of the engine's config file; {} for engines that have none. RecipeError for what
    it may not say."""
    path = config_path(engine)
    if path is None:
        return {}
    config = read_json(path) if engine.name == "zero" else read(path).data
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: expected an object with DeepSpeed's keys")
    (_check_deepspeed if engine.name == "zero" else _check_fsdp2)(path, config)
    return config


def _check_deepspeed(path: Path, config: dict[str, Any]) -> None:
    for key, owner in OWNED.items():
        if key in config:
            raise RecipeError(
                f"{path}: {key} = {short(config[key])} belongs to the recipe: set {owner} instead"
            )
    for dotted, value in _leaves(config):
        if value == "auto":
            raise RecipeError(
                f'{path}: {dotted} = "auto" is not a value: nothing here fills it in; remove the '
                "key"
            )
    section = config.get("zero_optimization", {})
    if isinstance(section, dict) and (wrong := harmful(section)):
        raise RecipeError(f"{path}: {wrong}")


def _check_fsdp2(path: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key not in FSDP2_KEYS:
            raise RecipeError(
                f"{path}: unknown key '{key}'{hint(key, FSDP2_KEYS)} (one of "
                f"{', '.join(FSDP2_KEYS)})"
            )
        # to Python a bool is an int, but no number of ranks
        fits = isinstance(value, FSDP2_KEYS[key]) and (
            FSDP2_KEYS[key] is bool or not isinstance(value, bool)
        )
        if not fits or (key == "shard_size" and value is not None and value < 1):
            kind = (
                "true or false" if FSDP2_KEYS[key] is bool else "null or a number of ranks from 1"
            )
            raise RecipeError(f"{path}: {key} = {short(value)}: expected {kind}")


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from _leaves(inner, f"{prefix}{key}.")
    if not isinstance(value, dict | list):
        yield prefix.rstrip("."), value
