"""Tracking against a real `mlflow server` on loopback, and against servers that are away, hang,
fail or die."""

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from tests.ranks import free_port
from tram_ds.tracking import tracker as tracking
from tram_ds.tracking.metrics_log import MetricsLog
from tram_ds.tracking.server import prepare_environment

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.alone]
CALLS = 200


class Server:
    """A real MLflow server with a sqlite backend; it can be killed and started again on the same
    port and database."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        files = ["--artifacts-destination", str(self.folder / "artifacts")]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }
        with (self.folder / "server.log").open("ab") as log:
            command = [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                *store,
                *files,
                *address,
            ]
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.uri}/health", timeout=2) as reply,
            ):
                if reply.status == 200:
                    return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.3)
        raise AssertionError(f"no server after 120 s: {(self.folder / 'server.log').read_text()}")

    def stop(self, signal_number=signal.SIGKILL):
        """Ends the server and its children: they are the process group of the session it was
        started in."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal_number)
            self.process.wait(30)
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@contextlib.contextmanager
def black_hole():
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        held, running = [], threading.Event()

        def accept():
            with contextlib.suppress(OSError):
                while not running.is_set():
                    held.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", held
        running.set()
        for connection in held:
            connection.close()


@contextlib.contextmanager
def failing():
    """Answers 500 to everything."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            seen.append(self.path)
            self.send_response(500)
            self.send_header("Retry-After", "3600")
            self.end_headers()

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_address[1]}", seen
        listener.shutdown()


def begin(run_dir, uri):
    parameters = {
        "train": {"seed": 0},
        "many": {f"k{index}": index for index in range(150)},
    }
    tags = {"algorithm": "tram_prev"}
    yaml = "task: {name: language_modeling}\n"
    about = tracking.Identity(uri, "faults", run_dir.name, "group", parameters, tags, yaml)
    return tracking.start(run_dir, about, every_seconds=0.2)


def train(log, steps, between=lambda step: None):
    """Seconds the training thread spent in log calls; a step takes 5 ms."""
    blocked = 0.0
    for step in steps:
        began = time.perf_counter()
        log.append(
            {
                "step": step,
                "loss": 1.0 / (step + 1),
                "distance": 0.1,
                "radius": 0.2,
                "tokens": 4096,
            }
        )
        blocked += time.perf_counter() - began
        between(step)
        time.sleep(0.005)
    return blocked


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def client(uri):
    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_complete(uri, run_id, status, calls=CALLS):
    run = client(uri).get_run(run_id)
    for key in ("loss/train", "radius/radius", "throughput/tokens"):
        assert [metric.step for metric in client(uri).get_metric_history(run_id, key)] == list(
            range(calls)
        )
    assert run.info.status == status and len(run.data.params) == 151
    assert [file.path for file in client(uri).list_artifacts(run_id)] == [
        "recipe.yaml",
        "results.json",
    ]


def test_a_healthy_server(server, tmp_path):
    tracker, log = begin(tmp_path, server.uri), MetricsLog(tmp_path, flush_seconds=0.1)
    blocked = train(log, range(CALLS))
    log.close()
    tracker.log_results({"Art": {"before": 3.0, "after": 2.0}})
    assert tracker.finish("FINISHED")
    assert blocked < 0.5
    check_complete(server.uri, tracker.run_id, "FINISHED")
    parent = client(server.uri).get_run(tracker.run_id).data.tags["mlflow.parentRunId"]
    assert client(server.uri).get_run(parent).info.run_name == "group"


@pytest.mark.parametrize("fault", ["refused", "black hole", "500"])
def test_a_bad_server_costs_nothing_and_loses_nothing(server, tmp_path, fault):
    refused = contextlib.nullcontext((f"http://127.0.0.1:{free_port()}", ["nobody can see it"]))
    with {"refused": refused, "black hole": black_hole(), "500": failing()}[fault] as (
        uri,
        seen,
    ):
        began = time.perf_counter()
        tracker, log = begin(tmp_path, uri), MetricsLog(tmp_path, flush_seconds=0.1)
        started = time.perf_counter() - began
        wait_for(lambda: seen)  # the uploader is inside its request to the bad server
        blocked = train(log, range(CALLS))
        log.close()
        tracker.log_results({"Art": 2.0})
        began = time.perf_counter()
        complete = tracker.finish("FINISHED", timeout=8)
        assert time.perf_counter() - began < 9.0
    assert started < 0.5 and blocked < 0.5 and not complete and tracker.run_id is None
    report = tracking.sync(tmp_path, server.uri)
    assert report.complete and report.sent == 4 * CALLS, report
    assert tracking.sync(tmp_path).sent == 0  # the address is remembered, and nothing is sent twice
    check_complete(server.uri, report.run_id, "FINISHED")


def test_a_server_killed_in_mid_run_and_started_again(server, tmp_path):
    tracker, log = begin(tmp_path, server.uri), MetricsLog(tmp_path, flush_seconds=0.1)
    wait_for(lambda: tracker.run_id)
    blocked = train(
        log,
        range(CALLS),
        between=lambda step: server.stop() if step == CALLS // 2 else None,
    )
    assert blocked < 0.5
    server.start()
    blocked = train(log, range(CALLS, CALLS + 50))
    log.close()
    tracker.log_results({"Art": 2.0})
    assert tracker.finish("KILLED") and blocked < 0.5
    check_complete(server.uri, tracker.run_id, "KILLED", CALLS + 50)


def test_a_server_that_dies_for_good_then_resume_on_its_successor(server, tmp_path):
    """Requeued while the server is away: one run, no step missing or twice, though 40 steps are
    computed again."""
    first, log = begin(tmp_path, server.uri), MetricsLog(tmp_path, flush_seconds=0.1)
    train(log, range(100))
    wait_for(
        lambda: client(server.uri).get_run(first.run_id).data.metrics if first.run_id else None
    )
    server.stop()
    train(log, range(100, 140))
    log.close()
    assert not first.finish("KILLED", timeout=8)
    log = MetricsLog(tmp_path, flush_seconds=0.1)
    log.truncate_after(59)
    second = begin(tmp_path, server.uri)
    train(log, range(60, CALLS))
    log.close()
    second.log_results({"Art": 2.0})
    assert not second.finish("FINISHED", timeout=8) and second.run_id == first.run_id
    server.start()
    report = tracking.sync(tmp_path)
    assert report.complete and report.run_id == first.run_id, report
    check_complete(server.uri, report.run_id, "FINISHED")
