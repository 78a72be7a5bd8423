"""The parent run of a method's seeds: what they share, and mean, deviation and number of their
final scores.

All of it is computed from the seeds' runs each time one begins or ends, so nothing depends on which
job came first. A point's step is how many seeds have ended and its time when the last one did: of
two jobs that write at once MLflow shows what the one wrote that saw more, and the same seeds give
the same points, which it keeps once.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tram_ds.tracking.points import MAX_METRICS, metric_name
from tram_ds.tracking.state import LEFT_TAG, MAX_TAG, PARENT, State

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SUMMARISED = ("final/", "cost/")  # the metrics of a finished seed that its parent sums up
TOLD = ("recipe", "algorithm", "task", "engine", "device", "world_size", "data_digest")
RUNNING = ("RUNNING", "SCHEDULED")
MAX_PARAMS = 100


def note(state: State) -> str:
    """The parent's description, written when it is made: people may edit it afterwards."""
    return (
        f"**{state.parent_name}**: a run for every seed below it. `final/...` and `cost/...` are "
        "means over the seeds that finished, `final_std/...` their standard deviation, "
        "`final_n/...` their number.\n\nThe table and the report: "
        f"`tram compare --experiment {state.experiment} --report report --log`"
    )


def refresh(client: MlflowClient, child: Run, state: State) -> None:
    """Brings the parent of this run up to date with all its children."""
    parent = client.get_run(child.data.tags[PARENT])
    if parent.info.lifecycle_stage == "deleted":
        return
    children = _children(client, parent)
    _describe(client, parent, children, state)
    # of one seed the deviation is no number; that takes the place of one of seeds that are gone
    known = parent.data.metrics
    points = [p for p in summary(children) if math.isfinite(p.value) or p.key in known]
    for start in range(0, len(points), MAX_METRICS):
        client.log_batch(
            parent.info.run_id, metrics=points[start : start + MAX_METRICS], synchronous=True
        )


def _children(client: MlflowClient, parent: Run) -> list[Run]:
    """All runs of the group, deleted ones too."""
    from mlflow.entities import ViewType

    found, token = [], None
    while True:
        page = client.search_runs(
            [parent.info.experiment_id],
            f"tags.`{PARENT}` = '{parent.info.run_id}'",
            run_view_type=ViewType.ALL,
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            return found


def _describe(client: MlflowClient, parent: Run, children: Sequence[Run], state: State) -> None:
    """The parameters and the data that the seeds share; tags with every value they have."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    run_id, there = parent.info.run_id, parent.data.params
    shared = {metric_name(key): value for key, value in state.shared.items()}
    new = [Param(key, value) for key, value in shared.items() if key not in there]
    for start in range(0, len(new), MAX_PARAMS):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS], synchronous=True)
    if state.dataset and not (parent.inputs and parent.inputs.dataset_inputs):
        tag = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, [DatasetInput(Dataset(**state.dataset), [tag])])
    active = [run for run in children if not _gone(run)]
    values = {key: {run.data.tags[key] for run in active if key in run.data.tags} for key in TOLD}
    values["seeds"] = {run.data.params["train.seed"] for run in active if _seeded(run)}
    tags = {key: ", ".join(sorted(found, key=_place))[:MAX_TAG] for key, found in values.items()}
    changed = [
        RunTag(key, text)
        for key, text in tags.items()
        if text and parent.data.tags.get(key) != text
    ]
    if changed:
        client.log_batch(run_id, tags=changed, synchronous=True)


def _seeded(run: Run) -> bool:
    return "train.seed" in run.data.params


def _place(text: str) -> tuple[bool, float, str]:
    """Numbers by value, before words."""
    return (False, float(text), text) if text.isdecimal() else (True, 0.0, text)


def summary(children: Sequence[Run]) -> list[Any]:
    """Mean, standard deviation and number of every final metric over the seeds: of a seed that was
    run twice, the run that finished last. MLflow metrics of the parent."""
    from mlflow.entities import Metric

    ended = [run for run in children if run.info.status not in RUNNING]
    gone = [run for run in children if _gone(run)]
    # a run that is deleted or left is news as well as one more that ended
    step = len(ended) + len(gone)
    time = max((run.info.end_time or run.info.start_time for run in ended), default=0)
    newest: dict[str, Run] = {}
    for run in sorted(ended, key=lambda run: (run.info.end_time or 0, run.info.run_id)):
        if run.info.status == "FINISHED" and not _gone(run):
            newest[run.data.params.get("train.seed", run.info.run_id)] = run
    values: dict[str, list[float]] = defaultdict(list)
    for run in newest.values():
        for key, value in run.data.metrics.items():
            if key.startswith(SUMMARISED):
                values[key].append(value)
    return [
        Metric(key, value, time, step)
        for name, of_seeds in values.items()
        for key, value in _of_seeds(name, of_seeds).items()
    ]


def _gone(run: Run) -> bool:
    """Deleted, or the way of a run that went back and took another."""
    return run.info.lifecycle_stage == "deleted" or LEFT_TAG in run.data.tags


def _of_seeds(name: str, values: Sequence[float]) -> Mapping[str, float]:
    kind, _, rest = name.partition("/")
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return {
        name: statistics.fmean(values),
        f"{kind}_std/{rest}": spread,
        f"{kind}_n/{rest}": len(values),
    }
