"""tracking.json: what has to be uploaded for a run folder, and how much of it the server has
acknowledged."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tram_ds.runtime.files import private_dir, write_whole
from tram_ds.runtime.redact import redact, redact_yaml
from tram_ds.runtime.run_layout import RunFolder

MAX_PARAM = 6000  # characters MLflow stores of a parameter
MAX_TAG = 8000  # of a tag
MAX_KEY = 250  # of any key
# MLflow's own: the run above another, and the description that its page shows
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"
# of a run that went back and took another way: the run of the way it left, and of that: this one
CONTINUES_TAG, LEFT_TAG = "tram_ds.continues", "tram_ds.left_for"


class TrackingError(RuntimeError):
    """Tracking cannot go on as things are; the message names the thing and the way out."""


@dataclass(frozen=True)
class State:
    """The content of tracking.json; nothing in the file is secret. Times are unix milliseconds."""

    uri: str
    experiment: str
    run_name: str
    parent_name: str
    experiment_by_id: bool = False  # `experiment` is the number of one that exists
    params: dict[str, str] = field(default_factory=dict[str, str])
    shared: dict[str, str] = field(default_factory=dict[str, str])  # those of all seeds
    note: str = ""  # the description of the run when it is created
    tags: dict[str, str] = field(default_factory=dict[str, str])
    recipe_yaml: str = ""
    dataset: dict[str, str] | None = None  # the fields of an MLflow dataset
    results: dict[str, Any] | None = None
    results_time: int = 0
    status: str | None = None  # FINISHED, KILLED or FAILED; None while the run is going
    started: int = 0
    ended: int | None = None
    run_key: str = ""  # a tag of the run: finds it again when the reply to its creation was lost
    run_id: str | None = None
    left: str | None = None  # the run of a way that was left for this one
    experiment_id: str | None = None
    offset: int = 0  # bytes of metrics.jsonl the server has
    # digest of the line that ends at `offset`: tells whether the file is still the same
    last_line: str = ""
    system_offset: int = 0  # the same for system.jsonl
    system_last_line: str = ""
    # what -> digest of what the server has
    acknowledged: dict[str, str] = field(default_factory=dict[str, str])


class StateFile:
    """The state of one run folder, written through on every change. Safe to use from two
    threads."""

    def __init__(self, run_dir: Path, state: State) -> None:
        self.run_dir = run_dir
        self.state = state
        self._lock = threading.Lock()

    def update(self, **changes: Any) -> None:
        """Changes fields and writes the file. Values are replaced whole, so readers need no
        lock."""
        with self._lock:
            self.state = replace(self.state, **changes)
            # in memory the address keeps its password, on disk it has none
            saved = asdict(self.state) | {"uri": redact(self.state.uri)}
            write_whole(
                RunFolder(self.run_dir).tracking,
                json.dumps(saved, indent=1, allow_nan=False) + "\n",
            )
            # beside tracking.json, for people and scripts, and should that be lost
            if "run_id" in changes and self.state.run_id:
                write_whole(RunFolder(self.run_dir).run_id, self.state.run_id + "\n")

    def acknowledge(self, what: str, content: str) -> None:
        """Remembers that the server has this content."""
        self.update(acknowledged=self.state.acknowledged | {what: content})


def load(run_dir: Path) -> State | None:
    """The saved state, or None where the folder has none or an unreadable one (everything is then
    sent again)."""
    try:
        saved = json.loads(RunFolder(run_dir).tracking.read_text(encoding="utf-8"))
        # fields of another version are left out, not an error that would send everything again
        known = {key: value for key, value in saved.items() if key in State.__dataclass_fields__}
        return State(**known)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class Identity:
    """What MLflow is told of a run at its start.

    uri: `sqlite:///ABSOLUTE/mlflow.db` or a server's http(s) address. experiment: one per task, by
    its name or, experiment_by_id, its number; parent_name: one per (recipe, algorithm); run_name:
    one per seed. params: the resolved recipe, nested; shared: those of them that all seeds have.
    note: a description. tags: algorithm, task, engine, world_size,
    git_commit, data_digest; None values are left out. dataset: see tracking.dataset.
    """

    uri: str
    experiment: str
    run_name: str
    parent_name: str
    params: Mapping[str, Any]
    tags: Mapping[str, Any]
    recipe_yaml: str
    dataset: Mapping[str, str] | None = None
    experiment_by_id: bool = False
    shared: Mapping[str, Any] = field(default_factory=dict[str, Any])
    note: str = ""


def begin(run_dir: Path, run: Identity, went_back: bool = False) -> StateFile:
    """Writes the state at the start of a process: a new run, or the continuation of the folder's
    earlier one. went_back: what is recorded from here on is of another way; then it is a new run
    too where MLflow has records of the way that was left, which it cannot take back."""
    private_dir(run_dir)
    earlier = load(run_dir) or State(run.uri, run.experiment, run.run_name, run.parent_name)
    run_id = earlier.run_id
    with contextlib.suppress(OSError):
        run_id = run_id or RunFolder(run_dir).run_id.read_text(encoding="utf-8").strip() or None
    metrics = RunFolder(run_dir).metrics
    recorded = metrics.stat().st_size if metrics.exists() else 0
    if went_back and run_id and earlier.offset > recorded:
        earlier = _another_way(earlier, run_id)
    if run_id == earlier.left:  # run_id still names that one until the new one is made
        run_id = None
    file = StateFile(run_dir, earlier)
    file.update(
        uri=run.uri,
        experiment=redact(run.experiment),
        experiment_by_id=run.experiment_by_id,
        run_name=redact(run.run_name),
        parent_name=redact(run.parent_name),
        params=flatten(redact(dict(run.params))),
        shared=flatten(redact(dict(run.shared))),
        note=redact(run.note),
        tags=clean_tags(earlier.tags | dict(run.tags)),
        recipe_yaml=redact_yaml(run.recipe_yaml),
        dataset=redact(dict(run.dataset)) if run.dataset else None,
        results=None,  # of an end that is none any more
        status=None,
        ended=None,
        started=earlier.started or now(),
        # kept over restarts: it finds a run whose creation was answered to nobody
        run_key=earlier.run_key or uuid.uuid4().hex,
        run_id=run_id,
        acknowledged={key: value for key, value in earlier.acknowledged.items() if key != "status"},
    )
    return file


def _another_way(earlier: State, left: str) -> State:
    """The state of a run of which MLflow has nothing yet, beside the run `left`."""
    fresh = State(earlier.uri, earlier.experiment, earlier.run_name, earlier.parent_name)
    return replace(fresh, tags={CONTINUES_TAG: left}, left=left)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as dotted keys and text: null, true and numbers as YAML writes them, lists
    as JSON."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name[:MAX_KEY]] = _text(value)[:MAX_PARAM]
    return flat


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as they are sent: without secrets, None left out, cut to what MLflow stores."""
    return {
        str(key)[:MAX_KEY]: _text(value)[:MAX_TAG]
        for key, value in redact(dict(tags)).items()
        if value is not None
    }


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    if value is None or isinstance(value, bool | list | tuple | Mapping):
        return json.dumps(value, default=str)
    return str(value)


def now() -> int:
    """Unix time in milliseconds."""
    return int(time.time() * 1000)
