"""Where the ranks of a job meet, and for whom they wait."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from tram_ds.runtime.exits import PeerLost

PATIENCE = 15.0  # seconds until a rank that waits says for whom, and between two times
SHOWN = 8


def meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once all ranks are there. Collective.

    PeerLost where they are not within `timeout`, naming those that did not come.
    """
    end = time.monotonic() + timeout.total_seconds()
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _connect(rank, world_size, end, where)
        store.set_timeout(timeout)
        # before anybody waits: each sees who has come, and can name who has not
        store.set(f"here/{rank}", socket.gethostname())
        missing = _wait(store, rank, world_size, end, where)
    except PeerLost:
        raise
    except (dist.DistError, RuntimeError) as error:
        raise _lost(rank, world_size, where, str(error).splitlines()[0]) from error
    if missing:
        said = f"{_names(missing)} did not come within {timeout.total_seconds():.0f} s"
        raise _lost(rank, world_size, where, said)
    return store


def _connect(rank: int, world_size: int, end: float, where: str) -> dist.Store:
    """torchrun's own store, else one that rank 0 serves: not waited for by torch, which says
    nothing."""
    host, _, port = where.rpartition(":")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        left = timedelta(seconds=max(1.0, end - time.monotonic()))
        store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=left))
        # keys of our own, apart from those of the agent whose store it is
        return dist.PrefixStore("tram_ds", store)
    if rank:
        _until_it_listens(rank, world_size, end, where)
    left = timedelta(seconds=max(1.0, end - time.monotonic()))
    # wait_for_workers: torch's waiting says nothing, ours in _wait names who is missing
    return dist.TCPStore(
        host, int(port), world_size, rank == 0, left, wait_for_workers=False, multi_tenant=True
    )


def _until_it_listens(rank: int, world_size: int, end: float, where: str) -> None:
    """Until rank 0 can be reached, or the time is over; torch's own client prints a stack for every
    attempt."""
    (host, _, port), told = where.rpartition(":"), time.monotonic()
    while time.monotonic() < end:
        try:
            with socket.create_connection((host, int(port)), timeout=5.0):
                return
        except OSError as error:
            if time.monotonic() - told >= PATIENCE:
                told = time.monotonic()
                _say(f"rank {rank} waits for rank 0 at {where} ({error.strerror or error})")
        time.sleep(0.1)
    raise _lost(rank, world_size, where, "rank 0 cannot be reached")


def _wait(store: dist.Store, rank: int, world_size: int, end: float, where: str) -> list[int]:
    """The ranks that are not there at the end; says every PATIENCE seconds who is missing."""
    others, began, said = list(range(world_size)), time.monotonic(), 0
    while others := [r for r in others if not store.check([f"here/{r}"])]:
        now = time.monotonic()
        if now >= end:
            return others
        if now - began >= PATIENCE * (said + 1):
            said += 1
            if rank in (0, others[0] - 1):  # the first that is there, if rank 0 itself is missing
                _say(f"rank {rank} waits for {_names(others)} of {world_size} at {where}")
        # longer and longer: a thousand ranks, fifty times a second, are a load on rank 0's store
        time.sleep(min(0.5, 0.02 * (1 + now - began)))
    return []


def _names(ranks: list[int]) -> str:
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank {', '.join(map(str, ranks[:SHOWN]))}{more}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lost(rank: int, world_size: int, where: str, why: str) -> PeerLost:
    return PeerLost(
        f"rank {rank} of {world_size} could not join its peers at {where} ({why}): is the port "
        "free, were all ranks started, and do they agree on WORLD_SIZE?"
    )
