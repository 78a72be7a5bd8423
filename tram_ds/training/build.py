"""From a recipe to the engine that trains it, and from an opened run to one that can train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tram_ds.algorithms.bound import bind
from tram_ds.algorithms.references import average
from tram_ds.algorithms.stepper import Stepper
from tram_ds.engines import choose as engines
from tram_ds.evaluation.evaluator import Evaluator
from tram_ds.models.pretrained import load_stored
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.recipe import Recipe, accumulation
from tram_ds.runtime.ranks import Job
from tram_ds.training.early_stopping import EarlyStopping
from tram_ds.training.opening import Opened
from tram_ds.training.optimizer import make, schedule


@dataclass(frozen=True)
class Run(Opened):
    """One run, made once and handed on: what was opened (its fields), and what trains and judges
    it."""

    stepper: Stepper
    evaluator: Evaluator
    early_stopping: EarlyStopping


def build(opened: Opened) -> Run:
    """The model on its engine, the recipe's algorithm around it. Collective."""
    recipe, task, job = opened.recipe, opened.task, opened.job
    micros = accumulation(recipe, job.world_size)
    # on meta where it can be: the engine reads each rank's own pieces from the files, or draws them
    model: Any = task.model(load_stored)
    if job.rank == 0 and getattr(model, "loaded_whole", None):
        print(model.loaded_whole)
    # before the engine, which has to know whether a gradient goes through two forward passes
    row = bind(recipe.algorithm, task.noise_site)
    engine = build_engine(
        recipe,
        opened.engine,
        model,
        job,
        micros,
        opened.total_steps,
        one_backward=not row.through_reference,
    )
    stepper = Stepper(engine, row, recipe.train.seed)
    judged = (lambda: average(row, engine)) if recipe.eval.weights == "ema" else lambda: None
    evaluator = Evaluator(recipe, task, engine, opened.folder, opened.watchdog.beat, judged)
    stopping = EarlyStopping(recipe.train.early_stopping, recipe.eval.key)
    return Run(**vars(opened), stepper=stepper, evaluator=evaluator, early_stopping=stopping)


def build_engine(
    recipe: Recipe,
    name: str,
    model: Any,
    job: Job,
    micros: int,
    total_steps: int,
    *,
    one_backward: bool = False,
) -> Any:
    """The recipe's engine around `model`, which may be on meta (models/pretrained.load_stored).
    one_backward: as in engines.choose.Settings. Collective."""
    stored = getattr(model, "stored", None)
    settings = engines.Settings(
        job=job,
        optimizer=lambda module: make(recipe.optimizer, module),
        # by the name that was chosen: the recipe's may be auto
        config=engine_config(recipe.engine.model_copy(update={"name": name})),
        dtype=getattr(torch, recipe.model.dtype),
        micro_batch=recipe.train.micro_batch,
        accumulation=micros,
        clip_norm=recipe.train.clip_norm,
        schedule=schedule(recipe.schedule, recipe.optimizer.lr, total_steps),
        fill=stored.read if stored else None,
        one_backward=one_backward,
    )
    engine = engines.build(name, model, settings)
    if stored is not None:
        stored.close()
    return engine
