"""What MLflow gets beside the steps: samples of the machine, the data set, the commit, the final
scores."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from tests.tracking.test_tracking import begin, server, write_steps
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.git import git_commit
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tracking import machine as system_metrics
from tram_ds.tracking import tracker as tracking
from tram_ds.tracking.dataset import dataset
from tram_ds.tracking.machine import SystemMetrics
from tram_ds.tracking.metrics_log import read
from tram_ds.tracking.results import curves, final_points, table_json

RESULTS = {
    "train_domains": ["math"],
    "selected": {"step": 40},
    "scores": {
        "test": {
            "math": {"perplexity": 20.0},
            "Art": {"perplexity": 30.0},
            "cs": {"perplexity": None},
        }
    },
    "zero_shot_average": {"test": {"perplexity": None}},
    "initial": {
        "test": {
            "math": {"perplexity": 50.0},
            "Art": {"perplexity": 60.0},
            "cs": {"perplexity": 70.0},
        }
    },
    "samples": [{"prompt": "The", "text": " end", "ended": "end"}],
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('db')}/mlflow.db"


def sampled(run_dir, count):
    sampler, deadline = SystemMetrics(run_dir, 0.02), time.monotonic() + 20
    while len(read(run_dir, RunFolder.system)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler.stop()
    return read(run_dir, RunFolder.system)


def test_samples_are_numbered_on_after_a_resume(tmp_path):
    first = sampled(tmp_path, 3)
    with (tmp_path / RunFolder.system).open("a") as file:
        file.write('{"step": 99, "sys')  # the process was killed while it wrote
    second = sampled(tmp_path, len(first) + 2)
    assert [record["step"] for record in second] == list(range(len(second))) and len(second) > len(
        first
    ) >= 3
    assert 0 < second[-1]["system"]["system_memory_usage_percentage"] <= 100


def test_a_sampler_that_fails_does_not_matter(tmp_path, monkeypatch):
    calls = []

    def broken():
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError("no /proc today")
        return {"cpu_utilization_percentage": 1.0}

    monkeypatch.setattr(system_metrics, "processor", broken)
    assert [record["step"] for record in sampled(tmp_path, 2)][:2] == [0, 1]
    monkeypatch.setattr(system_metrics, "read", lambda *_: 1 / 0)
    SystemMetrics(tmp_path, 0.01).stop()


def test_gpus_are_read_where_there_are_any(monkeypatch):
    class NVMLError(Exception):
        pass

    def no_power(handle):
        raise NVMLError("not supported")

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=50 + handle),
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=40e9, total=80e9),
        nvmlDeviceGetPowerUsage=no_power,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    values = system_metrics.gpu_reader()()
    assert (
        values["gpu_1_utilization_percentage"] == 51
        and values["gpu_0_memory_usage_percentage"] == 50
    )
    assert values["gpu_0_memory_usage_megabytes"] == 40_000 and not any(
        "power" in name for name in values
    )
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert system_metrics.gpu_reader()() == {}


def test_everything_reaches_the_server_once(tmp_path, uri):
    described = dataset(
        TaskSection(name="language_modeling", data="generated"), "d" * 64, ["math"], ["math", "Art"]
    )
    tracker = begin(tmp_path, uri, dataset=described, system_seconds=0.1)
    write_steps(tmp_path, range(1, 4))
    time.sleep(0.5)
    tracker.log_results(RESULTS)
    assert tracker.finish("FINISHED")
    saved = json.loads((tmp_path / "tracking.json").read_text())
    (tmp_path / "tracking.json").write_text(
        json.dumps(saved | {"acknowledged": {}, "offset": 0, "system_offset": 0})
    )
    assert tracking.sync(tmp_path).complete
    client = server(uri)
    run = client.get_run(tracker.run_id)
    assert (
        run.data.metrics["final/test/Art/perplexity"] == 30.0
        and run.data.metrics["nonfinite/final/test/cs/perplexity"] == 1
    )
    for name in ("final/test/Art/perplexity", "system/cpu_utilization_percentage"):
        steps = [point.step for point in client.get_metric_history(tracker.run_id, name)]
        assert steps == (
            [40] if name.startswith("final") else list(range(len(read(tmp_path, RunFolder.system))))
        ), name
    [given] = run.inputs.dataset_inputs
    assert given.dataset.digest == "d" * 36 and given.tags[0].value == "training"
    assert json.loads(given.dataset.profile)["eval_domains"] == ["math", "Art"]
    assert {"curves.png", "results_table.json", "samples.md"} <= {
        file.path for file in client.list_artifacts(tracker.run_id)
    }
    table = json.loads(
        Path(
            client.download_artifacts(tracker.run_id, "results_table.json", str(tmp_path))
        ).read_text()
    )
    assert [row[1] for row in table["data"]] == ["math", "Art", "cs", "average"]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "results_table.json", "type": "table"}
    ]


def test_final_metrics_and_table():
    points = {
        name: (step, value)
        for name, step, value, _ in final_points(
            RESULTS | {"zero_shot_average": {"test": {"a": 2}}}, 7
        )
    }
    assert points["final/test/zero_shot/a"] == (40, 2.0) and points[
        "final/test/math/perplexity"
    ] == (40, 20.0)
    assert "final/test/cs/perplexity" not in points
    table = json.loads(table_json(RESULTS))
    assert table["columns"] == ["split", "domain", "role", "perplexity", "perplexity before"]
    assert table["data"][:2] == [
        ["test", "math", "trained", 20.0, 50.0],
        ["test", "Art", "zero-shot", 30.0, 60.0],
    ]


def test_no_records_no_curves(tmp_path):
    assert curves(tmp_path) is None
    write_steps(tmp_path, range(3))
    assert curves(tmp_path) is not None


@pytest.mark.parametrize(
    ("data", "kind", "source"),
    [("generated", "code", "generated"), ("machelreid/m2d2", "hugging_face", "r1")],
)
def test_where_the_data_is_from(data, kind, source):
    described = dataset(
        TaskSection(name="language_modeling", data=data, revision="r1"), "0" * 64, ["Art"], ["Art"]
    )
    assert (
        described["source_type"] == kind
        and source in described["source"]
        and described["name"] == f"{data}/Art"
    )


def test_a_local_folder_is_named_in_full(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    described = dataset(
        TaskSection(name="language_modeling", data="texts"), "0" * 64, ["Art"], ["Art"]
    )
    assert (
        json.loads(described["source"]) == {"uri": str(tmp_path / "texts")}
        and described["source_type"] == "local"
    )


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_commit_of_a_checkout_and_of_a_snapshot(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAM_DS_GIT_COMMIT", "from-the-job")
    assert git_commit(tmp_path) == "from-the-job"
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == head
    (tmp_path / "snapshot").mkdir()
    # inside a checkout, but not the checkout
    assert git_commit(tmp_path / "snapshot") == "from-the-job"
    (tmp_path / "code.py").write_text("2\n")
    assert git_commit(tmp_path) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) == "from-the-job"
    monkeypatch.delenv("TRAM_DS_GIT_COMMIT")
    assert git_commit(tmp_path) is None
