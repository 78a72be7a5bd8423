"""Wires a recipe to a run: task, engine, stepper, loop, results. The only place that knows them
all."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tram_ds.algorithms.stepper import Stepper
from tram_ds.algorithms.table import algorithm
from tram_ds.checkpoint.changes import differences
from tram_ds.checkpoint.resume import Saver, resume
from tram_ds.engines import choose as engines
from tram_ds.evaluation.judge import Judge
from tram_ds.recipe.recipe import Recipe, accumulation, check_length, dump, to_dict
from tram_ds.runtime import run_folder
from tram_ds.runtime.exits import CODES, DONE, CheckpointError, PeerLost
from tram_ds.runtime.files import private_dir, remove_file, write_whole
from tram_ds.runtime.git import git_commit
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import Job, barrier, detect, from_rank_0, joined
from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_lock import RunLock, held
from tram_ds.runtime.shared_folder import refuse_unshared
from tram_ds.runtime.signals import StopRequest, Watchdog
from tram_ds.tasks import choose as tasks
from tram_ds.tracking import tracker as tracking
from tram_ds.tracking.address import Address, address
from tram_ds.tracking.dataset import dataset
from tram_ds.tracking.metrics_log import MetricsLog
from tram_ds.training.build import build_engine, threads_per_rank
from tram_ds.training.loop import Loop, Record
from tram_ds.training.progress import Progress, results_text

# seconds after train.timeout: a collective's own timeout comes first and says more
WATCHDOG_GRACE = 5.0
SYSTEM_SECONDS = 10.0  # between two samples of the machine for MLflow


@dataclass(frozen=True)
class Request:
    """What the command line asks beside the recipe.

    resume: continue from the newest checkpoint, if there is one. overwrite: remove what a run made
    here, start afresh.
    allow_change: resume although the recipe changed. fallback: resume from an older checkpoint if
    the newest is damaged.
    """

    resume: bool = False
    overwrite: bool = False
    allow_change: bool = False
    fallback: bool = False
    local_rank: int | None = None


def run(recipe: Recipe, request: Request) -> int:
    """Trains as the recipe says; returns the exit code: 0, or 75 after a requested stop. Every rank
    of the job calls it.

    Raises ValueError for the recipe or its data, before any model is loaded, and the errors of
    tram_ds.runtime.exits.
    """
    job = detect(request.local_rank)
    torch.set_num_threads(threads_per_rank(job))
    micros = accumulation(recipe, job.world_size)
    run_dir = recipe.resolved_run_dir()
    run_folder.refuse_place(run_dir)
    if request.resume and request.overwrite:
        raise ValueError("--resume continues a run and --overwrite removes it: give one of the two")
    name = engines.choose(recipe.engine.name, job)
    stop, watchdog = StopRequest(), Watchdog(job.rank, recipe.train.timeout + WATCHDOG_GRACE)
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        stack.enter_context(watchdog.watching())
        watchdog.beat("joining the other ranks")
        stack.enter_context(joined(job, name, timedelta(seconds=recipe.train.timeout)))
        check_run_folder(run_dir, request, job.world_size)  # before the lock, which is a file in it
        if request.resume and from_rank_0(lambda: finished(run_dir, recipe, request)):
            if job.rank == 0:
                print(f"{run_dir} is finished: nothing to do")
            return DONE
        watchdog.beat("reading the data")
        task = tasks.build(recipe)
        rows = task.train_rows()
        total = recipe.train.steps or -(
            -len(rows) * (recipe.train.epochs or 1) // recipe.train.global_batch
        )
        check_length(recipe, total)
        if job.rank == 0 and hasattr(task, "said"):
            print("".join(f"task.{key}: {value}\n" for key, value in task.said().items()), end="")
        watchdog.beat("building the model")
        lock = stack.enter_context(held(run_dir, job.world_size))
        open_run_folder(run_dir, recipe, request, job)
        engine = build_engine(recipe, name, task.model(), job, micros, total)
        options = recipe.algorithm.options()
        row = algorithm(
            recipe.algorithm.name,
            **{**options, "noise_site": options.get("noise_site") or task.noise_site},
        )
        stepper = Stepper(engine, row, recipe.train.seed)
        judge = Judge(recipe, task, engine, run_dir, watchdog.beat)
        with peer_errors(watchdog):
            code = session(
                recipe, request, job, name, task, stepper, judge, rows, total, stop, watchdog, lock
            )
        # before the barrier: a launcher may end this rank as soon as another one leaves with 75
        if job.rank == 0:
            (run_dir / ("DONE" if code == DONE else "REQUEUE")).touch(mode=0o600)
        barrier()
    return code


def session(
    recipe: Recipe,
    request: Request,
    job: Job,
    name: str,
    task: Any,
    stepper: Stepper,
    judge: Judge,
    rows: Any,
    total: int,
    stop: StopRequest,
    watchdog: Watchdog,
    lock: RunLock | None,
) -> int:
    """Resumes, trains, scores and exports, with the tracker ending in the truth. Collective;
    returns the exit code."""
    plain, digest, saving = to_dict(recipe), task.data_digest(), recipe.checkpoint
    status: tracking.Status = "FAILED"
    with (
        ExitStack() as recording,
        Saver(
            judge.run_dir,
            stepper,
            recipe=plain,
            data=digest,
            keep=saving.keep,
            lock=lock,
            patience=60 * saving.wait,
            beat=watchdog.beat,
        ) as saver,
    ):
        saver.room(exports=2 if recipe.eval.select == "best" else 1)
        judge.room = saver.space.until_done
        if request.resume:
            resumed = resume(
                stepper,
                judge.run_dir,
                recipe=plain,
                data=digest,
                allow_change=request.allow_change,
                fallback=request.fallback,
            )
            if resumed and stepper.steps > total:
                raise CheckpointError(
                    f"{resumed.path} is beyond the {total} steps asked for: choose another "
                    "run_dir, or more train.steps"
                )
            judge.go_back_to(stepper.steps, total)
            if job.rank == 0:
                told = (
                    [f"not used: {text}" for text in resumed.refused]
                    + [f"changed: {c}" for c in resumed.changes]
                    if resumed
                    else []
                )
                start = (
                    f"resuming from {resumed.path}"
                    if resumed
                    else f"{judge.run_dir} has no checkpoint: starting at step 0"
                )
                print("\n".join([start, *told]))
        initial = judge.initial() if recipe.eval.initial else None
        record, flush, tracker = recorders(recording, recipe, task, job, name, total, stepper.steps)
        try:

            def save() -> None:
                # a commit never knows of more steps than the record of the run
                saver.space.until_done(
                    0, "metrics.jsonl", lambda: saver.peers.every("writing metrics.jsonl", flush)
                )
                saver.save(asynchronous=saving.asynchronous)

            code = Loop(
                recipe, task, stepper, rows, total, record, save, judge, stop, watchdog
            ).run()
            saver.wait()
            status = "FINISHED" if code == DONE else "KILLED"
            if code == DONE:
                results = judge.conclude(initial)
                tracker.log_results(results)
                if job.rank == 0:
                    tracker.set_tags({"export": str((judge.run_dir / "export").resolve())})
                    print_results(
                        results,
                        judge.run_dir,
                        tracked_at(recipe).uri if recipe.tracking.enabled else None,
                    )
        finally:
            recording.close()
            # whoever stopped it may kill it soon
            tracker.finish(status, timeout=60.0 if status == "FINISHED" else 10.0)
    return code


@contextmanager
def peer_errors(watchdog: Watchdog) -> Iterator[None]:
    """A collective that fails because another rank is gone becomes PeerLost, saying where this rank
    was."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(
            word in str(error) for word in ("gloo", "Connection closed by peer")
        )
        if not lost or isinstance(error, tuple(CODES)):
            raise
        first = str(error).splitlines()[0]
        where = f"step {watchdog.step}, phase {watchdog.phase}"
        raise PeerLost(
            f"rank {watchdog.rank}: lost a peer in {where} ({first}); start again with --resume"
        ) from error


def finished(run_dir: Path, recipe: Recipe, request: Request) -> bool:
    """Whether this very recipe was run here to its end. With --allow-change another one is not
    finished, and goes on from its newest checkpoint; without it is refused (CheckpointError)."""
    if not (run_dir / "DONE").exists():
        return False
    run_folder.refuse(run_dir, resume=True, overwrite=False)
    changes = differences(run_dir, to_dict(recipe))
    if changes and not request.allow_change:
        raise CheckpointError(
            f"{run_dir} holds a finished run of another recipe: choose another run_dir, undo the "
            "change, go on from its last checkpoint with --allow-change, or remove that run with "
            f"--overwrite; {'; '.join(changes)}"
        )
    return not changes


def check_run_folder(run_dir: Path, request: Request, world_size: int) -> None:
    """ValueError, on every rank alike, where a run in this folder could cost somebody a file.
    Collective; changes nothing."""
    peers, text = Peers(world_size), ""
    if peers.rank == 0:
        try:
            run_folder.refuse(run_dir, resume=request.resume, overwrite=request.overwrite)
        except (ValueError, OSError) as error:
            text = str(error)
    text = peers.gather(text)[0]
    peers.close()
    if text:
        raise ValueError(text)


def open_run_folder(run_dir: Path, recipe: Recipe, request: Request, job: Job) -> None:
    """Continues the folder, or makes it an empty one, by rank 0, whose lock this job holds.
    Collective."""
    check_run_folder(run_dir, request, job.world_size)  # again: it was without a lock before
    if job.rank == 0:
        private_dir(run_dir)
    refuse_unshared(run_dir, job.world_size)
    if job.rank != 0:
        return
    if request.overwrite and not request.resume:
        run_folder.empty(run_dir)
    write_whole(run_dir / "recipe.yaml", dump(recipe))
    for marker in ("DONE", "REQUEUE"):
        remove_file(run_dir / marker)


def tracked_at(recipe: Recipe) -> Address:
    """The recipe's tracking section, else MLflow's own variables, else mlflow.db in this folder."""
    return address(recipe.tracking.uri, recipe.tracking.experiment, recipe.name, os.environ)


def recorders(
    stack: ExitStack, recipe: Recipe, task: Any, job: Job, engine: str, total_steps: int, start: int
) -> tuple[Callable[[Record], None], Callable[[], None], tracking.Tracker]:
    """(takes a step's record, flushes them, the tracker): on rank 0 metrics.jsonl, progress bar and
    MLflow; elsewhere nothing.

    `stack` closes them, the log before the tracker's last upload.
    """
    progress = Progress(job.rank, total_steps, initial=start)
    stack.callback(progress.close)
    if job.rank != 0:
        return lambda _: None, lambda: None, tracking.NullTracker()
    log = MetricsLog(recipe.resolved_run_dir())
    log.truncate_after(start)
    stack.callback(log.close)
    tracker = (
        start_tracking(recipe, task, job, engine)
        if recipe.tracking.enabled
        else tracking.NullTracker()
    )

    def record(values: Record) -> None:
        log.append(values)
        if "loss" in values:
            progress.update(values)
        else:
            progress.message(
                f"step {values['step']}: validation loss {values['validation_loss']:.4f}"
            )

    return record, log.flush, tracker


def start_tracking(recipe: Recipe, task: Any, job: Job, engine: str) -> tracking.Tracker:
    """The MLflow run: a child, by seed, of the run of (recipe, algorithm). Never raises for a
    server's sake."""
    digest = task.data_digest()
    tags = {
        "algorithm": recipe.algorithm.name,
        "task": recipe.task.name,
        "engine": engine,
        "world_size": job.world_size,
        "launcher": job.launcher,
        "git_commit": git_commit(),
        "data_digest": digest,
    }
    parent = f"{recipe.name}-{recipe.algorithm.name}"
    where = tracked_at(recipe)
    print(f"tracking: {where.told}")
    return tracking.start(
        recipe.resolved_run_dir(),
        where.uri,
        where.experiment,
        f"{parent}-{recipe.train.seed}",
        parent,
        to_dict(recipe),
        tags,
        dump(recipe),
        dataset=dataset(recipe.task, digest, task.train_domains, task.eval_domains),
        system_seconds=SYSTEM_SECONDS,
        experiment_by_id=where.by_id,
    )


def print_results(results: dict[str, Any], run_dir: Path, uri: str | None) -> None:
    """The table of scores per domain, before and after where both were measured, and where
    everything is."""
    split = next(iter(results["scores"]))
    metric = (
        "accuracy" if "accuracy" in next(iter(results["scores"][split].values())) else "perplexity"
    )
    after = {domain: scores[metric] for domain, scores in results["scores"][split].items()}
    before = {
        domain: scores[metric]
        for domain, scores in (results["initial"] or {}).get(split, {}).items()
    }
    print(results_text(before, after, results["train_domains"], metric))
    print(f"run folder: {run_dir}")
    if uri:
        print(f"MLflow:     {redact(uri)}" + _to_look_at(uri))


def _to_look_at(uri: str) -> str:
    """A server is looked at where it is; a database needs one."""
    server = "://" in uri and not uri.startswith("sqlite")
    return "" if server else f"  (mlflow ui --backend-store-uri {shlex.quote(uri)})"
