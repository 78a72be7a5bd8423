"""What cannot be reached or is not there is one line, said before anything is waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import free_port
from tram_ds.cli import main as tram

TINY = ["--recipe", "quickstart", "tracking.enabled=false"]


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused with 2."""
    assert tram.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "runs" / "one").mkdir(parents=True)

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", asked)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)


@pytest.mark.parametrize("path", ["runs/none", "./none", "/no/such/model", "~/no/such", "a/b/c"])
def test_a_model_that_is_a_folder_is_looked_at_first(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--recipe", "xnli_xlmr", "--model", path]
    assert f"--model {path}: there is no such folder" in said(words, capsys)


def test_a_run_is_no_hub_id_where_no_runs_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "one").rmdir()
    (tmp_path / "runs").rmdir()
    words = ["evaluate", "--recipe", "xnli_xlmr", "--model", "runs/xnli_xlmr-base-0"]
    assert "--model runs/xnli_xlmr-base-0: there is no such folder" in said(words, capsys)


def test_a_missing_model_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *TINY, "model.init=null", f"model.path={tmp_path}/none"]
    assert f"{tmp_path}/none: there is no such folder" in said(words, capsys)


def test_a_run_folder_that_cannot_be_made_is_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["train", *TINY, "--smoke", "run_dir=file/run"]
    assert "file/run" in said(words, capsys)


def test_a_dead_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    line = said(["compare", "--experiment", "mine", "--uri", uri], capsys)
    assert f"--uri {uri}: MLflow does not answer" in line
