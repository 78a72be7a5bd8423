"""What a run leaves of its steps: metrics.jsonl, the progress bar, MLflow's copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tram_ds.data.stream import number_of
from tram_ds.evaluation.measured import ZERO_SHOT
from tram_ds.recipe.numbers import deciding
from tram_ds.recipe.recipe import Recipe, dump, to_dict
from tram_ds.runtime.git import git_commit
from tram_ds.tracking import tracker as tracking
from tram_ds.tracking.address import Address, address
from tram_ds.tracking.dataset import dataset
from tram_ds.tracking.metrics_log import MetricsLog, read
from tram_ds.tracking.state import Identity
from tram_ds.training.build import Run
from tram_ds.training.effects import FIRST, effect_of, warning
from tram_ds.training.loop import Record
from tram_ds.training.progress import Progress

SYSTEM_SECONDS = 10.0  # between two samples of the machine for MLflow


@dataclass
class Records:
    """Takes what the loop measures: rank 0 keeps it, elsewhere log is None and nothing happens.

    status: what the tracker says of the run at its end.
    """

    run: Run
    log: MetricsLog | None
    progress: Progress
    tracker: tracking.Tracker
    status: tracking.Status = "FAILED"
    _told: bool = False  # the line of the first effect that this process measured

    def add(self, values: Record) -> None:
        """One record of a step or of a validation."""
        if self.log is None:
            return
        self.log.append(values)
        if "loss" in values:
            self._say(values)
            self.progress.update(values)
        else:
            text = f"step {values['step']}: validation loss {values['validation_loss']:.4f}"
            zero_shot = values.get("validation", {}).get(ZERO_SHOT, {})
            told = [f"zero-shot {metric} {value:.4f}" for metric, value in zero_shot.items()]
            self.progress.message(", ".join([text, *told]))

    def _say(self, values: Record) -> None:
        effect = effect_of(values)
        if effect is not None and not self._told:
            self._told = True
            self.progress.message(effect.words(self.run.stepper.algorithm.name))
        if values["step"] == last_of_first(self.run):
            # warned() reads the file
            self.flush()
            for text in warned(self.run):
                self.progress.message(f"warning: {text}")
                self.tracker.set_tags({"warning": text})

    def flush(self) -> None:
        """metrics.jsonl holds all that was added. OSError where the disk refuses."""
        if self.log is not None:
            self.log.flush()


@contextmanager
def recording(run: Run, went_back: bool) -> Iterator[Records]:
    """Records from here on; what an earlier process recorded of later steps is set aside.
    went_back: those steps will not come again as they were. Ends with the log closed and the
    tracker told records.status."""
    with ExitStack() as files:
        progress = Progress(run.job.rank, run.total_steps, initial=run.stepper.steps)
        files.callback(progress.close)
        log, tracker = None, tracking.NullTracker()
        if run.job.rank == 0:
            log = MetricsLog(run.folder.path)
            log.truncate_after(run.stepper.steps)
            files.callback(log.close)
            if run.recipe.tracking.enabled:
                tracker = start_tracking(run, went_back)
        records = Records(run, log, progress, tracker)
        try:
            yield records
        finally:
            files.close()  # the log before the tracker's last upload, which reads it
            # whoever stopped it may kill it soon
            tracker.finish(records.status, timeout=60.0 if records.status == "FINISHED" else 10.0)
            if records.status == "FINISHED" and tracker.page:
                print(f"MLflow:     {tracker.page}")


def last_of_first(run: Run) -> int:
    """The logged step after which it is known whether the first steps give reason to warn."""
    every = run.recipe.train.log_every
    last = min(FIRST, run.total_steps)
    return max(every, last - last % every)


def warned(run: Run) -> list[str]:
    """What the record of the run's first steps gives reason to say. Rank 0."""
    text = warning(run.stepper.algorithm, read(run.folder.path), last_of_first(run))
    return [] if text is None else [text]


def tracked_at(recipe: Recipe) -> Address:
    """The recipe's tracking section, else MLflow's own variables, else mlflow.db in this folder."""
    return address(recipe.tracking.uri, recipe.tracking.experiment, recipe.name, os.environ)


def start_tracking(run: Run, went_back: bool) -> tracking.Tracker:
    """The MLflow run: a child, by seed, of the run of (recipe, algorithm). Never raises for a
    server's sake."""
    recipe, task, digest = run.recipe, run.task, run.task.data_digest()
    tags: dict[str, Any] = {
        "recipe": recipe.name,
        "algorithm": recipe.algorithm.name,
        "task": recipe.task.name,
        "engine": run.engine,
        "world_size": run.job.world_size,
        "launcher": run.job.launcher,
        "device": run.job.device.type,
        "git_commit": git_commit(),
        "data_digest": digest,
    }
    if (rows := number_of(run.rows)) is not None:
        tags["train_rows"] = rows
    parent = f"{recipe.name}-{recipe.algorithm.name}"
    where = tracked_at(recipe)
    print(f"tracking: {where.told}")
    about = Identity(
        where.uri,
        where.experiment,
        f"{parent}-{recipe.train.seed}",
        parent,
        to_dict(recipe),
        tags,
        dump(recipe),
        dataset(recipe.task, digest, task.train_domains, task.eval_domains),
        where.by_id,
        deciding(to_dict(recipe)),
        f"Trained again by `tram train --recipe {run.folder.recipe}`.\n\nRun folder: "
        f"`{run.folder.path}`, exported model: `{run.folder.export.resolve()}`",
    )
    return tracking.start(
        run.folder.path, about, system_seconds=SYSTEM_SECONDS, went_back=went_back
    )
