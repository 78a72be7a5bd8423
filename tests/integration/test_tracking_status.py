"""Status, steps and cost of tracking as launch/train.py's users get them: stopped, killed, failed,
resumed, no server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_mlflow_server import black_hole, client
from tests.integration.test_train import RECIPE, TRAIN, records
from tests.ranks import ROOT, environment, started, store
from tests.zygote import QUIET, START, Rank

pytestmark = [pytest.mark.integration, pytest.mark.slow]
STEPS = 60


def start(folder: Path, *arguments: str) -> Rank:
    (folder / "tiny.yaml").write_text(RECIPE)
    if not (folder / "mlflow.db").exists():
        store(folder)
    words = ["--recipe", "tiny.yaml", f"tracking.uri=sqlite:///{folder}/mlflow.db", *arguments]
    as_found = {**START, **QUIET}  # without what the client of MLflow here has set since
    [rank] = started(TRAIN, *words, cwd=folder, ranks=[as_found], logs=[folder / "log"])
    return rank


def finished(folder: Path, *arguments: str) -> int:
    process = start(folder, *arguments)
    try:
        return process.wait(timeout=180)
    finally:
        process.kill()


def run_dir(folder: Path) -> Path:
    return folder / "runs" / "tiny-tram_x-0"


def the_run(folder: Path) -> Any:
    """The one child run of the database that was not left for another; two would fail here."""
    mlflow = client(f"sqlite:///{folder}/mlflow.db")
    experiment = mlflow.get_experiment_by_name("tiny")
    children = [
        run
        for run in mlflow.search_runs([experiment.experiment_id])
        if "mlflow.parentRunId" in run.data.tags and "tram_ds.left_for" not in run.data.tags
    ]
    [run] = children
    assert run.info.run_id == (run_dir(folder) / "run_id").read_text().strip()
    return run


def steps(folder: Path) -> list[int]:
    history = client(f"sqlite:///{folder}/mlflow.db").get_metric_history(
        the_run(folder).info.run_id, "loss/train"
    )
    return [point.step for point in history]


def tracked(folder: Path) -> bool:
    """Whether MLflow has steps beyond the newest checkpoint: those that a killed run computes
    again."""
    latest, state = run_dir(folder) / "checkpoints" / "latest", run_dir(folder) / "tracking.json"
    if not latest.exists() or not state.exists():
        return False
    sent = (run_dir(folder) / "metrics.jsonl").read_bytes()[
        : json.loads(state.read_text())["offset"]
    ]
    saved = int(latest.read_text().strip().rpartition("step-")[2])
    return sent.count(b"\n") > saved


def stopped(folder: Path, number: signal.Signals) -> int:
    """Starts a run that would go on for very long and sends it a signal once MLflow knows of it."""
    process, deadline = (
        start(folder, "checkpoint.every_steps=40", "train.steps=100000"),
        time.monotonic() + 120,
    )
    try:
        while not tracked(folder):
            assert time.monotonic() < deadline and process.poll() is None, (
                folder / "log"
            ).read_text()[-3000:]
            time.sleep(0.05)
        process.send_signal(number)
        return process.wait(timeout=120)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGTERM, 75, "KILLED"), (signal.SIGKILL, -9, "RUNNING")]
)
def test_stopped_then_resumed_is_one_run_with_every_step_once(
    tmp_path: Path, number: signal.Signals, code: int, status: str
) -> None:
    assert stopped(tmp_path, number) == code, (tmp_path / "log").read_text()[-3000:]
    first = the_run(tmp_path)
    assert first.info.status == status
    total = records(run_dir(tmp_path))[-1]["step"] + 10
    assert (
        finished(
            tmp_path,
            "checkpoint.every_steps=1000",
            f"train.steps={total}",
            "--resume",
            "--allow-change",
        )
        == 0
    )
    run = the_run(tmp_path)
    # what MLflow has of steps that SIGKILL lost and another recipe does anew, it cannot take back:
    # that run is left for a new one
    tags = client(f"sqlite:///{tmp_path}/mlflow.db").get_run(first.info.run_id).data.tags
    followed = first.info.run_id if number == signal.SIGTERM else tags.get("tram_ds.left_for")
    assert run.info.run_id == (followed or first.info.run_id) and run.info.status == "FINISHED"
    assert (
        steps(tmp_path)
        == list(range(1, total + 1))
        == [record["step"] for record in records(run_dir(tmp_path))]
    )
    assert run.data.metrics["final/test/zero_shot/perplexity"] > 1
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["data_digest"][:36]
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0


def test_an_error_is_a_failed_run(tmp_path: Path) -> None:
    """Numbers that stop being numbers: exit 3, FAILED, and the steps that led there."""
    wild = ["optimizer.lr=1e30", "train.clip_norm=null", "train.steps=8", "train.max_skipped=2"]
    assert finished(tmp_path, *wild) == 3
    assert the_run(tmp_path).info.status == "FAILED"
    assert the_run(tmp_path).data.metrics["optimizer/skipped"] == 1


TIMED = """
import json, runpy, sys, threading, time
from tram_ds.tracking import metrics_log as metrics, tracker as tracking

spent = {"append": 0.0, "flush": 0.0, "start": 0.0}

def timed(owner, name, what):
    original = getattr(owner, name)
    def wrapper(*arguments, **named):
        began = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            if threading.current_thread() is threading.main_thread():
                spent[what] += time.perf_counter() - began
    setattr(owner, name, wrapper)

timed(metrics.MetricsLog, "append", "append")
timed(metrics.MetricsLog, "flush", "flush")
timed(tracking, "start", "start")
close = metrics.MetricsLog.close
def close_and_report(self):
    if self.path.name == metrics.RunFolder.metrics:
        (self.path.parent / "spent.json").write_text(json.dumps(spent))  # the training is over
    close(self)
metrics.MetricsLog.close = close_and_report
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.alone
def test_a_server_that_never_answers_costs_less_than_one_per_cent_of_a_step(tmp_path: Path) -> None:
    """The training thread's time in tracking, against the time of the steps it was for; and the run
    ends well."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "timed.py").write_text(TIMED)
    size = [
        "task.seq_len=64",
        "model.init.n_embd=128",
        "model.init.n_layer=4",
        "model.init.n_head=4",
        "train.micro_batch=4",
    ]
    with black_hole() as (uri, held):
        command = [
            sys.executable,
            "timed.py",
            TRAIN,
            "--recipe",
            "tiny.yaml",
            f"tracking.uri={uri}",
            f"train.steps={STEPS}",
            *size,
        ]
        env = environment(MLFLOW_HTTP_REQUEST_TIMEOUT="2", PYTHONPATH=os.pathsep.join([str(ROOT)]))
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
        )
        assert held, "nothing ever asked the server"
    assert done.returncode == 0, done.stderr[-4000:]
    assert "launch/sync.py" in done.stderr
    spent = json.loads((run_dir(tmp_path) / "spent.json").read_text())
    rows = records(run_dir(tmp_path))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    stepping = sum(row["seconds"] for row in rows)
    assert spent["append"] > 0
    assert spent["append"] + spent["flush"] < 0.01 * stepping, (spent, stepping)
    assert spent["start"] < 1.0, spent
