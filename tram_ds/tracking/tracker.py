"""Tracking to MLflow, local first: the run folder is the record, MLflow gets a copy of it.

The training thread never talks to MLflow. It appends to metrics.jsonl (metrics.MetricsLog); a
daemon thread tails that file and replays it. So a server that is down, hangs or fails costs the
training nothing, and `sync` (or launch/sync.py) uploads later whatever is missing, without
duplicates.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from tram_ds.runtime.git import DIRTY
from tram_ds.runtime.jsonl import strict
from tram_ds.runtime.locks import locked
from tram_ds.runtime.redact import HIDDEN, redact
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tracking import state as tracking_state
from tram_ds.tracking.address import URI, absolute
from tram_ds.tracking.machine import SystemMetrics
from tram_ds.tracking.server import prepare_environment, runs_page
from tram_ds.tracking.state import Identity, StateFile, now
from tram_ds.tracking.upload import TABLE, Uploader

Status = Literal["FINISHED", "KILLED", "FAILED"]
log = logging.getLogger(__name__)

LAST_ATTEMPTS = 3  # after finish(), before the rest is left to sync


class Tracker(Protocol):
    """What the training loop needs of tracking. No method raises; only finish waits, up to its
    timeout."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None while the server has not been reached yet, and without
        tracking."""
        ...

    @property
    def page(self) -> str | None:
        """Where the run is looked at: an address, or the command that serves it; None without
        tracking."""
        ...

    def log_results(self, results: Mapping[str, Any]) -> None:
        """The final evaluation: results.json and, of evaluation.evaluator, a table and metrics
        `final/<split>/<domain>/<metric>`."""
        ...

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Adds tags, e.g. {"export": path}: an exported model is tracked as a pointer, never
        uploaded."""
        ...

    def finish(self, status: Status, timeout: float = 60.0) -> bool:
        """Ends the run with its truthful status. Close the MetricsLog first. False if something is
        left for sync."""
        ...


class NullTracker:
    """Tracks nothing: for all ranks but 0, and when tracking is off."""

    run_id: str | None = None
    page: str | None = None

    def log_results(self, results: Mapping[str, Any]) -> None:
        """Does nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Does nothing."""

    def finish(self, status: Status, timeout: float = 60.0) -> bool:
        """Does nothing."""
        return True


class MlflowTracker:
    """The Tracker of rank 0; see the module. Made by `start`.

    Threads: the caller's, which only writes small local files; a daemon thread, the only one to
    touch MLflow; and, if asked for, one that samples the machine.
    """

    def __init__(
        self,
        file: StateFile,
        every_seconds: float = 5.0,
        longest_pause: float = 60.0,
        system: SystemMetrics | None = None,
    ) -> None:
        self._file = file
        self._system = system
        self._every_seconds = every_seconds
        self._longest_pause = longest_pause
        self._failing = False
        self._complete = False
        self._finishing = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-upload", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """See Tracker."""
        return self._file.state.run_id

    @property
    def page(self) -> str | None:
        """See Tracker."""
        return runs_page(self._file.state.uri, self._file.state.experiment_id)

    def log_results(self, results: Mapping[str, Any]) -> None:
        """See Tracker. Non-finite numbers are stored as null and listed under `nonfinite`."""
        nonfinite: list[str] = []
        clean = strict(dict(results), nonfinite)
        changes: dict[str, Any] = {
            "results": redact(clean | ({"nonfinite": nonfinite} if nonfinite else {}))
        }
        if "scores" in clean:  # this tag makes MLflow's pages show the file as a table
            table = {"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])}
            changes["tags"] = self._file.state.tags | table
        self._write(results_time=now(), **changes)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """See Tracker."""
        self._write(tags=self._file.state.tags | tracking_state.clean_tags(tags))

    def finish(self, status: Status, timeout: float = 60.0) -> bool:
        """See Tracker. A second call changes nothing."""
        if not self._finishing.is_set():
            if self._system is not None:
                self._system.stop()
            self._write(status=status, ended=now())
            self._finishing.set()
            self._thread.join(timeout)
            self._stop.set()
            if not self._complete:
                log.warning(
                    "tracking is incomplete; later: python launch/sync.py %s", self._file.run_dir
                )
        return self._complete

    def _write(self, **changes: Any) -> None:
        try:
            self._file.update(**changes)
        except OSError as error:  # tracking never stops a training
            log.warning("cannot write %s/tracking.json: %s", self._file.run_dir, error)

    def _work(self) -> None:
        """Uploads every few seconds until finished; after a failure waits longer and longer, up to
        a minute."""
        uploader, failures, last_attempts = Uploader(self._file), 0, 0
        while not self._stop.is_set():
            finishing = self._finishing.is_set()
            try:
                # two uploaders of one folder would send points twice: whoever comes second waits
                with locked(RunFolder(self._file.run_dir).tracking_lock, timeout=0.0):
                    uploader.push()
                    self._complete = finishing and uploader.complete()
                failures = 0
                self._report(None)
            except Exception as error:
                # whatever MLflow, a server or a database does must not stop the training
                failures += 1
                self._report(error)
            last_attempts += finishing
            if self._complete or last_attempts >= LAST_ATTEMPTS:
                return
            if finishing:
                self._stop.wait(1.0)
            else:
                pause = self._every_seconds * 2 ** min(failures, 10)
                self._finishing.wait(min(pause, max(self._longest_pause, self._every_seconds)))

    def _report(self, error: Exception | None) -> None:
        """One line when tracking begins to fail and one when it works again."""
        if error is not None and not self._failing:
            log.warning(
                "MLflow at %s cannot be reached or used; training goes on, metrics.jsonl keeps "
                "everything: %s",
                redact(self._file.state.uri),
                redact(f"{type(error).__name__}: {error}")[:500],
            )
        elif error is None and self._failing:
            log.warning("MLflow at %s works again", redact(self._file.state.uri))
        self._failing = error is not None


def start(
    run_dir: str | Path,
    run: Identity,
    every_seconds: float = 5.0,
    system_seconds: float | None = None,
    went_back: bool = False,
) -> MlflowTracker:
    """Starts or, in a run folder that was tracked before, continues the MLflow run. Rank 0 only;
    never waits.

    On resume call MetricsLog.truncate_after first. every_seconds: between two uploads.
    system_seconds: between two samples of the machine; None = no system metrics. went_back: see
    state.begin.
    """
    prepare_environment()
    if commit := run.tags.get("git_commit"):
        source = {"mlflow.source.git.commit": str(commit).removesuffix(DIRTY)}
        run = replace(run, tags={**run.tags, **source})
    file = tracking_state.begin(Path(run_dir), run, went_back)
    system = SystemMetrics(run_dir, system_seconds) if system_seconds else None
    return MlflowTracker(file, every_seconds, system=system)


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did. sent: metric points acknowledged; skipped: points whose step the server
    already had."""

    run_id: str | None
    sent: int
    skipped: int
    rejected: tuple[str, ...]  # metrics the server refuses by name or value
    complete: bool
    error: str | None = None


def sync(run_dir: str | Path, uri: str | None = None, wait: float = 15.0) -> SyncReport:
    """Uploads what MLflow does not have of a run folder yet; running it again does no harm.

    A run whose process ended without a word (kill -9, power) becomes KILLED. Raises ValueError for
    a folder that was never tracked, or when the address must be given because the saved one lacks
    its password; TimeoutError while a live training uploads the folder. Whatever the server does
    wrong is in the report.
    """
    prepare_environment()
    run_dir = Path(run_dir)
    state = tracking_state.load(run_dir)
    if state is None:
        raise ValueError(
            f"{run_dir} has no readable tracking.json: not a run folder that was tracked"
        )
    address = _address(state.uri, uri)
    with locked(RunFolder(run_dir).tracking_lock, wait):
        file = StateFile(run_dir, state)
        file.update(uri=address, status=state.status or "KILLED", ended=state.ended or now())
        uploader, error = Uploader(file), None
        try:
            uploader.push()
            uploader.repair()
        except Exception as caught:
            # reported, not raised: the caller gets one answer for every kind of failure
            error = redact(f"{type(caught).__name__}: {caught}")
        complete = error is None and uploader.complete()
    return SyncReport(
        file.state.run_id,
        uploader.sent,
        uploader.skipped,
        tuple(sorted(uploader.rejected)),
        complete,
        error,
    )


def _address(saved: str, given: str | None) -> str:
    if given:
        return absolute(given)
    if HIDDEN not in saved:
        return saved
    ours = os.environ.get(URI, "")
    # the saved address has no password; the environment's may be the same address with it
    if redact(ours) == saved:
        return absolute(ours)
    raise ValueError(
        f"the address {saved} was saved without its password: give it with --uri, or set {URI} to "
        "it"
    )
