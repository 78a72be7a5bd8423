"""Replays a run folder to MLflow, exactly once per metric and step. Never on the training thread.

What makes it idempotent: points carry the time and step saved in metrics.jsonl (MLflow drops
identical ones); the byte offset moves only after the server answered; and per metric only steps
beyond the last one the server has are sent, so a step that is computed again after a requeue keeps
its first value and appears once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tracking import group
from tram_ds.tracking.attach import SPOOLS, connect, refuse_deleted
from tram_ds.tracking.description import describe, run_id_of, send_dataset
from tram_ds.tracking.points import (
    MAX_METRICS,
    Point,
    digest,
    line_digest_before,
    read_batches,
)
from tram_ds.tracking.results import cost_points, curves, final_points, samples_text, table_json
from tram_ds.tracking.server import mark_left
from tram_ds.tracking.state import PARENT, StateFile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)
TABLE, CURVES, SAMPLES = "results_table.json", "curves.png", "samples.md"


class Uploader:
    """Brings one run on the server up to date with its folder. `push` raises whatever went wrong;
    call it again later.

    sent: metric points acknowledged. skipped: points of steps the server already had. rejected:
    names of metrics the server refuses. All of this object.
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
        """Sends what the server does not have yet: description, metrics, artifacts, status, in this
        order."""
        try:
            self._push(self._client or self._connect())
        except Exception:
            # who knows what the server is the next time: the same, restored from a copy, another
            self._client = None
            raise

    def _push(self, client: MlflowClient) -> None:
        describe(client, self._file, self._server_params)
        self._mark_left(client)
        send_dataset(client, self._file)
        for name in SPOOLS:
            self._replay(client, name)
        self._send_final(client)
        self._send_artifacts(client)
        self._send_curves(client)
        self._conclude(client)
        self._summarise(client)

    def repair(self) -> None:
        """After a push: sends again what the server acknowledged and does not have, point by point.

        A server that was restored from a copy lacks some, and so does a run that was deleted for a
        while under a version of this program that took its refusals for bad points.
        """
        client, run_id = self._client or self._connect(), run_id_of(self._file.state)
        points = [p for name in SPOOLS for p in self._all(name)]
        have = {
            key: {metric.step for metric in client.get_metric_history(run_id, key)}
            for key in dict.fromkeys(point[0] for point in points)
        }
        lacking = [p for p in points if p[1] not in have[p[0]] and p[0] not in self.rejected]
        for start in range(0, len(lacking), MAX_METRICS):
            self._send_metrics(client, lacking[start : start + MAX_METRICS])

    def _all(self, name: str) -> Iterator[Point]:
        path = self._file.run_dir / name
        for _, _, points in read_batches(path, 0) if path.exists() else ():
            yield from points

    def complete(self) -> bool:
        """Has the server acknowledged all that the folder holds?"""
        state = self._file.state
        wanted = {
            "params": digest(state.params),
            "tags": digest(state.tags),
            "status": state.status or "",
            "group": self._told_group(),
        }
        wanted |= {name: digest(text) for name, text in self._artifacts().items()}
        wanted |= {"dataset": digest(state.dataset)} if state.dataset else {}
        wanted |= {"left": state.left} if state.left else {}
        wanted |= {"final": digest(state.results)} if self._final() else {}
        wanted |= {CURVES: str(state.offset)} if self._final() else {}
        described = all(state.acknowledged.get(what, "") == text for what, text in wanted.items())
        return described and all(
            getattr(state, fields[0]) >= self._size(name) for name, fields in SPOOLS.items()
        )

    def _size(self, name: str) -> int:
        path = self._file.run_dir / name
        return path.stat().st_size if path.exists() else 0

    def _connect(self) -> MlflowClient:
        """The client, with the experiment, the parent run and the run in place."""
        client, run = connect(self._file)
        self._last_step = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._server_params = run.data.params
        self._client = client
        return client

    def _mark_left(self, client: MlflowClient) -> None:
        state = self._file.state
        if state.left and state.acknowledged.get("left") != state.left:
            mark_left(client, state.left, run_id_of(state))
            self._file.acknowledge("left", state.left)

    def _replay(self, client: MlflowClient, name: str) -> None:
        """The lines of a spool after the acknowledged offset."""
        path = self._file.run_dir / name
        if not path.exists():
            return
        state, (offset_field, line_field) = self._file.state, SPOOLS[name]
        offset = getattr(state, offset_field)
        # else it was cut at a resume: from its beginning, and steps the server has are left out
        same_file = line_digest_before(path, offset) == getattr(state, line_field)
        for end, last_line, points in read_batches(path, offset if same_file else 0):
            fresh = [point for point in points if point[1] > self._last_step.get(point[0], -1)]
            self.skipped += len(points) - len(fresh)
            for start in range(0, len(fresh), MAX_METRICS):
                self._send_metrics(client, fresh[start : start + MAX_METRICS])
            # after the server's answer: a crash before it sends the batch again, harmlessly
            self._file.update(**{offset_field: end, line_field: last_line})

    def _send_metrics(self, client: MlflowClient, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        run_id = run_id_of(self._file.state)
        metrics = [Metric(key, value, timestamp, step) for key, step, value, timestamp in points]
        try:
            client.log_batch(run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            refuse_deleted(client.get_run(run_id), self._file)  # it refuses all points, none is bad
            # one bad point must not hold up all others for ever
            self._send_singly(client, run_id, metrics)
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
        artifacts = {RunFolder.recipe: state.recipe_yaml} if state.recipe_yaml else {}
        if state.results is not None:
            artifacts[RunFolder.results] = (
                json.dumps(state.results, indent=2, allow_nan=False) + "\n"
            )
        if self._final():
            artifacts[TABLE] = table_json(state.results or {})
        if text := samples_text(state.results or {}):
            artifacts[SAMPLES] = text
        return artifacts

    def _final(self) -> bool:
        """Whether there are the scores of a finished training."""
        return "scores" in (self._file.state.results or {})

    def _send_final(self, client: MlflowClient) -> None:
        """The final scores as metrics, which MLflow's compare page shows. Identical points are
        stored once."""
        state = self._file.state
        if self._final() and state.acknowledged.get("final") != digest(state.results):
            results, time = state.results or {}, state.results_time
            points = final_points(results, time)
            points += cost_points(results, time, self._file.run_dir, state.tags)
            for start in range(0, len(points), MAX_METRICS):
                self._send_metrics(client, points[start : start + MAX_METRICS])
            self._file.acknowledge("final", digest(state.results))

    def _send_curves(self, client: MlflowClient) -> None:
        """The training curves as a picture, when the training is over."""
        state = self._file.state
        if self._final() and state.acknowledged.get(CURVES) != str(state.offset):
            figure = curves(self._file.run_dir)
            if figure is not None:
                client.log_figure(run_id_of(state), figure, CURVES)
            self._file.acknowledge(CURVES, str(state.offset))

    def _send_artifacts(self, client: MlflowClient) -> None:
        for name, text in self._artifacts().items():
            if self._file.state.acknowledged.get(name) != digest(text):
                client.log_text(run_id_of(self._file.state), text, name)
                self._file.acknowledge(name, digest(text))

    def _conclude(self, client: MlflowClient) -> None:
        state = self._file.state
        scored = not self._final() or state.acknowledged.get("final") == digest(state.results)
        # a seed that is over has its scores: its parent's mean counts on it
        if scored and state.status and state.acknowledged.get("status") != state.status:
            client.set_terminated(run_id_of(state), state.status, state.ended)
            self._file.acknowledge("status", state.status)

    def _told_group(self) -> str:
        """What of this run its parent shows: as far as the server has it."""
        state = self._file.state
        had = [state.acknowledged.get(what) for what in ("status", "final")]
        return digest([*had, state.shared, state.dataset])

    def _summarise(self, client: MlflowClient) -> None:
        """The parent, computed from all its children; after the status, which it looks at."""
        state, wanted = self._file.state, self._told_group()
        if state.acknowledged.get("group") != wanted:
            run = client.get_run(run_id_of(state))
            if PARENT in run.data.tags:
                group.refresh(client, run, state)
            self._file.acknowledge("group", wanted)
