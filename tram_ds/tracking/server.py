"""What a run needs on the MLflow side: the environment, the client, the experiment, the parent
run."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tram_ds.runtime.files import remove_empty
from tram_ds.runtime.redact import redact
from tram_ds.tracking.address import sqlite_path
from tram_ds.tracking.points import digest
from tram_ds.tracking.state import LEFT_TAG, NOTE, State, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

PARENT_TAG = "tram_ds.group"


def prepare_environment() -> None:
    """Telemetry off; one short attempt per request (the uploader retries by itself). Call before
    importing mlflow."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    # MLflow's own retries would hold a request for minutes, and the end of a run with it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "30")


def new_client(uri: str) -> MlflowClient:
    """A client that depends on no global MLflow setting. For sqlite this creates the database: hold
    its lock."""
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    missing = _missing_folders(uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    for folder in missing:
        with contextlib.suppress(OSError):
            remove_empty(folder)
    return client


def _missing_folders(uri: str) -> list[Path]:
    """What MLflow makes for a quoted path, whose folder it takes as it is written; innermost
    first."""
    database = sqlite_path(uri)
    if database is None or uri == f"sqlite:///{database}":
        return []
    written = Path(uri.removeprefix("sqlite:///"))
    return [folder for folder in written.parents if not folder.exists()]


def get_run(client: MlflowClient, run_id: str) -> Run | None:
    """The run, or None where this server does not know it (another server, or a database that began
    anew)."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


# MLflow 3 shows its page for language-model traces, empty, to an experiment of no kind
OF_TRAINING = {"mlflow.experimentKind": "custom_model_development"}


def find_experiment(
    client: MlflowClient, name: str, database: Path | None, by_id: bool = False
) -> str:
    """The id of the experiment, created if new; with a sqlite database its artifacts go to
    `mlartifacts` beside it. by_id: `name` is its number, and it must be there."""
    from mlflow.exceptions import MlflowException

    experiment = _experiment(client, name) if by_id else client.get_experiment_by_name(name)
    if by_id and experiment is None:
        raise TrackingError(
            f"there is no MLflow experiment {name} (MLFLOW_EXPERIMENT_ID): set tracking.experiment "
            "to a name, or correct the variable"
        )
    if experiment is None:
        location = (
            None if database is None else (database.resolve().parent / "mlartifacts").as_uri()
        )
        try:
            return client.create_experiment(name, artifact_location=location, tags=OF_TRAINING)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {redact(name)!r} was deleted: restore it (`mlflow experiments "
            "restore`) "
            f"or set tracking.experiment to another name"
        )
    return experiment.experiment_id


def _experiment(client: MlflowClient, number: str) -> Experiment | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_experiment(number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def mark_left(client: MlflowClient, left: str, taken_over_by: str) -> None:
    """Says of a run that another went back and took another way: it has ended, and what it holds
    beyond that point is nobody's result. All of it stays. Nothing where the server lacks it."""
    run = get_run(client, left)
    if run is None or run.info.lifecycle_stage == "deleted":
        return
    client.set_tag(left, LEFT_TAG, taken_over_by)
    if run.info.status == "RUNNING":
        client.set_terminated(left, "KILLED")


def find_parent(client: MlflowClient, experiment_id: str, state: State, note: str) -> str:
    """The id of the run above all seeds of this name, these shared parameters and this data. Of
    several processes that create it at once all take the oldest."""
    name = state.parent_name
    # seeds of other data have a mean of their own
    shared = state.shared | {"data_digest": state.tags.get("data_digest", "")}
    told = f"{name}-{digest(shared)}" if state.shared else name
    group = told.replace("'", "_").replace("\\", "_")

    def oldest() -> str | None:
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = client.search_runs(
            [experiment_id], f"tags.`{PARENT_TAG}` = '{group}'", max_results=1, order_by=order
        )
        return found[0].info.run_id if found else None

    if (known := oldest()) is not None:
        return known
    tags = {PARENT_TAG: group, NOTE: note}
    mine = client.create_run(experiment_id, state.started, tags, name).info.run_id
    client.set_terminated(mine, "FINISHED")  # it does no work of its own
    # looked at again after creating: of two processes at once both now see both, and agree
    chosen = oldest() or mine
    if chosen != mine:
        client.delete_run(mine)
    return chosen


def runs_page(uri: str, experiment_id: str | None) -> str:
    """Where the runs are looked at: the page of the experiment's table, which MLflow 3 does not
    open by itself; for a database also what serves it."""
    shown = redact(uri)
    if uri.startswith("databricks"):  # its pages are those of a workspace, which serves itself
        return f"{shown}, experiment {experiment_id}" if experiment_id else shown
    server = uri.startswith(("http://", "https://"))
    serve = "" if server else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
    if experiment_id is None:
        return shown if server else f"{shown}  ({serve})"
    page = f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return f"{shown.rstrip('/')}{page}" if server else f"{serve}, then http://127.0.0.1:5000{page}"
