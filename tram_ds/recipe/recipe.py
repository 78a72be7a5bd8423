"""A recipe is one run: a frozen, checked `Recipe`."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from pydantic import model_validator

from tram_ds.algorithms.table import AlgorithmSection
from tram_ds.recipe import agreement
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe.file import RecipeError
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.sections import (
    CheckpointSection,
    EngineSection,
    EvalSection,
    ExportSection,
    OptimizerSection,
    ScheduleSection,
    TrackingSection,
    TrainSection,
)
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.checked import Section, refusal
from tram_ds.runtime.paths import Place

__all__ = ["Recipe", "RecipeError", "accumulation", "check_length", "dump", "to_dict"]

RUN_DIR_FIELDS = ("recipe", "algorithm", "seed")


class Recipe(Section):
    """One run, resolved: every key has its value."""

    name: str
    """The recipe's name: its file's stem unless the file says otherwise."""
    task: TaskSection
    """What is learned, from which data, and where it is evaluated."""
    model: ModelSection
    """The network: pre-trained or freshly initialised."""
    algorithm: AlgorithmSection
    """The training algorithm and its options."""
    optimizer: OptimizerSection
    """The base optimizer."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate over the steps."""
    engine: EngineSection = EngineSection()
    """How parameters, gradients and optimizer state are spread over the ranks."""
    train: TrainSection
    """How long, how many at once, and with which random numbers."""
    eval: EvalSection = EvalSection()
    """When and on what the model is scored."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the run saves what it needs to continue."""
    export: ExportSection = ExportSection()
    """The trained weights as files."""
    tracking: TrackingSection = TrackingSection()
    """MLflow."""
    run_dir: Place = "runs/{recipe}-{algorithm}-{seed}"
    """The run's folder; {recipe}, {algorithm} and {seed} are filled in."""

    def resolved_run_dir(self) -> Path:
        """The run's folder, relative to the working folder unless run_dir is absolute."""
        return Path(
            self.run_dir.format(
                recipe=self.name, algorithm=self.algorithm.name, seed=self.train.seed
            )
        )

    def too_long(self, steps: int, said: str) -> list[tuple[str, str]]:
        """(key, what is wrong) of what a run of so many steps never reaches. said: its length."""
        found = agreement.of_length(
            steps, said, self.schedule, self.algorithm, self.eval, self.train
        )
        return list(found)

    @model_validator(mode="after")
    def _names_are_folders(self) -> Recipe:
        plain = all(c.isprintable() and c not in "/\\:" for c in self.name)
        if not self.name or not plain or self.name.startswith((".", "-")):
            text = (
                "becomes part of a folder's name: no '/', '\\' or ':' in it, no '.' or '-' in front"
            )
            raise refusal(("name", text))
        try:
            fields = [
                part for part in string.Formatter().parse(self.run_dir) if part[1] is not None
            ]
        except ValueError as error:
            raise refusal(("run_dir", f"{error}; write {{{{ and }}}} for braces")) from None
        if not self.run_dir or "\0" in self.run_dir:
            raise refusal(("run_dir", "is not a folder's name"))
        for _, key, format_spec, conversion in fields:
            if key not in RUN_DIR_FIELDS or format_spec or conversion:
                known = ", ".join(f"{{{name}}}" for name in RUN_DIR_FIELDS)
                raise refusal(("run_dir", f"unknown placeholder '{{{key}}}' (one of {known})"))
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        steps = self.train.steps
        problems = [
            *agreement.of_task(self.task, self.algorithm, self.train, self.eval),
            *([] if steps is None else self.too_long(steps, f"train.steps = {steps}")),
            *agreement.of_evaluation(self.eval, self.train, self.algorithm),
            *agreement.of_optimizer(self.optimizer, self.algorithm, self.schedule),
        ]
        if problems:
            raise refusal(*problems)
        return self


def check_length(recipe: Recipe, steps: int) -> None:
    """RecipeError for what does not fit into a run of so many steps: for train.epochs, once the
    rows are counted."""
    epochs = recipe.train.epochs
    said = f"train.epochs = {epochs} is {steps} step{'s' * (steps != 1)}"
    if problems := recipe.too_long(steps, said):
        lines = (f"recipe {recipe.name}: {key}: {text}" for key, text in problems)
        raise RecipeError("\n".join(lines))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives an equal Recipe."""
    return recipe_file.write(to_dict(recipe))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data of a recipe, without the keys its other keys leave unread."""
    data = recipe.model_dump(mode="json")
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        if isinstance(section, Section):
            for key in section.unread():
                del data[name][key]
    return data


def accumulation(recipe: Recipe, world_size: int, ranks: str = "{} ranks") -> int:
    """Micro-batches per rank and optimizer step. RecipeError, with what would fit, if it is not
    whole. ranks: how fewer of them are asked for."""
    train = recipe.train
    unit = train.micro_batch * world_size
    if train.global_batch % unit == 0:
        return train.global_batch // unit
    total, micro = train.global_batch, train.micro_batch
    ways = []  # the first two leave the experiment as it is
    if total % world_size == 0:
        each = total // world_size
        fits = max(n for n in range(1, min(each, micro) + 1) if each % n == 0)
        ways.append(f"train.micro_batch={fits}")
    fewer = [n for n in range(1, world_size) if total % (micro * n) == 0]
    if fewer:
        ways.append(ranks.format(fewer[-1]))
    below = total // unit * unit
    other = " or ".join(str(n) for n in (below, below + unit) if n)
    ways.append(f"another experiment: train.global_batch={other}")
    raise RecipeError(
        f"recipe {recipe.name}: train.global_batch = {total}: not divisible by "
        f"train.micro_batch x ranks = {micro} x {world_size} = {unit}: {', or '.join(ways)}"
    )
