"""What is asked of a hub that does not answer is said before its client gives up, with the way to
work without a network."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ranks import free_port
from tram_ds.data import hub as data_hub
from tram_ds.models import config, processors
from tram_ds.runtime import hub

MODEL = "openai-community/gpt2-xl"
SECTION = SimpleNamespace(path=MODEL, revision=None)
ASKED: dict[str, Callable[[], Any]] = {
    f"model.path {MODEL}": lambda: config.load_config(SECTION),
    f"task.tokenizer {MODEL}": lambda: processors.load_tokenizer(MODEL, key="task.tokenizer"),
    "model.path google/vit": lambda: processors.load_image_processor("google/vit"),
    "task.data a/b": lambda: data_hub.hub_file("a/b", "x.txt", None, "put it there"),
    "task.data a/c": lambda: data_hub.hub_files("a/c", "*.txt", None, "put it there"),
}


@pytest.fixture(autouse=True)
def slow_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that tries for 0.3 s, where 0.02 s are a wait that is worth a line."""

    def ask(*_: Any, **__: Any) -> Any:
        time.sleep(0.3)
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(hub, "SECONDS", 0.02)
    monkeypatch.setattr(hub, "answers", lambda _: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    for client in ("AutoConfig", "AutoTokenizer", "AutoImageProcessor"):
        monkeypatch.setattr(f"transformers.{client}.from_pretrained", ask)
    monkeypatch.setattr(data_hub, "hf_hub_download", ask)
    monkeypatch.setattr(data_hub, "snapshot_download", ask)


@pytest.mark.parametrize("what", ASKED)
def test_the_wait_is_said_with_its_way_out(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        ASKED[what]()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting for the hub (https://huggingface.co): {what}, for up to")
    assert "HF_HUB_OFFLINE=1" in line and "a folder" in line


@pytest.mark.parametrize("other", ["offline", "rank 1", "a folder", "quick"])
def test_it_is_not_said_where_nothing_is_waited_for(
    other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    if other == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if other == "rank 1":
        monkeypatch.setenv("RANK", "1")
    if other == "quick":
        monkeypatch.setattr(hub, "SECONDS", 1.0)
    path = str(tmp_path) if other == "a folder" else MODEL
    with hub.waiting(path, "model.path"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_hub_that_cannot_be_reached_is_said_before_its_client_tries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "getproxies", dict)
    with hub.waiting(MODEL, "model.path"):
        assert f"waiting for the hub ({address})" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hub.answers(f"http://127.0.0.1:{port}") and not hub.answers(address)
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy:3128"})
    assert hub.answers(address)
