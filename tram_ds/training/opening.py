"""From the command line to a run that may begin: the job's ranks, its data, its folder and lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from tram_ds.checkpoint.changes import another, finished
from tram_ds.data.alike import read_alike
from tram_ds.data.stream import Rows, number_of
from tram_ds.engines import choose as engines
from tram_ds.evaluation import measured, samples
from tram_ds.models.pretrained import load_outline
from tram_ds.planning import without_gpu
from tram_ds.recipe.recipe import Recipe, accumulation, check_length, dump, to_dict
from tram_ds.recipe.same_everywhere import refuse_other_recipes
from tram_ds.runtime import run_folder
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.files import private_dir, remove_file, write_whole
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import Job, detect, from_rank_0, joined, threads_per_rank
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.runtime.run_lock import RunLock, held
from tram_ds.runtime.shared_folder import refuse_unshared
from tram_ds.runtime.signals import StopRequest, Watchdog
from tram_ds.tasks import choose as tasks
from tram_ds.tracking.results import how_it_ended

# seconds after train.timeout: gloo's own timeout comes first and says more; NCCL's comes later
WATCHDOG_GRACE = 5.0


@dataclass(frozen=True)
class Request:
    """What the command line asks beside the recipe.

    resume: continue from the newest checkpoint, if there is one. overwrite: remove what a run made
    here, start afresh. allow_change: resume although the recipe changed. fallback: resume from an
    older checkpoint if the newest is damaged.
    """

    resume: bool = False
    overwrite: bool = False
    allow_change: bool = False
    fallback: bool = False
    local_rank: int | None = None


@dataclass(frozen=True)
class Opened:
    """A run that may begin, on one rank. lock: the folder's, on rank 0. engine: its name."""

    recipe: Recipe
    request: Request
    job: Job
    folder: RunFolder
    engine: str
    stop: StopRequest
    watchdog: Watchdog
    task: Any
    rows: Rows
    total_steps: int
    lock: RunLock | None


@contextmanager
def opened(recipe: Recipe, request: Request) -> Iterator[Opened | None]:
    """Joins the ranks, reads the data, takes the folder; None where the run is finished already.
    Collective.

    ValueError for the recipe, its data or its folder, before anything is written.
    """
    job, folder = detect(request.local_rank), RunFolder(recipe.resolved_run_dir())
    # first: N ranks of a node with a thread for every core each slow one another
    torch.set_num_threads(threads_per_rank(job))
    accumulation(recipe, job.world_size)  # refuses a batch that these ranks cannot share
    without_gpu.check(recipe, job)
    run_folder.refuse_place(folder.path)
    if request.resume and request.overwrite:
        raise ValueError("--resume continues a run and --overwrite removes it: give one of the two")
    engine = engines.choose(recipe.engine.name, job)
    # both before the ranks join, where a rank that never comes is waited for
    stop, watchdog = StopRequest(), Watchdog(job.rank, recipe.train.timeout + WATCHDOG_GRACE)
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        stack.enter_context(watchdog.watching())
        watchdog.beat("joining the other ranks")
        stack.enter_context(joined(job, engine, timedelta(seconds=recipe.train.timeout)))
        refuse_other_recipes(recipe, job.world_size)
        # before the lock, which is a file in it
        refuse_folder(folder, request, job.world_size)
        # rank 0's look for all: ranks that disagree would part before the collectives below
        if request.resume and from_rank_0(lambda: nothing_to_do(folder, recipe, request)):
            if job.rank == 0:
                print(f"{folder} is finished: nothing to do{how_it_ended(folder.path)}")
            yield None
            return
        watchdog.beat("reading the data")
        task, rows, total = read_data(recipe, job)
        watchdog.beat("building the model")
        # not before the data holds: a recipe that is refused leaves no folder, nor a lock in one
        lock = stack.enter_context(held(folder.path, job.world_size))
        take_folder(folder, recipe, request, job)
        yield Opened(recipe, request, job, folder, engine, stop, watchdog, task, rows, total, lock)


def read_data(recipe: Recipe, job: Job) -> tuple[Any, Rows, int]:
    """(task, its training rows, steps of the whole run), the same on all ranks. Rank 0 says what
    the task resolved. Collective."""

    unmeasured: list[str] = []

    def read() -> tuple[Any, Rows, int]:
        task = tasks.build(recipe)
        rows, train = task.train_rows(), recipe.train
        # rounded up: the last step of the last epoch may read rows of a next one; a stream, whose
        # rows nobody has counted, has train.steps
        passed = (number_of(rows) or 0) * (train.epochs or 1)
        total = train.steps or -(-passed // train.global_batch)
        check_length(recipe, total)
        unmeasured[:] = measured.check(recipe, task)
        samples.check(recipe, task)
        if recipe.model.lora is not None:
            task.model(load_outline)  # targets that are not there, before a folder is made
        return task, rows, total

    def facts(found: tuple[Any, Rows, int]) -> dict[str, Any]:
        task, rows, total = found
        return {"training rows": number_of(rows), "steps": total, "content": task.data_digest()}

    task, rows, total = read_alike(read, facts, job.world_size, f"task.data {recipe.task.data}")
    if job.rank == 0 and hasattr(task, "said"):
        print("".join(f"task.{key}: {value}\n" for key, value in task.said().items()), end="")
    if job.rank == 0 and unmeasured:
        print(f"eval.domains: without a validation split, not measured: {', '.join(unmeasured)}")
    return task, rows, total


def nothing_to_do(folder: RunFolder, recipe: Recipe, request: Request) -> bool:
    """Whether this very recipe was run here to its end. With --allow-change another one is not
    finished, and goes on from its newest checkpoint; without it is refused (CheckpointError)."""
    if not folder.ended:
        return False
    run_folder.refuse(folder.path, resume=True, overwrite=False)
    changes = another(folder.path, to_dict(recipe))
    if changes and not request.allow_change:
        raise CheckpointError(
            f"{folder} holds a finished run of another recipe: choose another run_dir, undo the "
            "change, go on from its last checkpoint with --allow-change, or remove that run with "
            f"--overwrite; {'; '.join(changes)}"
        )
    return finished(folder.path, to_dict(recipe))


def refuse_folder(folder: RunFolder, request: Request, world_size: int) -> None:
    """ValueError, on every rank alike, where a run in this folder could cost somebody a file.
    Collective; changes nothing."""
    peers, text = Peers(world_size), ""
    if peers.rank == 0:
        try:
            run_folder.refuse(folder.path, resume=request.resume, overwrite=request.overwrite)
        except (ValueError, OSError) as error:
            text = str(error)
    # before anybody raises: a rank 0 that raised alone would leave the others in their next call
    text = peers.gather(text)[0]
    peers.close()
    if text:
        raise ValueError(text)


def take_folder(folder: RunFolder, recipe: Recipe, request: Request, job: Job) -> None:
    """Continues the folder, or makes it an empty one, by rank 0, whose lock this job holds.
    Collective."""
    refuse_folder(folder, request, job.world_size)  # again: it was without a lock before
    if job.rank == 0:
        private_dir(folder.path)
    refuse_unshared(folder.path, job.world_size)
    if job.rank != 0:
        return
    if request.overwrite and not request.resume:
        run_folder.empty(folder.path)
    # after empty(), which takes the old one away
    write_whole(folder.recipe, dump(recipe))
    # last: until now the folder said truly how its earlier process ended
    for marker in (folder.done, folder.requeue):
        remove_file(marker)
