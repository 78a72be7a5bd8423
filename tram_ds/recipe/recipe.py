"""A recipe is one run: a frozen, checked `Recipe`."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from pydantic import model_validator

from tram_ds.algorithms.options import Momentum
from tram_ds.algorithms.table import ALGORITHMS, AlgorithmSection, readers, reads
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

CAUSAL = ("language_modeling", "instruction")  # tasks that predict tokens
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
        found = []
        start, every = self.algorithm.penalty_start, self.eval.every_steps
        if self.schedule.warmup_steps > steps:
            text = f"longer than the run ({said}): optimizer.lr is never reached"
            found.append(("schedule.warmup_steps", text))
        if start and start >= steps:
            text = f"not before the end of the run ({said}): the penalty never starts"
            found.append(("algorithm.penalty_start", text))
        if self.eval.select == "best" and every is not None and every > steps:
            text = (
                f"longer than the run ({said}): eval.select = best has nothing to choose by; set "
                "it to the run's length or less, or eval.select to final"
            )
            found.append(("eval.every_steps", text))
        stopping = self.train.early_stopping
        if stopping is not None and every is not None:
            first = every * (stopping.patience + 1)  # the first validation run is the best so far
            if first >= steps:
                text = (
                    f"used up at step {first} at the earliest, not before the end of the run "
                    f"({said}): set it or eval.every_steps lower, or train.early_stopping to null"
                )
                found.append(("train.early_stopping.patience", text))
        return found

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
        problems = []
        if self.task.name in CAUSAL and self.algorithm.distance == "mmd":
            text = (
                f"mmd compares samples of examples, and task.name = {self.task.name} predicts "
                "tokens: use l2"
            )
            problems.append(("algorithm.distance", text))
        if self.task.name not in CAUSAL and self.eval.generate is not None:
            text = f"task.name = {self.task.name} writes no text: remove it"
            problems.append(("eval.generate", text))
        if steps is not None:
            problems += self.too_long(steps, f"train.steps = {steps}")
        if self.train.early_stopping is not None and self.eval.every_steps is None:
            text = "needs validation runs: set eval.every_steps, or this to null"
            problems.append(("train.early_stopping", text))
        if self.train.epochs is not None and self.task.streaming is not None:
            text = (
                "task.streaming: how many rows there are is known only when all are read: set "
                "train.steps instead"
            )
            problems.append(("train.epochs", text))
        chooses = self.eval.select == "best" or self.train.early_stopping is not None
        if self.eval.key != "validation_loss" and not chooses:
            text = "nothing goes by it: set eval.select=best or train.early_stopping, or remove it"
            problems.append(("eval.key", text))
        pull, lr = self.algorithm.pull, self.optimizer.lr
        if "pull" in reads(self.algorithm.name) and pull * lr > 1:
            text = (
                f"times optimizer.lr = {lr:g} above 1, a step past theta_0: set {1 / lr:g} or less"
            )
            problems.append(("algorithm.pull", text))
        plain = self.optimizer.name == "sgd" and self.optimizer.momentum == 0
        if plain and Momentum in ALGORITHMS[self.algorithm.name]:
            text = "it moves along the optimizer's momentum, which is 0: set optimizer.momentum=0.9"
            problems.append(("algorithm.name", text))
        if self.optimizer.name == "sgd" and self.algorithm.precondition:
            text = (
                "divides by the square root of Adam's second moments, and optimizer.name = sgd "
                "keeps none: set optimizer=adam, or remove it"
            )
            problems.append(("algorithm.precondition", text))
        keeping = readers("decay")
        if self.eval.weights == "ema" and self.algorithm.name not in keeping:
            text = (
                f"algorithm.name = {self.algorithm.name} keeps no average of the weights: set "
                f"eval.weights=last, or train {' or '.join(keeping)}"
            )
            problems.append(("eval.weights", text))
        if self.schedule.end_lr > self.optimizer.lr:
            problems.append(
                (
                    "schedule.end_lr",
                    f"above optimizer.lr = {self.optimizer.lr}: the rate would rise",
                )
            )
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
