"""Replays a run folder to MLflow, exactly once per metric and step. Never on the training thread.

What makes it idempotent: points carry the time and step saved in metrics.jsonl (MLflow drops identical ones); the
byte offset moves only after the server answered; and per metric only steps beyond the last one the server has are
sent, so a step that is computed again after a requeue keeps its first value and appears once.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tram_ds.metrics import FILE_NAME as METRICS_FILE
from tram_ds.metrics import decode
from tram_ds.redact import redact
from tram_ds.tracking_server import find_experiment, find_parent, get_run, new_client, sqlite_path
from tram_ds.tracking_state import MAX_KEY, StateFile, TrackingError, locked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger(__name__)
MAX_METRICS = 1000  # per log_batch call
MAX_PARAMS = 100
KEY_TAG = "tram_ds.run_key"
_NOT_METRICS = {"step", "time", "nonfinite"}


class Uploader:
    """Brings one run on the server up to date with its folder. `push` raises whatever went wrong; call it again later.

    sent: metric points acknowledged. skipped: points of steps the server already had. rejected: names of metrics the
    server refuses. All of this object.
    """

    def __init__(self, file: StateFile) -> None:
        self.sent = 0
        self.skipped = 0
        self.rejected: set[str] = set()
        self._file = file
        self._client: MlflowClient | None = None
        self._last_step: dict[str, int] = {}  # per metric, the last step the server has
        self._server_params: Mapping[str, str] = {}

    def push(self) -> None:
        """Sends what the server does not have yet: description, metrics, artifacts, status, in this order."""
        client = self._client or self._connect()
        self._describe(client)
        self._replay(client)
        self._send_artifacts(client)
        self._conclude(client)

    def complete(self) -> bool:
        """Has the server acknowledged all that the folder holds?"""
        state, path = self._file.state, self._file.run_dir / METRICS_FILE
        size = path.stat().st_size if path.exists() else 0
        wanted = {"params": _digest(state.params), "tags": _digest(state.tags), "status": state.status or ""}
        wanted |= {name: _digest(text) for name, text in self._artifacts().items()}
        return state.offset >= size and all(state.acknowledged.get(what, "") == text for what, text in wanted.items())

    def _connect(self) -> MlflowClient:
        """The client, with the experiment, the parent run and the run in place."""
        uri = self._file.state.uri
        database = sqlite_path(uri)
        if database is None:
            client = new_client(uri)
            run = self._attach(client)
        else:  # MLflow's own creation of a fresh database is not safe against a second process
            database.parent.mkdir(parents=True, exist_ok=True)
            with locked(database.with_name(f".{database.name}.lock"), timeout=120.0):
                client = new_client(uri)
                run = self._attach(client)
        self._last_step = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._server_params = run.data.params
        self._client = client
        return client

    def _attach(self, client: MlflowClient) -> Run:
        """The run of this folder: by its id, else by its key, else a new one."""
        state = self._file.state
        run = get_run(client, state.run_id) if state.run_id else None
        if run is None:
            experiment_id = find_experiment(client, state.experiment, sqlite_path(state.uri))
            same_key = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{state.run_key}'", max_results=1)
            if same_key:
                run = same_key[0]
            else:
                parent_id = find_parent(client, experiment_id, state.parent_name, state.started)
                tags = {KEY_TAG: state.run_key, "mlflow.parentRunId": parent_id}
                run = client.create_run(experiment_id, state.started, tags, state.run_name)
            self._file.update(run_id=run.info.run_id, offset=0, last_line="", acknowledged={})
        if run.info.lifecycle_stage == "deleted":
            raise TrackingError(
                f"run {state.run_id} was deleted on {redact(state.uri)}: restore it in MLflow, or remove run_id and "
                f"tracking.json from {self._file.run_dir} to upload it as a new run"
            )
        if state.status is None and run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _describe(self, client: MlflowClient) -> None:
        """Parameters and tags. A parameter that changed since the run began cannot be replaced: it becomes a tag."""
        from mlflow.entities import Param, RunTag

        state = self._file.state
        tags = dict(state.tags)
        if (digest := _digest(state.params)) != state.acknowledged.get("params"):
            params = {metric_name(key): value for key, value in state.params.items()}
            new = [Param(key, value) for key, value in params.items() if key not in self._server_params]
            for start in range(0, len(new), MAX_PARAMS):
                client.log_batch(_id(state.run_id), params=new[start : start + MAX_PARAMS], synchronous=True)
            changed = {key: value for key, value in params.items() if self._server_params.get(key, value) != value}
            tags |= {f"changed.{key}"[:MAX_KEY]: value for key, value in changed.items()}
            self._send_tags(client, [RunTag(key, value) for key, value in tags.items()])
            self._file.acknowledge("params", digest)
            self._file.acknowledge("tags", _digest(state.tags))
        elif (digest := _digest(state.tags)) != state.acknowledged.get("tags"):
            self._send_tags(client, [RunTag(key, value) for key, value in tags.items()])
            self._file.acknowledge("tags", digest)

    def _send_tags(self, client: MlflowClient, tags: Sequence[Any]) -> None:
        for start in range(0, len(tags), MAX_PARAMS):
            client.log_batch(_id(self._file.state.run_id), tags=tags[start : start + MAX_PARAMS], synchronous=True)

    def _replay(self, client: MlflowClient) -> None:
        """The lines of metrics.jsonl after the acknowledged offset."""
        path = self._file.run_dir / METRICS_FILE
        if not path.exists():
            return
        state = self._file.state
        same_file = line_digest_before(path, state.offset) == state.last_line
        for end, last_line, points in read_batches(path, state.offset if same_file else 0):
            fresh = [point for point in points if point[1] > self._last_step.get(point[0], -1)]
            self.skipped += len(points) - len(fresh)
            for start in range(0, len(fresh), MAX_METRICS):
                self._send_metrics(client, fresh[start : start + MAX_METRICS])
            self._file.update(offset=end, last_line=last_line)

    def _send_metrics(self, client: MlflowClient, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        run_id = _id(self._file.state.run_id)
        metrics = [Metric(key, value, timestamp, step) for key, step, value, timestamp in points]
        try:
            client.log_batch(run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self._send_singly(client, run_id, metrics)  # one bad point must not hold up all others for ever
        for key, step, _, _ in points:
            self._last_step[key] = max(step, self._last_step.get(key, -1))
        self.sent += len(points)

    def _send_singly(self, client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
        from mlflow.exceptions import MlflowException

        for metric in metrics:
            try:
                client.log_batch(run_id, metrics=[metric], synchronous=True)
            except MlflowException as error:
                if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                    raise
                self.sent -= 1
                if metric.key not in self.rejected:
                    log.warning("MLflow refuses the metric %s: %s", metric.key, redact(str(error)))
                self.rejected.add(metric.key)

    def _artifacts(self) -> dict[str, str]:
        state = self._file.state
        artifacts = {"recipe.yaml": state.recipe_yaml} if state.recipe_yaml else {}
        if state.results is not None:
            artifacts["results.json"] = json.dumps(state.results, indent=2, allow_nan=False) + "\n"
        return artifacts

    def _send_artifacts(self, client: MlflowClient) -> None:
        for name, text in self._artifacts().items():
            if self._file.state.acknowledged.get(name) != _digest(text):
                client.log_text(_id(self._file.state.run_id), text, name)
                self._file.acknowledge(name, _digest(text))

    def _conclude(self, client: MlflowClient) -> None:
        state = self._file.state
        if state.status and state.acknowledged.get("status") != state.status:
            client.set_terminated(_id(state.run_id), state.status, state.ended)
            self._file.acknowledge("status", state.status)


Point = tuple[str, int, float, int]  # metric, step, value, unix milliseconds


def read_batches(path: Path, offset: int) -> Iterator[tuple[int, str, list[Point]]]:
    """(offset after it, digest of its last line, points) of batches of whole lines with about MAX_METRICS points."""
    points: list[Point] = []
    end, last_line = offset, ""
    with path.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # still being written
            record = decode(line.decode("utf-8", "replace"))
            new = points_of(record) if record else []
            if points and len(points) + len(new) > MAX_METRICS:
                yield end, last_line, points
                points = []
            points.extend(new)
            end, last_line = end + len(line), _digest(line)
    if end > offset:
        yield end, last_line, points


def points_of(record: Mapping[str, Any]) -> list[Point]:
    """The numbers of a record; nested ones as `outer/inner`; non-finite ones as counts, `nonfinite/<name>`."""
    step, timestamp = record.get("step"), record.get("time", 0)
    if not isinstance(step, int) or not isinstance(timestamp, int | float):
        return []
    values = {key: value for key, value in record.items() if key not in _NOT_METRICS}
    values |= {f"nonfinite/{str(key).replace('.', '/')}": 1 for key in record.get("nonfinite") or []}
    return [(metric_name(key), step, value, int(timestamp * 1000)) for key, value in _numbers(values)]


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float):
            yield key, float(value)


def metric_name(name: str) -> str:
    """The nearest name MLflow accepts: letters, digits, `_ - . : /` and spaces, and no path tricks."""
    parts = [part for part in re.sub(r"[^\w\-. :/]", "_", name).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY] or "_"


def line_digest_before(path: Path, offset: int, reach: int = 1 << 16) -> str:
    """Digest of the line that ends at `offset`; "" at 0, "?" where no line ends there."""
    if offset == 0:
        return ""
    with path.open("rb") as file:
        file.seek(max(0, offset - reach))
        data = file.read(min(offset, reach))
        whole = file.tell() == offset and data.endswith(b"\n")
    return _digest(data[data.rfind(b"\n", 0, -1) + 1 :]) if whole else "?"


def _digest(content: Any) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return f"{zlib.crc32(data):08x}"


def _id(run_id: str | None) -> str:
    assert run_id is not None, "attached before anything is sent"
    return run_id
