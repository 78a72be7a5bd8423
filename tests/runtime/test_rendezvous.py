"""Ranks that wait say for whom, and end naming who did not come."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from tests.ranks import free_port
from tram_ds.runtime import rendezvous
from tram_ds.runtime.exits import PeerLost


@pytest.fixture
def address(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.3)
    return f"127.0.0.1:{port}"


def test_rank_0_says_for_whom_it_waits_and_who_did_not_come(address, capfd):
    with pytest.raises(PeerLost, match=r"rank 1, 2 did not come within 1 s.*is the port free"):
        rendezvous.meet(0, 3, timedelta(seconds=1))
    assert f"rank 0 waits for rank 1, 2 of 3 at {address}" in capfd.readouterr().err


def test_a_late_rank_is_waited_for_and_then_nothing_more_is_said(address, capfd):
    stores = []

    def late():
        time.sleep(0.7)
        stores.append(rendezvous.meet(1, 2, timedelta(seconds=20)))

    thread = threading.Thread(target=late)
    thread.start()
    stores.append(rendezvous.meet(0, 2, timedelta(seconds=20)))
    thread.join()
    assert len(stores) == 2
    assert "rank 0 waits for rank 1 of 2" in capfd.readouterr().err


def test_a_rank_says_that_rank_0_is_not_there(address, capfd):
    with pytest.raises(PeerLost, match="rank 1 of 2 could not join"):
        rendezvous.meet(1, 2, timedelta(seconds=1))
    assert f"rank 1 waits for rank 0 at {address}" in capfd.readouterr().err


def test_ranks_that_are_all_there_say_nothing(address, capfd, monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE", 10.0)  # a busy machine is not a missing rank
    thread = threading.Thread(target=rendezvous.meet, args=(1, 2, timedelta(seconds=20)))
    thread.start()
    rendezvous.meet(0, 2, timedelta(seconds=20))
    thread.join()
    assert "waits for" not in capfd.readouterr().err
