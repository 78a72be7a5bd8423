"""One run of a recipe: opened, built, trained in its loop, concluded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tram_ds.checkpoint.resume import Resumed, Saver, resume
from tram_ds.data.stream import Stream
from tram_ds.evaluation.evaluator import Scores
from tram_ds.recipe.recipe import Recipe, dump, to_dict
from tram_ds.runtime.exits import CODES, DONE, CheckpointError, PeerLost
from tram_ds.runtime.files import write_whole
from tram_ds.runtime.ranks import barrier
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.runtime.signals import Watchdog
from tram_ds.runtime.wording import short
from tram_ds.tracking.results import stopped_early
from tram_ds.training.build import Run, build
from tram_ds.training.effects import resolved
from tram_ds.training.loop import Loop
from tram_ds.training.opening import Request, opened
from tram_ds.training.progress import results_text
from tram_ds.training.records import Records, recording, warned

__all__ = ["Request", "run"]


def run(recipe: Recipe, request: Request) -> int:
    """Trains as the recipe says; returns the exit code: 0, or 75 after a requested stop. Every rank
    of the job calls it.

    Raises ValueError for the recipe or its data, before any model is loaded, and the errors of
    tram_ds.runtime.exits.
    """
    with opened(recipe, request) as found:
        if found is None:
            return DONE
        this = build(found)
        with peer_errors(this.watchdog), saving(this) as saver:
            went_back = go_on(this) if request.resume else False
            initial = this.evaluator.initial() if recipe.eval.initial else None
            with recording(this, went_back) as records:
                code = loop(this, saver, records)
                if code == DONE:
                    conclude(this, records, initial)
                # set at the end alone: whatever raises before leaves FAILED
                records.status = "FINISHED" if code == DONE else "KILLED"
        # before the barrier: a launcher may end this rank as soon as another one leaves with 75
        if this.job.rank == 0:
            marker = this.folder.done if code == DONE else this.folder.requeue
            marker.touch(mode=0o600)
        barrier()
    return code


@contextmanager
def saving(run: Run) -> Iterator[Saver]:
    """What saves the run, and finds and waits for room on the disk. Collective."""
    saver = Saver(
        run.folder.path,
        run.stepper,
        recipe=to_dict(run.recipe),
        data=run.task.data_digest(),
        keep=run.recipe.checkpoint.keep,
        lock=run.lock,
        patience=60 * run.recipe.checkpoint.wait,
        beat=run.watchdog.beat,
    )
    with saver:
        exports = 2 if run.recipe.eval.select == "best" else 1
        # before the first step: to find the disk too small after hours would lose them
        saver.room(exports, getattr(torch, run.recipe.export.dtype))
        run.evaluator.room = saver.space.until_done
        yield saver


def go_on(run: Run) -> bool:
    """From the newest checkpoint, if there is one; rank 0 says what was done. Whether the steps
    after it are another way than those an earlier process went: with a changed recipe, or from
    before a damaged checkpoint. Collective."""
    found = resume(
        run.stepper,
        run.folder.path,
        recipe=to_dict(run.recipe),
        data=run.task.data_digest(),
        allow_change=run.request.allow_change,
        fallback=run.request.fallback,
    )
    if found and run.stepper.steps > run.total_steps:
        key = "steps" if run.recipe.train.steps else "epochs"
        raise CheckpointError(
            f"{found.path} is beyond the {run.total_steps} steps asked for: choose another "
            f"run_dir, or more train.{key}"
        )
    if found is not None:
        run.early_stopping.load(found.manifest)
        if isinstance(run.rows, Stream):
            run.rows.load(found.manifest)
    # rank 0 alone looks at files and changes them
    if run.job.rank == 0:
        run.evaluator.selection.go_back_to(run.stepper.steps, run.total_steps)
        print("\n".join(_told(run.folder, found)))
    return found is not None and bool(found.changes or found.refused)


def _told(folder: RunFolder, found: Resumed | None) -> list[str]:
    if found is None:
        return [f"{folder} has no checkpoint: starting at step 0"]
    refused = [f"not used: {text}" for text in found.refused]
    changes = [f"changed: {text}" for text in found.changes]
    return [f"resuming from {found.path}", *refused, *changes]


def loop(run: Run, saver: Saver, records: Records) -> int:
    """All steps that are left; DONE, or REQUEUE after a stop. All is saved then. Collective."""

    def save() -> None:
        # a commit never knows of more steps than the record of the run
        # needed 0: how many bytes are pending is not known, the disk's own refusal is waited for
        saver.space.until_done(
            0,
            run.folder.metrics.name,
            lambda: saver.peers.every(f"writing {run.folder.metrics.name}", records.flush),
        )
        also = run.early_stopping.state()
        if isinstance(run.rows, Stream):
            also |= run.rows.kept_at(run.stepper.steps * run.recipe.train.global_batch)
        saver.save(asynchronous=run.recipe.checkpoint.asynchronous, also=also)

    code = Loop(run, records.add, save).train()
    # a background save may still write: only then is the last step safe
    saver.wait()
    return code


def conclude(run: Run, records: Records, initial: Scores | None) -> None:
    """Final scores and the export, recorded and shown. Collective."""
    records.flush()
    stopped = run.early_stopping.told(run.stepper.steps, run.total_steps)
    found = resolved(run.stepper.algorithm)
    results = run.evaluator.conclude(initial, lambda: warned(run), stopped, found)
    # on every rank: a NullTracker takes it where nothing is tracked
    records.tracker.log_results(results)
    if run.job.rank == 0:
        if stopped is not None:
            records.tracker.set_tags({"stopped_early": stopped_early(results)})
        tags = {f"resolved.{key}": repr(value) for key, value in found.items()}
        records.tracker.set_tags({"export": str(run.folder.export.resolve()), **tags})
        if found:
            # as comments: trained again by this file, the run finds them again
            lines = [f"# {key}: found to be {value!r}\n" for key, value in found.items()]
            write_whole(run.folder.recipe, "".join([dump(run.recipe), *lines]))
        print_results(results, run.folder)


@contextmanager
def peer_errors(watchdog: Watchdog) -> Iterator[None]:
    """A collective that fails because another rank is gone becomes PeerLost, saying where this rank
    was."""
    try:
        yield
    except RuntimeError as error:
        # gloo and NCCL raise plain RuntimeErrors for it too, told apart by their words alone
        lost = isinstance(error, dist.DistError) or any(
            word in str(error) for word in ("gloo", "Connection closed by peer")
        )
        # our own errors are RuntimeErrors too, and say better what happened
        if not lost or isinstance(error, tuple(CODES)):
            raise
        first = str(error).splitlines()[0]
        where = f"step {watchdog.step}, phase {watchdog.phase}"
        raise PeerLost(
            f"rank {watchdog.rank}: lost a peer in {where} ({first}); start again with --resume"
        ) from error


def print_results(results: dict[str, Any], folder: RunFolder) -> None:
    """The table of scores per domain, before and after where both were measured, and where the run
    is."""
    split = next(iter(results["scores"]))
    scores = results["scores"][split]
    metric = "accuracy" if "accuracy" in next(iter(scores.values())) else "perplexity"
    initial = (results["initial"] or {}).get(split, {})
    after = {domain: found[metric] for domain, found in scores.items()}
    before = {domain: found[metric] for domain, found in initial.items()}
    print(results_text(before, after, results["train_domains"], metric))
    print("".join(f"warning: {text}\n" for text in results["warnings"]), end="")
    for sample in results["samples"]:
        print(f"sample: {short(sample['prompt'])} -> {short(sample['text'], 120)}")
    if text := stopped_early(results):
        print(text)
    print(f"run folder: {folder}")
