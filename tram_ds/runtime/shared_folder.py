"""Whether all nodes of a job see one folder: found before the first step, not when the first save
fails."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from tram_ds.runtime.files import remove_file
from tram_ds.runtime.peers import Peers

PATIENCE = 10.0  # seconds: NFS shows new files late


def refuse_unshared(run_dir: Path, world_size: int, patience: float = PATIENCE) -> None:
    """ValueError on every rank where one does not see what rank 0 writes in `run_dir`, which exists
    there: a checkpoint would lack its part. Collective."""
    if world_size == 1:
        return
    peers = Peers(world_size)
    try:
        unseen = unshared(run_dir, peers, patience)
    finally:
        peers.close()
    if unseen:
        raise ValueError(
            f"run_dir = {run_dir} is not shared: {unseen}: set run_dir to a folder that all nodes "
            "share"
        )


def unshared(folder: Path, peers: Peers, patience: float) -> str:
    """Which ranks do not see what rank 0 writes in `folder`, which exists there; "" where all do.
    Collective."""
    # rank 0's word, a fresh one: a probe that an earlier job left would be seen without sharing
    probe = folder / peers.gather(f".shared-{secrets.token_hex(8)}.tmp")[0]
    try:
        peers.first(f"writing in {folder}", lambda: probe.touch(mode=0o600))
        end = time.monotonic() + patience
        while not (seen := probe.is_file()) and time.monotonic() < end:
            time.sleep(0.2)
        # every rank comes here before rank 0 removes the file, so none looks for it in vain
        found = peers.gather((seen, os.uname().nodename))
    finally:
        if peers.rank == 0:
            remove_file(probe)
    blind = [f"rank {rank} on {node}" for rank, (seen, node) in enumerate(found) if not seen]
    if not blind:
        return ""
    return f"{', '.join(blind[:3])} does not see what rank 0 on {found[0][1]} wrote there"
