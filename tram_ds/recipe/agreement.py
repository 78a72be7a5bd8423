"""What sections of a recipe say of each other: (key, what is wrong and the way out) of each
disagreement, so that all of them are shown at once. Each section by itself has been checked."""

from __future__ import annotations

from collections.abc import Iterator

from tram_ds.algorithms.options import Momentum
from tram_ds.algorithms.table import ALGORITHMS, AlgorithmSection, readers, reads
from tram_ds.recipe.sections import EvalSection, OptimizerSection, ScheduleSection, TrainSection
from tram_ds.recipe.task_section import TaskSection

Problems = Iterator[tuple[str, str]]
CAUSAL = ("language_modeling", "instruction")  # tasks that predict tokens


def of_task(
    task: TaskSection, algorithm: AlgorithmSection, train: TrainSection, evaluation: EvalSection
) -> Problems:
    """What the data and the way to it rule out."""
    causal = task.name in CAUSAL
    if causal and algorithm.distance == "mmd":
        yield (
            "algorithm.distance",
            f"mmd compares samples of examples, and task.name = {task.name} predicts tokens: "
            "use l2",
        )
    if not causal and evaluation.generate is not None:
        yield "eval.generate", f"task.name = {task.name} writes no text: remove it"
    if train.epochs is not None and task.streaming is not None:
        yield (
            "train.epochs",
            "task.streaming: how many rows there are is known only when all are read: set "
            "train.steps instead",
        )


def of_evaluation(
    evaluation: EvalSection, train: TrainSection, algorithm: AlgorithmSection
) -> Problems:
    """What is asked of scores that the run does not make."""
    if train.early_stopping is not None and evaluation.every_steps is None:
        yield (
            "train.early_stopping",
            "needs validation runs: set eval.every_steps, or this to null",
        )
    chooses = evaluation.select == "best" or train.early_stopping is not None
    if evaluation.key != "validation_loss" and not chooses:
        yield (
            "eval.key",
            "nothing goes by it: set eval.select=best or train.early_stopping, or remove it",
        )
    keeping = readers("decay")
    if evaluation.weights == "ema" and algorithm.name not in keeping:
        yield (
            "eval.weights",
            f"algorithm.name = {algorithm.name} keeps no average of the weights: set "
            f"eval.weights=last, or train {' or '.join(keeping)}",
        )


def of_optimizer(
    optimizer: OptimizerSection, algorithm: AlgorithmSection, schedule: ScheduleSection
) -> Problems:
    """Options of a row that the base optimizer or its rate cannot serve."""
    pull, lr, sgd = algorithm.pull, optimizer.lr, optimizer.name == "sgd"
    if "pull" in reads(algorithm.name) and pull * lr > 1:
        yield (
            "algorithm.pull",
            f"times optimizer.lr = {lr:g} above 1, a step past theta_0: set {1 / lr:g} or less",
        )
    if sgd and optimizer.momentum == 0 and Momentum in ALGORITHMS[algorithm.name]:
        yield (
            "algorithm.name",
            "it moves along the optimizer's momentum, which is 0: set optimizer.momentum=0.9",
        )
    if sgd and algorithm.precondition:
        yield (
            "algorithm.precondition",
            "divides by the square root of Adam's second moments, and optimizer.name = sgd keeps "
            "none: set optimizer=adam, or remove it",
        )
    if schedule.end_lr > lr:
        yield "schedule.end_lr", f"above optimizer.lr = {lr}: the rate would rise"


def of_length(
    steps: int,
    said: str,
    schedule: ScheduleSection,
    algorithm: AlgorithmSection,
    evaluation: EvalSection,
    train: TrainSection,
) -> Problems:
    """What a run of so many steps never reaches. said: its length."""
    start, every, stopping = algorithm.penalty_start, evaluation.every_steps, train.early_stopping
    if schedule.warmup_steps > steps:
        yield (
            "schedule.warmup_steps",
            f"longer than the run ({said}): optimizer.lr is never reached",
        )
    if start and start >= steps:
        yield (
            "algorithm.penalty_start",
            f"not before the end of the run ({said}): the penalty never starts",
        )
    if evaluation.select == "best" and every is not None and every > steps:
        yield (
            "eval.every_steps",
            f"longer than the run ({said}): eval.select = best has nothing to choose by; set it "
            "to the run's length or less, or eval.select to final",
        )
    if stopping is not None and every is not None:
        first = every * (stopping.patience + 1)  # the first validation run is the best so far
        if first >= steps:
            yield (
                "train.early_stopping.patience",
                f"used up at step {first} at the earliest, not before the end of the run "
                f"({said}): set it or eval.every_steps lower, or train.early_stopping to null",
            )
