"""The run on the server that a run folder belongs to: found by its id or its key, else made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tram_ds.runtime.locks import locked
from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tracking import group
from tram_ds.tracking.address import sqlite_path
from tram_ds.tracking.server import find_experiment, find_parent, get_run, new_client
from tram_ds.tracking.state import NOTE, PARENT, StateFile, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY_TAG = "tram_ds.run_key"
# spools -> the names of the fields of State that say how far the server has them
SPOOLS = {
    RunFolder.metrics: ("offset", "last_line"),
    RunFolder.system: ("system_offset", "system_last_line"),
}


def connect(file: StateFile) -> tuple[MlflowClient, Run]:
    """(a client, the folder's run), with the experiment and the parent run in place."""
    database = sqlite_path(file.state.uri)
    if database is None:
        client = new_client(file.state.uri)
        return client, _attach(client, file)
    # MLflow's own creation of a fresh database is not safe against a second process
    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.with_name(f".{database.name}.lock"), timeout=120.0):
        client = new_client(file.state.uri)
        return client, _attach(client, file)


def _attach(client: MlflowClient, file: StateFile) -> Run:
    """The run of this folder: by its id, else by its key, else a new one."""
    state = file.state
    run = get_run(client, state.run_id) if state.run_id else None
    if run is None:
        experiment_id = find_experiment(
            client, state.experiment, sqlite_path(state.uri), state.experiment_by_id
        )
        same_key = client.search_runs(
            [experiment_id], f"tags.`{KEY_TAG}` = '{state.run_key}'", max_results=1
        )
        if same_key:
            run = same_key[0]
        else:
            parent_id = find_parent(client, experiment_id, state, group.note(state))
            tags = {KEY_TAG: state.run_key, PARENT: parent_id}
            tags |= {NOTE: state.note} if state.note else {}
            run = client.create_run(experiment_id, state.started, tags, state.run_name)
        nothing = {
            field: fresh
            for fields in SPOOLS.values()
            for field, fresh in zip(fields, (0, ""), strict=True)
        }
        file.update(run_id=run.info.run_id, acknowledged={}, **nothing)
    if state.experiment_id != run.info.experiment_id:
        file.update(experiment_id=run.info.experiment_id)
    refuse_deleted(run, file)
    if state.status is None and run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")
    return run


def refuse_deleted(run: Run, file: StateFile) -> None:
    """TrackingError, with the ways out, for a run that somebody deleted."""
    if run.info.lifecycle_stage == "deleted":
        raise TrackingError(
            f"run {run.info.run_id} was deleted on {redact(file.state.uri)}: restore it in MLflow "
            "(what it lacks is sent then, or by launch/sync.py), or remove run_id and "
            f"tracking.json from {file.run_dir} to upload it as a new run"
        )
