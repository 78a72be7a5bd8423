"""Every rank reads the data for itself, and all of them step together: what they read must be the
same, or none begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tram_ds.runtime.errors import DataError
from tram_ds.runtime.exits import PeerLost
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.wording import short

T = TypeVar("T")


def read_alike(
    read: Callable[[], T], facts: Callable[[T], Mapping[str, Any]], world_size: int, data: str
) -> T:
    """read() on every rank. Collective, inside a process group where the job has several ranks.

    facts: what must be the same everywhere for what was read, by its name in messages. data: what
    messages call it. DataError on all ranks, naming one, where a rank cannot read or reads
    something else: a folder or a cache that is not the same on all nodes.
    """
    found: T | None = None
    failure: Exception | None = None
    mine: dict[str, Any] = {"node": os.uname().nodename}
    try:
        found = read()
        mine["facts"] = dict(facts(found))
    # gathered, not raised: the other ranks are in gather() already, and would wait there
    except Exception as error:
        failure = error
        # ours: a mistake in the data, exit 2; else storage that one node cannot reach, exit 6
        mine |= {"error": str(error), "ours": isinstance(error, ValueError)}
    peers = Peers(world_size)
    try:
        all_ = peers.gather(mine)
    finally:
        peers.close()
    if failure is not None:
        raise failure
    _refuse_failed(all_)
    _refuse_other(all_, data)
    return found  # type: ignore[return-value]


def _refuse_failed(ranks: list[dict[str, Any]]) -> None:
    for rank, of in enumerate(ranks):
        if "error" in of:
            kind = DataError if of["ours"] else PeerLost
            raise kind(f"rank {rank} on {of['node']}: {of['error']}")


def _refuse_other(ranks: list[dict[str, Any]], data: str) -> None:
    first = ranks[0]
    for rank, of in enumerate(ranks):
        for name, value in of["facts"].items():
            if value != first["facts"][name]:
                raise DataError(
                    f"{data} is not the same on all ranks: {name} {short(value)} for rank {rank} "
                    f"on {of['node']}, {short(first['facts'][name])} for rank 0 on "
                    f"{first['node']}: put it where all nodes share it, or the same files on each"
                )
