"""What a step of each row does to a recipe's model, before a run: a table, by `--what effect`.

On the recipe's own model, training rows and engine; a few steps are taken first, because a
reference of earlier weights says nothing at the first. At optimizer.lr from the first step on: the
question is what a row does when its warm-up is over.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from tram_ds.algorithms.bound import bind
from tram_ds.algorithms.effect import Effect, measure
from tram_ds.algorithms.stepper import Stepper
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.data.stream import Rows
from tram_ds.engines import choose as engines
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe, accumulation
from tram_ds.recipe.sections import ScheduleSection
from tram_ds.runtime.checked import Positive, Section
from tram_ds.runtime.ranks import Job, detect, joined, threads_per_rank
from tram_ds.surface.inputs import training_rows
from tram_ds.training.build import build_engine
from tram_ds.training.loop import cuts

Found = list[tuple[str, Effect]]
COLUMNS = ("radius", "|epsilon|", "loss gap", "gradient", "cos", "other masks", "verdict")


class Options(Section):
    """Settings of the measurement."""

    algorithms: list[Any] | str | None = None
    """Rows, each a name or {name: ..., option: ...}; `all` of them, or the recipe's own (null)."""
    steps: Positive = 3
    """The step that is looked at; those before it are taken."""


def recipes(options: Namespace, overrides: Sequence[str], asked: Options) -> list[Recipe]:
    """The recipe once for every row asked for, each with every check of a recipe. ValueError."""
    rows = asked.algorithms
    if isinstance(rows, str):
        rows = list(ALGORITHMS) if rows == "all" else [rows]
    if rows == []:
        raise ValueError("effect.algorithms = []: at least one row is needed, or null")
    chosen = [f"algorithm={json.dumps(row)}" for row in rows] if rows is not None else [""]
    return [
        load(options.recipe, [*overrides, *([row] if row else [])], smoke=options.smoke)
        for row in chosen
    ]


def run_rows(chosen: Sequence[Recipe], asked: Options, local_rank: int | None) -> tuple[Job, Found]:
    """(this rank's place, (row, its effect) in order). Every rank of the job calls it."""
    job = detect(local_rank)
    torch.set_num_threads(threads_per_rank(job))
    name, first = engines.choose(chosen[0].engine.name, job), chosen[0]
    with joined(job, name, timedelta(seconds=first.train.timeout)):
        task, rows = training_rows(first, job.world_size)
        found = [(label(r), effect_of(r, task, rows, job, name, asked.steps)) for r in chosen]
    return job, found


def effect_of(recipe: Recipe, task: Any, rows: Rows, job: Job, name: str, steps: int) -> Effect:
    """Of step `steps` of a fresh model. Collective."""
    # a warm-up of the recipe's would leave the first steps without any movement
    at_full_rate = recipe.model_copy(update={"schedule": ScheduleSection()})
    micros = accumulation(recipe, job.world_size)
    engine = build_engine(at_full_rate, name, task.model(), job, micros, steps)
    stepper = Stepper(engine, bind(recipe.algorithm, task.noise_site), recipe.train.seed)
    forward = task.chunked(engine.module) or task.forward

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        collated = [
            task.collate([rows[i] for i in cut]) for cut in cuts(recipe, engine, step, rows)
        ]
        return [{k: v.to(engine.device) for k, v in batch.items()} for batch in collated]

    for step in range(steps - 1):
        stepper.step(batches(step), forward, task.counts)
    found = measure(stepper, batches(steps - 1), forward, task.counts)
    close = getattr(engine.model, "destroy", None)
    if close is not None:
        close()
    return found


def label(recipe: Recipe) -> str:
    """The row and what of it was set."""
    section = recipe.algorithm
    given = section.model_dump(exclude_defaults=True, exclude={"name"})
    return " ".join([section.name, *(f"{key}={value}" for key, value in given.items())])


def show_rows(recipe: Recipe, job: Job, found: Found) -> None:
    """Prints the table, as Markdown, on rank 0."""
    if job.rank != 0:
        return
    print(f"{recipe.name}: what a step does beyond the base optimizer's\n")
    for line in lines([("algorithm", *COLUMNS), *((name, *cells(e)) for name, e in found)]):
        print(line)
    masks = any(effect.masks for _, effect in found)
    print(
        "\ngradient: |g' - g| / |g|, g the base optimizer's, g' this row's, under the same dropout "
        f"masks; {'other masks: the same between two draws' if masks else 'no dropout is active'}"
    )


def cells(effect: Effect) -> list[str]:
    """As COLUMNS."""
    numbers = [effect.radius, effect.norm, effect.loss_gap, effect.change]
    masks = f"{effect.masks:.2g}" if effect.masks else "-"
    return [*(f"{x:.2g}" for x in numbers), f"{effect.cosine:.5f}", masks, effect.verdict]


def lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its first row the head, its columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return [shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]]
