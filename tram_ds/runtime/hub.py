"""What is waited for where the Hugging Face hub does not answer: its clients retry for a minute,
in words of their own, before they give up."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 1.0  # of silence, before it is said
HUB = "https://huggingface.co"


@contextmanager
def waiting(path: str, key: str) -> Iterator[None]:
    """Says once, on rank 0, what is asked of the hub: at once where that cannot be reached, else
    after SECONDS. Not where `path` is a folder here. key: of the recipe."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank != "0" or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or Path(path).exists():
        yield
        return
    address = os.environ.get("HF_ENDPOINT") or HUB
    line = (
        f"waiting for the hub ({address}): {key} {path}, for up to a minute or as long as it "
        f"downloads. Without a network: stop this and give {key} a folder with the files, or set "
        "HF_HUB_OFFLINE=1, which takes what is in the hub cache (HF_HOME)"
    )
    timer = Timer(SECONDS, lambda: print(line, file=sys.stderr, flush=True))
    # a process that ends meanwhile does not wait for it
    timer.daemon = True
    if answers(address):
        timer.start()
    else:
        timer.function()
    try:
        yield
    finally:
        timer.cancel()


def answers(address: str) -> bool:
    """Whether somebody listens there, or a proxy, which this does not ask, may reach it."""
    url = urlsplit(address)
    if url.scheme in getproxies() or url.hostname is None:
        return True
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
