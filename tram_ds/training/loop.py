"""The training loop: batches in, steps taken, records out; validation, checkpoints and stops at
step boundaries."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms.effect import measure
from tram_ds.algorithms.probe import EpsilonProbe
from tram_ds.algorithms.self_check import self_check
from tram_ds.algorithms.step import StepReport
from tram_ds.data.stream import Rows, positions
from tram_ds.engines.protocol import Engine
from tram_ds.evaluation.measured import value_of
from tram_ds.models.output import Batch
from tram_ds.models.passes import evaluating
from tram_ds.recipe.recipe import Recipe, accumulation
from tram_ds.runtime.exits import DONE, REQUEUE, NumericError
from tram_ds.runtime.ranks import highest
from tram_ds.training.build import Run
from tram_ds.training.effects import due, record_of
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

    run: Run
    record: Callable[[Record], None]
    save: Callable[[], object]
    skipped_in_a_row: int = 0
    throughput: Throughput = field(init=False)
    _steps_since: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _ahead: dict[int, list[Future[Batch]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.throughput = throughput(self.run.recipe, self.run.stepper)

    def train(self) -> int:
        """Trains to the end (DONE), or to a requested stop (REQUEUE) with a checkpoint saved."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="rows") as pool:
            return self._train(pool)

    def _train(self, pool: ThreadPoolExecutor) -> int:
        run, train = self.run, self.run.recipe.train
        forward = run.task.chunked(run.stepper.engine.module) or run.task.forward
        # None: the first step of this process has nobody who looked ahead for it
        first, upcoming, stopping, overdue = run.stepper.steps, None, False, False
        while not self.ended(step := run.stepper.steps):
            done = step + 1
            run.watchdog.beat("data", step)
            batches = upcoming or self.batches(step, pool)
            if step == first:
                self.examine(batches, forward)
            # before the step, which has to know: one that looks ahead cannot be saved
            saving = stopping or overdue or self.save_is_due(done)
            # looking ahead runs the next step's batches through theta_t in this one, and a
            # checkpoint keeps no such predictions: a step before a save does not look ahead
            upcoming = None if saving or self.may_end(done) else self.batches(done, pool)
            # before the step, at theta_t: after it the weights are those of the next
            looked = self.look(batches, step, forward)
            run.watchdog.beat("step")
            self.take(batches, step, forward, upcoming, looked)
            # before the wish: a signal that comes during a long validation is heard at its end
            if _due(run.recipe.eval.every_steps, done):
                self.validate(done)
            wish = highest(self.wish())  # one small all-reduce for both questions
            stopping, overdue = wish == STOP or done == train.stop_after, wish == SAVE
            # A step that looked ahead kept nothing to resume from: one that does not follows, and
            # then the save.
            asked = (stopping or overdue) and run.stepper.restorable
            # the same branch on every rank: of the recipe, the all-reduce and scores that all share
            if saving or asked or self.ended(done):
                self.checkpoint()
                overdue = False
                if stopping and not self.ended(done):
                    return REQUEUE
        return DONE

    def ended(self, done: int) -> bool:
        """Whether no step follows `done` steps: it was the last, or validation stopped getting
        better. Every rank says the same."""
        return done >= self.run.total_steps or self.run.early_stopping.over

    def may_end(self, done: int) -> bool:
        """Whether the validation run after `done` steps may end the run, which then saves."""
        return _due(self.run.recipe.eval.every_steps, done) and self.run.early_stopping.running_out

    def save_is_due(self, done: int) -> bool:
        """Whether the recipe wants a checkpoint after `done` steps; every rank says the same."""
        at = (self.run.total_steps, self.run.recipe.train.stop_after)
        return done in at or _due(self.run.recipe.checkpoint.every_steps, done)

    def checkpoint(self) -> None:
        """A save now. Collective; its time is not the steps'."""
        self.run.watchdog.beat("checkpoint")
        self.save()
        # after the save: its own minutes do not count towards the next one
        self._saved = time.monotonic()
        self.throughput.restart()

    def wish(self) -> int:
        """What this rank wants after a step: STOP where it was asked to, SAVE where it is rank 0,
        whose clock counts, and the last checkpoint is too old, else 0."""
        if self.run.stop.received is not None:
            return STOP
        minutes = self.run.recipe.checkpoint.every_minutes
        if minutes is None or self.run.stepper.engine.rank != 0:
            return 0
        return SAVE if time.monotonic() - self._saved >= 60 * minutes else 0

    def examine(self, batches: list[Batch], forward: Any) -> None:
        """Before the first step this process takes: whether the task's batches mean to this model
        what they should, and the self-check of a fresh run. Not timed."""
        engine = self.run.stepper.engine
        if (check := getattr(self.run.task, "examine", None)) is not None:
            self.run.watchdog.beat("examination")
            with engine.autocast(), evaluating(engine.module):
                check(engine.model)
        if self.run.stepper.steps == 0 and self.run.recipe.train.self_check:
            self.run.watchdog.beat("self-check")
            self_check(self.run.stepper, batches, forward)
        self.throughput.restart()

    def look(self, batches: list[Batch], step: int, forward: Any) -> Record:
        """What the next step, `step` counted from 0, will do beyond the base optimizer's, where
        that is due. Not timed."""
        train, stepper = self.run.recipe.train, self.run.stepper
        if not due(step + 1, train.effect_every, train.log_every, stepper.algorithm):
            return {}
        self.run.watchdog.beat("effect")
        found = measure(stepper, batches, forward, self.run.task.counts)
        self.throughput.restart()
        return record_of(found)

    def batches(self, step: int, pool: ThreadPoolExecutor) -> list[Batch]:
        """This rank's micro-batches of step `step`, on its device; those of the next step are read
        in the background."""
        self._ahead = {
            t: self._ahead.get(t) or self.read(t, pool)
            for t in (step, step + 1)
            # a step beyond the last would read rows of an epoch that is never trained
            if t < self.run.total_steps
        }
        collated = [future.result() for future in self._ahead.pop(step)]
        device = self.run.stepper.engine.device
        return [
            {k: v.to(device, non_blocking=True) for k, v in batch.items()} for batch in collated
        ]

    def read(self, step: int, pool: ThreadPoolExecutor) -> list[Future[Batch]]:
        """Global micro-batches rank * K to rank * K + K - 1 of step `step`, being collated."""
        # cut=cut: a lambda looks its names up when it runs, and by then the loop has moved on
        return [
            pool.submit(lambda cut=cut: self.run.task.collate([self.run.rows[i] for i in cut]))
            for cut in cuts(self.run.recipe, self.run.stepper.engine, step, self.run.rows)
        ]

    def take(
        self,
        batches: list[Batch],
        step: int,
        forward: Any,
        upcoming: list[Batch] | None,
        looked: Record,
    ) -> None:
        """One step and its record; NumericError after train.max_skipped skipped steps in a row."""
        logging = _due(self.run.recipe.train.log_every, step + 1)
        full = step % self.run.recipe.train.probe_every == 0
        # logged steps alone: a probe costs passes over the weights
        probe = EpsilonProbe(full, self.run.stepper.algorithm.epsilon_length) if logging else None
        report = self.run.stepper.step(batches, forward, self.run.task.counts, probe, upcoming)
        # a tensor: read back with the rates, or every step would wait for the device
        self.throughput.add(step, report.targets)
        self.throughput.count(self.run.stepper, forward, batches)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0
        # skipped steps always: they are what somebody looks for in the record
        if logging or report.skipped:
            rates, now = self.throughput.rates(), time.monotonic()
            probed = probe.values if probe else {}
            found = step_record(step + 1, report, now - self._steps_since, probed)
            self.record(found | rates | looked)
            # a record's seconds reach from the record before
            self._steps_since = now
        if self.skipped_in_a_row >= self.run.recipe.train.max_skipped:
            raise NumericError(self._hopeless(step + 1))

    def _hopeless(self, done: int) -> str:
        return (
            f"step {done}: NaN or Inf in loss, distance or gradient for {self.skipped_in_a_row} "
            f"steps in a row (train.max_skipped); weights are those of step "
            f"{done - self.skipped_in_a_row}: lower optimizer.lr, set algorithm.radius_max or "
            "train.clip_norm, or look at the data of that step"
        )

    def validate(self, done: int) -> None:
        """A validation run; the best weights so far are kept where the recipe selects them.
        Collective; its time is not the steps'."""
        self.run.watchdog.beat("validation")
        found = self.run.evaluator.validate()
        wanted = self.run.recipe.eval.generate
        if wanted is not None and wanted.each_validation:
            found["samples"] = self.run.evaluator.samples(self.run.evaluator.judged())
        self.record({"step": done, **found})
        value = value_of(found, self.run.recipe.eval.key)
        self.run.early_stopping.note(done, value)
        if self.run.recipe.eval.select == "best":
            self.run.evaluator.keep_if_best(done, value)
        self.throughput.restart()


def cuts(recipe: Recipe, engine: Engine, step: int, rows: Rows) -> list[list[int]]:
    """Row numbers of this rank's micro-batches of step `step`."""
    train, micros = recipe.train, accumulation(recipe, engine.world_size)
    indices = positions(rows, train.seed, step, train.global_batch)
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
        # of the pass that descends against the first pass, which a row with one pass lacks
        values["grad_norm_change"] = report.grad_norm / probed["first_grad_norm"] - 1.0
    numbers = dict(
        # double: token counts above 2^24 have no exact float32; stacked: one copy, one wait
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
