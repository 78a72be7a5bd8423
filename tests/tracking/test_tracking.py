"""Tracking to a sqlite file: what arrives, what never arrives, resume, sync, eight processes at
once."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from tests import ranks
from tram_ds.comparison.run import CompareError
from tram_ds.comparison.runs import from_mlflow
from tram_ds.tracking import tracker as tracking
from tram_ds.tracking.metrics_log import MetricsLog
from tram_ds.tracking.points import metric_name, read_batches
from tram_ds.tracking.server import prepare_environment
from tram_ds.tracking.state import begin as begin_state
from tram_ds.tracking.state import load

CANARY = "canary-5f1c"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('db')}/mlflow.db"


def begin(run_dir, uri, **changes):
    given = {
        "experiment": "language_modeling",
        "run_name": "seed-0",
        "parent_name": "quickstart/tram_prev",
        "params": {"task": {"name": "language_modeling"}, "train": {"seed": 0}},
        "tags": {"algorithm": "tram_prev", "world_size": 2, "git_commit": None},
        "recipe_yaml": "# launch\ntask: {name: language_modeling}\n",
        "every_seconds": 0.2,
    } | changes
    about = {key: given.pop(key) for key in tracking.Identity.__dataclass_fields__ if key in given}
    return tracking.start(run_dir, tracking.Identity(uri, **about), **given)


def write_steps(run_dir, steps, **values):
    log = MetricsLog(run_dir)
    for step in steps:
        log.append({"step": step, "loss": 1.0 / (step + 1), **values})
    log.close()


def server(uri):
    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def steps_of(uri, run_id, key="loss/train"):
    return [metric.step for metric in server(uri).get_metric_history(run_id, key)]


def test_everything_arrives(tmp_path, uri):
    tracker = begin(
        tmp_path,
        uri,
        params={
            "lr": 2e-5,
            "long": "x" * 9000,
            "many": {f"k{i}": i for i in range(250)},
        },
    )
    write_steps(tmp_path, range(5), eval={"Art & Design": 2.0})
    tracker.log_results({"Art": {"before": 3.0, "after": math.inf}})
    tracker.set_tags({"export": str(tmp_path / "export")})
    assert tracker.finish("FINISHED") and tracker.finish("FAILED")  # the first status stands
    assert (tmp_path / "run_id").read_text().strip() == tracker.run_id
    run = server(uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "seed-0"
    assert run.data.params["lr"] == "2e-05" and len(run.data.params["long"]) == 6000
    assert run.data.params["many.k249"] == "249" and len(run.data.params) == 252
    assert run.data.tags["algorithm"] == "tram_prev" and run.data.tags["world_size"] == "2"
    assert "git_commit" not in run.data.tags and run.data.tags["export"].endswith("export")
    assert steps_of(uri, tracker.run_id) == list(range(5))
    assert run.data.metrics[f"eval/Art _ Design-{zlib.crc32(b'eval/Art & Design'):08x}"] == 2.0
    artifacts = (
        Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / tracker.run_id / "artifacts"
    )
    assert (artifacts / "recipe.yaml").read_text().startswith("# launch")
    assert json.loads((artifacts / "results.json").read_text())["nonfinite"] == ["Art.after"]


def test_parent_and_children(tmp_path, uri):
    children = []
    for seed in (0, 1):
        tracker = begin(
            tmp_path / str(seed),
            uri,
            run_name=f"seed-{seed}",
            parent_name="it's a recipe/sam",
        )
        assert tracker.finish("KILLED")
        children.append(server(uri).get_run(tracker.run_id))
    parents = {child.data.tags["mlflow.parentRunId"] for child in children}
    assert len(parents) == 1 and {child.info.status for child in children} == {"KILLED"}
    assert server(uri).get_run(parents.pop()).info.run_name == "it's a recipe/sam"


def test_non_finite_values_are_counts_and_never_sent(tmp_path, uri):
    tracker = begin(tmp_path, uri)
    log = MetricsLog(tmp_path)
    for step, loss in enumerate([1.0, math.nan, math.inf, -math.inf, 2.0]):
        log.append({"step": step, "loss": loss})
    log.close()
    assert tracker.finish("FINISHED")
    assert steps_of(uri, tracker.run_id) == [0, 4]
    assert steps_of(uri, tracker.run_id, "nonfinite/loss") == [1, 2, 3]


def test_requeue_continues_the_run_without_duplicate_steps(tmp_path, uri):
    first = begin(tmp_path, uri)
    write_steps(tmp_path, range(10))
    assert first.finish("KILLED")
    log = MetricsLog(tmp_path)
    log.truncate_after(6)  # the checkpoint was at step 6: 7, 8 and 9 are computed again
    second = begin(
        tmp_path,
        uri,
        params={"task": {"name": "language_modeling"}, "train": {"seed": 7}},
    )
    for step in range(7, 15):
        log.append({"step": step, "loss": 0.5})
    log.close()
    assert second.finish("FINISHED")
    assert second.run_id == first.run_id
    run = server(uri).get_run(second.run_id)
    assert steps_of(uri, second.run_id) == list(range(15)) and run.info.status == "FINISHED"
    assert run.data.params["train.seed"] == "0" and run.data.tags["changed.train.seed"] == "7"


def test_another_way_is_a_run_of_its_own(tmp_path, uri):
    """Ten steps, then from step 6 on with another recipe to step 8: MLflow cannot take steps 7 to 9
    back, so they stay with the run that measured them, and nothing counts it any more."""
    first = begin(tmp_path, uri, experiment="two ways")
    write_steps(tmp_path, range(10))
    first.log_results({"scores": {"test": {"Art": {"loss": 9.0}}}})
    assert first.finish("FINISHED")
    log = MetricsLog(tmp_path)
    log.truncate_after(6)
    second = begin(tmp_path, uri, experiment="two ways", went_back=True)
    for step in range(7, 9):
        log.append({"step": step, "loss": 0.5})
    log.close()
    assert second.finish("KILLED") and second.run_id != first.run_id
    losses = {m.step: m.value for m in server(uri).get_metric_history(second.run_id, "loss/train")}
    assert losses == {step: 1.0 / (step + 1) for step in range(7)} | {7: 0.5, 8: 0.5}
    old, new = (server(uri).get_run(run.run_id) for run in (first, second))
    assert old.data.tags["tram_ds.left_for"] == second.run_id
    assert new.data.tags["tram_ds.continues"] == first.run_id
    assert "final/test/Art/loss" in old.data.metrics and "loss/train" in new.data.metrics
    assert "final/test/Art/loss" not in new.data.metrics
    assert steps_of(uri, first.run_id) == list(range(10))
    with pytest.raises(CompareError, match=f"left for run {second.run_id}"):
        from_mlflow("two ways", uri)


def test_another_way_whose_steps_mlflow_never_saw_is_the_same_run(tmp_path, uri):
    """All it has is before step 6, or the run goes on from its end: nothing to take back."""
    first = begin(tmp_path, uri)
    write_steps(tmp_path, range(7))
    assert first.finish("KILLED")
    write_steps(tmp_path, range(7, 10))  # while MLflow was away
    log = MetricsLog(tmp_path)
    log.truncate_after(6)
    second = begin(tmp_path, uri, went_back=True)
    log.append({"step": 7, "loss": 0.5})
    log.close()
    assert second.finish("FINISHED") and second.run_id == first.run_id
    assert steps_of(uri, second.run_id) == list(range(8))


def test_a_new_way_that_never_reached_mlflow_is_still_no_part_of_the_old_run(tmp_path, uri):
    """Killed before its first upload; the file run_id still names the run that was left."""
    first = begin(tmp_path, uri)
    write_steps(tmp_path, range(10))
    assert first.finish("KILLED")
    log = MetricsLog(tmp_path)
    log.truncate_after(6)
    log.close()
    about = tracking.Identity(uri, "language_modeling", "seed-0", "parent", {}, {}, "")
    assert begin_state(tmp_path, about, went_back=True).state.run_id is None
    assert (tmp_path / "run_id").read_text().strip() == first.run_id
    third = begin(tmp_path, uri)
    assert third.finish("FINISHED") and third.run_id != first.run_id
    assert steps_of(uri, third.run_id) == list(range(7))


def test_killed_without_a_word_then_sync(tmp_path, uri):
    (tmp_path / "killed.py").write_text(
        "import os, sys, time\n"
        "from tests.tracking.test_tracking import begin, write_steps\n"
        "tracker = begin(sys.argv[1], sys.argv[2]); write_steps(sys.argv[1], range(50))\n"
        "while tracker.run_id is None: time.sleep(0.05)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = ranks.script(tmp_path / "killed.py", str(tmp_path), uri, timeout=120)
    assert killed.returncode == -9, killed.stderr
    first, second = tracking.sync(tmp_path), tracking.sync(tmp_path)
    assert first.complete and second.complete and second.sent == 0
    assert steps_of(uri, first.run_id) == list(range(50))
    assert server(uri).get_run(first.run_id).info.status == "KILLED"


def test_sync_with_lost_state_of_the_offset(tmp_path, uri):
    """The reply was lost or the file is an older one: the replay is idempotent."""
    tracker = begin(tmp_path, uri)
    write_steps(tmp_path, range(20))
    assert tracker.finish("FINISHED")
    saved = json.loads((tmp_path / "tracking.json").read_text()) | {
        "offset": 0,
        "last_line": "",
        "run_id": None,
    }
    (tmp_path / "tracking.json").write_text(json.dumps(saved))
    report = tracking.sync(tmp_path)
    assert report.complete and report.run_id == tracker.run_id and report.skipped == 20
    assert steps_of(uri, tracker.run_id) == list(range(20))


def test_another_database_gets_a_whole_copy(tmp_path, uri):
    tracker = begin(tmp_path / "run", uri)
    write_steps(tmp_path / "run", range(8))
    assert tracker.finish("FAILED")
    other = f"sqlite:///{tmp_path}/other.db"
    report = tracking.sync(tmp_path / "run", other)
    assert report.complete and report.run_id != tracker.run_id
    assert steps_of(other, report.run_id) == list(range(8))
    assert server(other).get_run(report.run_id).info.status == "FAILED"


def test_a_deleted_run_is_named_with_the_way_out(tmp_path, uri):
    tracker = begin(tmp_path, uri)
    assert tracker.finish("FINISHED")
    server(uri).delete_run(tracker.run_id)
    write_steps(tmp_path, range(2))
    report = tracking.sync(tmp_path)
    assert (
        not report.complete
        and report.error
        and "restore it" in report.error
        and tracker.run_id in report.error
    )


def test_a_metric_the_server_refuses_does_not_hold_up_the_others(
    tmp_path, uri, monkeypatch, caplog
):
    monkeypatch.setattr("tram_ds.tracking.points.metric_name", lambda name: name)
    tracker = begin(tmp_path, uri)
    write_steps(tmp_path, range(3), **{"bad//name#": 1.0})
    assert tracker.finish("FINISHED")
    assert steps_of(uri, tracker.run_id) == [0, 1, 2]
    assert caplog.text.count("MLflow refuses the metric bad//name#") == 1


def test_a_second_tracker_of_a_live_folder_waits(tmp_path, uri):
    with (
        tracking.locked(tracking.RunFolder(tmp_path).tracking_lock, 0.0),
        pytest.raises(TimeoutError, match="held by another"),
    ):
        begin(tmp_path, uri).finish("FINISHED", timeout=1)
        tracking.sync(tmp_path, wait=0.1)


def test_no_secret_is_stored_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", f"env-{CANARY}")
    tracker = begin(
        tmp_path / "run",
        f"sqlite:///{tmp_path}/mlflow.db",
        params={
            "hub": {"token": CANARY},
            "url": f"https://me:{CANARY}@host/x",
            "note": f"saw env-{CANARY}",
        },
        tags={"api_key": CANARY, "source": f"https://me:{CANARY}@host/repo.git"},
        recipe_yaml=f"hub:\n  token: |\n    {CANARY}\nurl: https://me:{CANARY}@host/x\n",
    )
    write_steps(tmp_path / "run", range(2), note=f"password={CANARY}", token=CANARY)
    tracker.log_results({"secret": CANARY, "Art": 2.0})
    assert tracker.finish("FINISHED")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {
        "mlflow.db",
        "metrics.jsonl",
        "recipe.yaml",
        "results.json",
        "tracking.json",
    } <= {p.name for p in files}
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_the_saved_address_has_no_password(tmp_path):
    uri = f"http://me:{CANARY}@127.0.0.1:9"
    begin(tmp_path, uri).finish("FINISHED", timeout=5)
    assert CANARY not in (tmp_path / "tracking.json").read_text()
    with pytest.raises(ValueError, match="--uri"):
        tracking.sync(tmp_path)


def test_sync_script(tmp_path, uri):
    begin(tmp_path, uri).finish("FINISHED", timeout=0)
    good = ranks.script(ROOT / "launch/sync.py", str(tmp_path), timeout=120)
    assert good.returncode == 0 and "complete" in good.stdout, good.stderr
    bad = ranks.script(ROOT / "launch/sync.py", str(tmp_path / "nothing"), timeout=120)
    assert bad.returncode == 2 and "tracking.json" in bad.stderr and "Traceback" not in bad.stderr


def test_eight_processes_on_one_fresh_database(tmp_path):
    uri = f"sqlite:///{tmp_path}/fresh/mlflow.db"
    (tmp_path / "one.py").write_text(
        "import os, sys\n"
        "from tests.tracking.test_tracking import begin, write_steps\n"
        "run = sys.argv[1] + os.environ['RANK']\n"
        "tracker = begin(run, sys.argv[2]); write_steps(run, range(5))\n"
        "sys.exit(0 if tracker.finish('FINISHED', timeout=200) else 1)"
    )
    done = ranks.script(tmp_path / "one.py", f"{tmp_path}/run", uri, cwd=tmp_path, world=8)
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / f"run{i}" for i in range(8)]
    states = [load(run) for run in runs]
    assert all(state and steps_of(uri, state.run_id) == list(range(5)) for state in states)
    parents = {
        server(uri).get_run(state.run_id).data.tags["mlflow.parentRunId"]
        for state in states
        if state
    }
    assert len(parents) == 1


def test_null_tracker_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = tracking.NullTracker()
    tracker.log_results({})
    tracker.set_tags({})
    assert tracker.finish("FINISHED") and tracker.run_id is None and not os.listdir(tmp_path)


def test_the_loop_never_imports_mlflow():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tram_ds.tracking; "
        "sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, ROOT], check=False).returncode == 0


def test_batches_hold_whole_lines_and_at_most_1000_points(tmp_path):
    write_steps(tmp_path, range(700), **{f"m{i}": 1.0 for i in range(2)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"step": 700, "lo')
    batches = list(read_batches(tmp_path / "metrics.jsonl", 0))
    assert [len(points) for _, _, points in batches] == [999, 999, 102]
    assert batches[-1][0] == (tmp_path / "metrics.jsonl").read_bytes().rfind(b"\n") + 1


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("a/b", "a/b"),
        ("c x.y:1", "c x.y:1"),
        ("//a/../b#", f"a/b_-{zlib.crc32(b'//a/../b#'):08x}"),
        ("", "_-00000000"),
        ("x" * 300, f"{'x' * 241}-{zlib.crc32(b'x' * 300):08x}"),
    ],
)
def test_metric_names(name, accepted):
    assert metric_name(name) == accepted


def test_two_metrics_never_become_one():
    names = ["c#", "c+", "c_", "a//b", "a/b", "x" * 300, "x" * 301, "", "_", "..", "/"]
    assert len({metric_name(name) for name in names}) == len(names)


def test_a_run_deleted_while_it_trains_loses_nothing(tmp_path, uri, caplog):
    """MLflow refuses every point of a deleted run with the words it has for a bad point."""
    tracker = begin(tmp_path, uri)
    log = MetricsLog(tmp_path, flush_seconds=0.05)
    log.append({"step": 0, "loss": 1.0})
    until(lambda: tracker.run_id and steps_of(uri, tracker.run_id) == [0])
    server(uri).delete_run(tracker.run_id)
    log.append({"step": 1, "loss": 1.0})
    until(lambda: "restore it" in caplog.text)
    server(uri).restore_run(tracker.run_id)
    log.append({"step": 2, "loss": 1.0})
    log.close()
    assert tracker.finish("FINISHED")
    assert steps_of(uri, tracker.run_id) == [0, 1, 2]


def test_a_run_still_deleted_at_the_end_is_incomplete_until_it_is_restored(tmp_path, uri):
    tracker = begin(tmp_path, uri)
    until(lambda: tracker.run_id)
    server(uri).delete_run(tracker.run_id)
    write_steps(tmp_path, range(5))
    assert not tracker.finish("FINISHED", timeout=20)
    assert not tracking.sync(tmp_path).complete
    server(uri).restore_run(tracker.run_id)
    assert tracking.sync(tmp_path).complete
    assert steps_of(uri, tracker.run_id) == list(range(5))


def test_sync_sends_again_what_a_server_acknowledged_and_lost(tmp_path, uri):
    """As after its database came back from a copy: every other step is gone, and the last one."""
    tracker = begin(tmp_path, uri)
    write_steps(tmp_path, range(6))
    assert tracker.finish("FINISHED")
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        gone = database.execute(
            "delete from metrics where run_uuid = ? and key = 'loss/train' and step in (1, 3, 5)",
            (tracker.run_id,),
        )
        assert gone.rowcount == 3
    report = tracking.sync(tmp_path)
    assert report.complete and report.sent == 3
    assert sorted(steps_of(uri, tracker.run_id)) == list(range(6))


def test_an_experiment_by_its_number(tmp_path, uri):
    number = server(uri).create_experiment("by its number")
    tracker = begin(tmp_path / "a", uri, experiment=number, experiment_by_id=True)
    assert tracker.finish("FINISHED")
    assert server(uri).get_run(tracker.run_id).info.experiment_id == number
    begin(tmp_path / "b", uri, experiment="99999", experiment_by_id=True).finish("FINISHED")
    report = tracking.sync(tmp_path / "b")
    assert not report.complete and "no MLflow experiment 99999" in str(report.error)


def test_sync_takes_the_password_from_mlflows_own_variable(tmp_path, monkeypatch):
    address = f"http://me:{CANARY}@127.0.0.1:9"
    begin(tmp_path, address).finish("FINISHED", timeout=5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@127.0.0.1:10")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking.sync(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    report = tracking.sync(tmp_path)
    assert report.error and CANARY not in report.error


def until(ready, seconds=20.0):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)
