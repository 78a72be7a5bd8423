"""A recipe from its file: YAML <- dotted overrides -> a checked `Recipe`; or the same run, tiny."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tram_ds.models.architecture import family, tiny
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.errors import explain
from tram_ds.recipe.file import RecipeError, Source
from tram_ds.recipe.recipe import Recipe, to_dict
from tram_ds.recipe.task_section import ROWS, TaskSection

# what fits the tiny run alone: its size, length, and what goes by its data's domains
OWN_OF_SMOKE = ("model", "train.epochs", "train.early_stopping", "eval.key", "eval.generate")


def load(name_or_path: str, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Reads a recipe (a bare name stands for recipes/NAME.yaml), applies `section.key=value`
    overrides, checks it all.

    With `smoke` the run is made tiny (see `smoke`); overrides of keys other than OWN_OF_SMOKE still
    hold, and those of `task` if they include task.data. Raises RecipeError, one line per problem.
    """
    path = recipe_file.find(name_or_path)
    source = recipe_file.read(path, _label(path))
    recipe_file.override(source, overrides)
    source.data.setdefault("name", path.stem)
    if smoke and isinstance(source.data.get("train"), dict):
        # replaced below: no rule about the length may refuse
        source.data["train"] |= {"steps": 10**9, "epochs": None}
    recipe = _checked(source)
    if smoke:
        source.data = to_dict(_smoke(recipe))
        own_data = any(text.partition("=")[0] in ("task", "task.data") for text in overrides)
        dropped = (*OWN_OF_SMOKE, *([] if own_data else ["task"]))
        keys = [text.partition("=")[0].strip() for text in overrides]
        kept = [
            o
            for o, k in zip(overrides, keys, strict=True)
            if not any(k == name or k.startswith(f"{name}.") for name in dropped)
        ]
        # once more, because smoke() wrote over them
        recipe_file.override(source, kept)
        # epochs were asked for
        source.data["train"]["steps"] = source.data["train"].get("steps") or 3
        recipe = _checked(source)
    return recipe


def smoke(recipe: Recipe) -> Recipe:
    """The same run made tiny: same engine, algorithm, optimizer and curve; two-layer random model,
    3 steps.

    The model is of the same architecture, the data is on every machine, and the global batch fits
    the number of ranks the launcher announces (plain Python: 1, 2, 4 or 8).
    """
    data = to_dict(recipe)
    init = recipe.model.init or {"architecture": family(recipe.model.path, recipe.task.name)}
    # else 4: a batch of 8 divides by 1, 2, 4 and 8 ranks
    ranks = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 4)
    data["task"] |= _tiny_task(data["task"])
    data["model"] |= {"path": None, "init": tiny(init["architecture"]), "revision": None}
    data["train"] |= {"steps": 3, "epochs": None, "global_batch": 2 * ranks, "micro_batch": 1}
    data["train"]["early_stopping"] = None
    data["schedule"]["warmup_steps"] = min(recipe.schedule.warmup_steps, 1)
    if recipe.algorithm.penalty_start:
        data["algorithm"]["penalty_start"] = 1
    for section in ("eval", "checkpoint"):
        data[section]["every_steps"] = 2 if data[section]["every_steps"] else None
    data["eval"] |= {"batch": None, "key": "validation_loss"}  # the domains are others
    if recipe.eval.generate is not None:
        data["eval"]["generate"] |= {"prompts": ["The"], "max_tokens": 4}
    data["tracking"] |= {"experiment": "smoke", "uri": None}
    data["run_dir"] = "runs/smoke-{recipe}-{algorithm}-{seed}"
    return _checked(Source(f"--smoke of {recipe.name}", data))


_smoke = smoke  # `load` has an argument of that name


def _tiny_task(full: dict[str, Any]) -> dict[str, Any]:
    """Of a section `task`, what is another for data that is on every machine."""
    language = full["name"] == "language_modeling"
    task: dict[str, Any] = {
        "data": "installed_docs" if language else "generated",
        "revision": None,
        "train": None,
        "exclude": [],
        "eval": None,
    }
    if language:
        task |= {
            "seq_len": 32,
            "tokenizer": None,
            "max_train_tokens": 20_000,
            "max_eval_tokens": 2_000,
            "streaming": None,
            **{key: TaskSection.model_fields[key].default for key in ROWS},
        }
    elif full["name"] == "instruction":
        task |= {"seq_len": 64, "tokenizer": None, "chat_template": None}
        task |= {key: TaskSection.model_fields[key].default for key in ROWS if key != "column"}
    elif "seq_len" in full:
        task |= {"seq_len": 32, "tokenizer": None}
    return task


def _checked(source: Source) -> Recipe:
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise explain(error, Recipe, source) from None
    try:
        config = engine_config(recipe.engine)
    except RecipeError as error:
        raise RecipeError(f"{source.where('engine.config')}: {error}") from None
    if recipe.model.compile and config.get("zero_optimization", {}).get("stage") == 3:
        text = (
            "ZeRO-3 gathers every layer by itself, which cuts a compiled block to pieces: use "
            "engine=fsdp2, or remove it"
        )
        raise RecipeError(f"{source.where('model.compile')}: model.compile = true: {text}")
    return recipe


def _label(path: Path) -> str:
    """How messages call a file: relative to the working folder or to the checkout where it is
    inside one."""
    for folder in (Path.cwd(), recipe_file.ROOT):
        if path.resolve().is_relative_to(folder):
            return str(path.resolve().relative_to(folder))
    return str(path)
