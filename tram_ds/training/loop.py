"""The training loop: batches in, steps taken, records out; validation, checkpoints and stops at
step boundaries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms.probe import Robustness
from tram_ds.algorithms.self_check import self_check
from tram_ds.algorithms.step import StepReport
from tram_ds.algorithms.stepper import Stepper
from tram_ds.data.order import batch_indices
from tram_ds.engines.protocol import Engine
from tram_ds.evaluation.judge import Judge
from tram_ds.models.output import Batch
from tram_ds.recipe.recipe import Recipe, accumulation
from tram_ds.runtime.exits import DONE, REQUEUE, NumericError
from tram_ds.runtime.ranks import highest
from tram_ds.runtime.signals import StopRequest, Watchdog
from tram_ds.tasks.protocol import Task
from tram_ds.training.throughput import Throughput, throughput

Record = dict[str, Any]
SAVE, STOP = 1, 2  # wishes of a rank; the largest of them is done
# threads that read and collate rows while the device works; decoding and memory-mapped reads
# release the GIL
READERS = 4


@dataclass
class Loop:
    """One run's loop. save() writes a checkpoint, collectively; record gets a plain dict on every
    rank, acts on rank 0."""

    recipe: Recipe
    task: Task
    stepper: Stepper
    rows: Sequence[Any]
    total_steps: int
    record: Callable[[Record], None]
    save: Callable[[], object]
    judge: Judge
    stop: StopRequest
    watchdog: Watchdog
    skipped_in_a_row: int = 0
    throughput: Throughput = field(init=False)
    _steps_since: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _ahead: dict[int, list[Future[Batch]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.throughput = throughput(self.recipe, self.stepper)

    def run(self) -> int:
        """Trains to the end (DONE), or to a requested stop (REQUEUE) with a checkpoint saved."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="rows") as pool:
            return self._train(pool)

    def _train(self, pool: ThreadPoolExecutor) -> int:
        train = self.recipe.train
        forward = self.task.chunked(self.stepper.engine.module) or self.task.forward
        first, upcoming, stopping, overdue = self.stepper.steps, None, False, False
        while self.stepper.steps < self.total_steps:
            step, done = self.stepper.steps, self.stepper.steps + 1
            self.watchdog.beat("data", step)
            batches = upcoming or self.batches(step, pool)
            if step == first:
                self.examine(batches, forward)
            finished = done == self.total_steps
            saving = (
                stopping
                or overdue
                or finished
                or done == train.stop_after
                or _due(self.recipe.checkpoint.every_steps, done)
            )
            upcoming = None if saving else self.batches(done, pool)
            self.watchdog.beat("step")
            self.take(batches, step, forward, upcoming)
            if _due(self.recipe.eval.every_steps, done):
                self.watchdog.beat("validation")
                self.validate(done)
                self.throughput.restart()
            wish = highest(self.wish())  # one small all-reduce for both questions
            stopping, overdue = wish == STOP or done == train.stop_after, wish == SAVE
            # A step that looked ahead kept nothing to resume from: one that does not follows, and
            # then the save.
            if saving or ((stopping or overdue) and self.stepper.restorable):
                self.watchdog.beat("checkpoint")
                self.save()
                self._saved, overdue = time.monotonic(), False
                self.throughput.restart()
                if stopping and not finished:
                    return REQUEUE
        return DONE

    def wish(self) -> int:
        """What this rank wants after a step: STOP where it was asked to, SAVE where it is rank 0,
        whose clock counts, and the last checkpoint is too old, else 0."""
        if self.stop.raised is not None:
            return STOP
        minutes = self.recipe.checkpoint.every_minutes
        if minutes is None or self.stepper.engine.rank != 0:
            return 0
        return SAVE if time.monotonic() - self._saved >= 60 * minutes else 0

    def examine(self, batches: list[Batch], forward: Any) -> None:
        """Before the first step this process takes: the self-check of a fresh run. Not timed."""
        if self.stepper.steps == 0 and self.recipe.train.self_check:
            self.watchdog.beat("self-check")
            self_check(self.stepper, batches, forward)
        self.throughput.restart()

    def batches(self, step: int, pool: ThreadPoolExecutor) -> list[Batch]:
        """This rank's micro-batches of step `step`, on its device; those of the next step are read
        in the background."""
        self._ahead = {
            t: self._ahead.get(t) or self.read(t, pool)
            for t in (step, step + 1)
            if t < self.total_steps
        }
        collated = [future.result() for future in self._ahead.pop(step)]
        device = self.stepper.engine.device
        return [
            {k: v.to(device, non_blocking=True) for k, v in batch.items()} for batch in collated
        ]

    def read(self, step: int, pool: ThreadPoolExecutor) -> list[Future[Batch]]:
        """Global micro-batches rank * K to rank * K + K - 1 of step `step`, being collated."""
        return [
            pool.submit(lambda cut=cut: self.task.collate([self.rows[i] for i in cut]))
            for cut in cuts(self.recipe, self.stepper.engine, step, len(self.rows))
        ]

    def take(
        self, batches: list[Batch], step: int, forward: Any, upcoming: list[Batch] | None
    ) -> None:
        """One step and its record; NumericError after train.max_skipped skipped steps in a row."""
        logging = _due(self.recipe.train.log_every, step + 1)
        full = step % self.recipe.train.probe_every == 0
        probe = Robustness(full, self.stepper.algorithm.gauge) if logging else None
        report = self.stepper.step(batches, forward, self.task.counts, probe, upcoming)
        self.throughput.add(step, report.targets)
        self.throughput.count(self.stepper, forward, batches)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0
        if logging or report.skipped:
            rates, now = self.throughput.rates(), time.monotonic()
            self.record(
                step_record(
                    step + 1, report, now - self._steps_since, probe.values if probe else {}
                )
                | rates
            )
            self._steps_since = now
        if self.skipped_in_a_row >= self.recipe.train.max_skipped:
            raise NumericError(
                f"step {step + 1}: NaN or Inf in loss, distance or gradient for "
                f"{self.skipped_in_a_row} steps in a row "
                "(train.max_skipped); weights are those of step "
                f"{step + 1 - self.skipped_in_a_row}: lower optimizer.lr, set "
                "algorithm.radius_max or train.clip_norm, or look at the data of that step"
            )

    def validate(self, done: int) -> None:
        """A validation run; the best weights so far are kept where the recipe selects them."""
        loss = self.judge.validation_loss()
        self.record({"step": done, "validation_loss": loss})
        if self.recipe.eval.select == "best":
            self.judge.keep_if_best(done, loss)


def cuts(recipe: Recipe, engine: Engine, step: int, rows: int) -> list[list[int]]:
    """Row numbers of this rank's micro-batches of step `step`."""
    train, micros = recipe.train, accumulation(recipe, engine.world_size)
    indices = batch_indices(train.seed, step, train.global_batch, rows)
    return [
        indices[j * train.micro_batch : (j + 1) * train.micro_batch]
        for j in range(engine.rank * micros, (engine.rank + 1) * micros)
    ]


def step_record(step: int, report: StepReport, seconds: float, probed: dict[str, Tensor]) -> Record:
    """Plain numbers of a step: the one place that reads its tensors back from the device, once."""
    values = {
        "loss": report.loss,
        "distance": report.distance,
        "radius": report.radius,
        "perturbed_loss": report.perturbed_loss,
        "sharpness_gap": report.perturbed_loss - report.loss,
        "grad_norm": report.grad_norm,
        "tokens": report.targets,
        **probed,
    }
    if "first_grad_norm" in probed:
        values["grad_norm_change"] = report.grad_norm / probed["first_grad_norm"] - 1.0
    numbers = dict(
        zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True)
    )
    return {
        "step": step,
        **numbers,
        "lr": report.lr,
        "skipped": int(report.skipped),
        "seconds": seconds,
    }


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
