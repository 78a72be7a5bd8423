"""What a run on the server says of itself beside its points: parameters, tags, its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tram_ds.tracking import group
from tram_ds.tracking.points import digest, metric_name
from tram_ds.tracking.state import MAX_KEY, State, StateFile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunTag


def run_id_of(state: State) -> str:
    """The run's id on the server."""
    assert state.run_id is not None, "attached before anything is sent"
    return state.run_id


def describe(client: MlflowClient, file: StateFile, there: Mapping[str, str]) -> None:
    """Parameters and tags. there: the parameters that the server has. One that changed since the
    run began cannot be replaced: it becomes a tag."""
    from mlflow.entities import Param, RunTag

    state = file.state
    tags = dict(state.tags)
    if (wanted := digest(state.params)) != state.acknowledged.get("params"):
        params = {metric_name(key): value for key, value in state.params.items()}
        new = [Param(key, value) for key, value in params.items() if key not in there]
        for start in range(0, len(new), group.MAX_PARAMS):
            client.log_batch(
                run_id_of(state),
                params=new[start : start + group.MAX_PARAMS],
                synchronous=True,
            )
        changed = {key: value for key, value in params.items() if there.get(key, value) != value}
        tags |= {f"changed.{key}"[:MAX_KEY]: value for key, value in changed.items()}
        _send_tags(client, run_id_of(state), [RunTag(key, value) for key, value in tags.items()])
        file.acknowledge("params", wanted)
        file.acknowledge("tags", digest(state.tags))
    elif (wanted := digest(state.tags)) != state.acknowledged.get("tags"):
        _send_tags(client, run_id_of(state), [RunTag(key, value) for key, value in tags.items()])
        file.acknowledge("tags", wanted)


def _send_tags(client: MlflowClient, run_id: str, tags: Sequence[RunTag]) -> None:
    for start in range(0, len(tags), group.MAX_PARAMS):
        some = tags[start : start + group.MAX_PARAMS]
        client.log_batch(run_id, tags=some, synchronous=True)


def send_dataset(client: MlflowClient, file: StateFile) -> None:
    """The data of the run as an MLflow dataset; sent again, the server keeps one."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    state = file.state
    if state.dataset and state.acknowledged.get("dataset") != digest(state.dataset):
        tag = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id_of(state), [DatasetInput(Dataset(**state.dataset), [tag])])
        file.acknowledge("dataset", digest(state.dataset))
