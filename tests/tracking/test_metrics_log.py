"""The record of a run: strict JSON, private, whole after a crash, no step twice after a resume."""

import json
import math
import os
import stat
import time

import pytest
import torch

from tram_ds.runtime.redact import HIDDEN, redact, redact_yaml
from tram_ds.tracking.metrics_log import MetricsLog, read


def lines(run_dir):
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_records_come_back_in_order(tmp_path):
    log = MetricsLog(tmp_path / "run")
    for step in range(5):
        log.append({"step": step, "loss": 1.0 / (step + 1), "eval": {"Art": 2.5}})
    log.close()
    assert [record["step"] for record in read(tmp_path / "run")] == list(range(5))
    assert read(tmp_path / "run")[4]["loss"] == 0.2
    assert read(tmp_path / "run")[0]["eval"] == {"Art": 2.5}


def test_non_finite_numbers_are_null_and_named(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(
        {
            "step": 1,
            "loss": math.nan,
            "radius": torch.tensor(math.inf),
            "eval": {"Art": -math.inf},
            "lr": 0.1,
        }
    )
    log.close()
    strict = json.loads(
        lines(tmp_path)[0],
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert strict["loss"] is None and strict["radius"] is None and strict["eval"]["Art"] is None
    assert strict["nonfinite"] == ["eval.Art", "loss", "radius"] and strict["lr"] == 0.1


def test_only_the_owner_can_read(tmp_path):
    previous = os.umask(0)
    try:
        log = MetricsLog(tmp_path / "run")
        log.append({"step": 0})
        log.close()
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run/metrics.jsonl").stat().st_mode) == 0o600


def test_lines_reach_the_file_while_the_run_goes(tmp_path):
    log = MetricsLog(tmp_path, flush_seconds=0.05)
    log.append({"step": 0})
    deadline = time.monotonic() + 5
    while not read(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(read(tmp_path)) == 1
    log.close()


def test_truncate_drops_later_steps_only(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(10):
        log.append({"step": step, "text": "line\u2028separator"})
    log.close()
    before = lines(tmp_path)
    log = MetricsLog(tmp_path)
    log.truncate_after(6)
    assert lines(tmp_path) == before[:7]  # byte for byte: the tracker recognises the file by it
    log.append({"step": 7})
    log.close()
    assert [record["step"] for record in read(tmp_path)] == list(range(8))
    assert stat.S_IMODE((tmp_path / "metrics.jsonl").stat().st_mode) == 0o600


def test_a_torn_last_line_is_dropped_on_reopening(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":0}\n{"step":1,"lo')
    assert [record["step"] for record in read(tmp_path)] == [0]
    log = MetricsLog(tmp_path)
    log.append({"step": 1})
    log.close()
    assert [record["step"] for record in read(tmp_path)] == [0, 1]


def test_a_full_disk_loses_nothing_that_was_appended(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, flush_seconds=60)
    log.append({"step": 0})
    with monkeypatch.context() as patch:
        patch.setattr(
            "tram_ds.tracking.metrics_log._append_text",
            lambda path, text: (_ for _ in ()).throw(OSError("no space left")),
        )
        with pytest.raises(OSError, match="no space left"):
            log.flush()
    log.append({"step": 1})
    log.close()
    assert [record["step"] for record in read(tmp_path)] == [0, 1]


def test_errors_name_the_key(tmp_path):
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match="step"):
        log.append({"loss": 1.0})
    with pytest.raises(ValueError, match="`grads`"):
        log.append({"step": 1, "grads": torch.zeros(3)})
    log.close()
    log.close()
    with pytest.raises(ValueError, match="after close"):
        log.append({"step": 2})


@pytest.mark.alone
def test_append_is_cheap(tmp_path):
    log = MetricsLog(tmp_path)
    began = time.perf_counter()
    for step in range(500):
        log.append(
            {
                "step": step,
                "loss": 1.0,
                "distance": 0.1,
                "radius": 0.2,
                "tokens": 4096,
                "lr": 1e-5,
            }
        )
    assert (time.perf_counter() - began) / 500 < 2e-3
    log.close()


@pytest.mark.parametrize(
    "value",
    [
        {"hf_token": "CANARY"},
        {"a": {"MY_API_KEY": "CANARY", "b": [{"db_password": "CANARY"}]}},
        {"credentials": {"user": "CANARY"}},
        {"tokens": ["CANARY"]},
        "http://user:CANARY@host:5000/x",
        {"uri": "postgresql://u:CANARY@db/x"},
        "request failed: api_key=CANARY&x=1",
        'header "Authorization": "Bearer CANARY1234"',
    ],
)
def test_redact_hides(value):
    assert "CANARY" not in json.dumps(redact(value)) and HIDDEN in json.dumps(redact(value))


@pytest.mark.parametrize(
    "value",
    [
        {
            "tokens": 4096,
            "tokens_per_second": 1.5,
            "loss_per_token": {"Art": 2.0},
            "max_tokens": None,
        },
        {"tokenizer": "gpt2", "tokenizer.path": "some/path"},
        "http://127.0.0.1:5000/#/experiments/1",
        "tokenizer: gpt2, tokens: 4096, seed=3",
        {"betas": [0.9, 0.99], "flag": True},
    ],
)
def test_redact_leaves_the_rest(value):
    assert redact(value) == value


def test_redact_knows_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "environment-CANARY")
    assert redact("login with environment-CANARY failed") == f"login with {HIDDEN} failed"


def test_redact_yaml_keeps_comments_unless_something_is_hidden():
    text = "# deepspeed launch/train.py\nmodel: {path: gpt2}\n"
    assert redact_yaml(text) == text
    assert "CANARY" not in redact_yaml("model:\n  token: |\n    first\n    CANARY\n")


@pytest.mark.alone
def test_redact_is_fast_on_long_strings():
    began = time.perf_counter()
    redact("a" * 100_000 + "a.-" * 30_000)
    assert time.perf_counter() - began < 2.0
