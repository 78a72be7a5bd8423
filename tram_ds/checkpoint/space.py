"""Room on the disk for what a run will write: asked before the first step, waited for before each
save, so that weights that were trained are not lost to a disk that somebody else has filled."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers

T = TypeVar("T")
FP32 = 4
LOGS = 16 * 2**20  # metrics, manifests, a tokenizer: small beside any model worth the question
POLL, TELL = 5.0, 60.0  # seconds between two looks at the disk, and between two lines about it
FULL = ("No space left on device", "Disk quota exceeded")  # ENOSPC and EDQUOT, as strerror says


def free(folder: Path) -> int:
    """Bytes that this user may still write there; of the nearest folder above that exists."""
    # the run folder may not be made yet when it is asked
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    # what is free to this user, without root's reserve
    return shutil.disk_usage(there).free


def weights_bytes(module: nn.Module, trained: bool = False) -> int:
    """All parameters, or those that train, once, in fp32, whole, however they are sharded."""
    counted = [p for p in module.parameters() if p.requires_grad or not trained]
    return FP32 * sum(getattr(p, "ds_numel", p.numel()) for p in counted)


@dataclass
class Space:
    """The disk under one run folder. Every method is collective; rank 0's view and clock decide.

    patience: seconds to wait for room. beat: tells a watchdog that waiting is not hanging.
    """

    folder: Path
    peers: Peers
    patience: float = 0.0
    beat: Callable[[str], None] = lambda _: None

    def require(self, needed: int, what: str) -> None:
        """CheckpointError, on every rank, where there is no room for `needed` bytes now."""
        if text := self._lacking(needed, what):
            raise CheckpointError(
                f"{text}: make room, set checkpoint.keep lower, or choose another run_dir"
            )

    def until_done(self, needed: int, what: str, action: Callable[[], T]) -> T:
        """action(), once there is room for `needed` bytes, and again where it found the disk full.

        action is collective and raises CheckpointError on all ranks alike. The last refusal is
        raised after `patience` seconds without room.
        """
        since, told = time.monotonic(), -math.inf
        while True:
            text = self._lacking(needed, what)
            refused = CheckpointError(text)
            if not text:
                try:
                    return action()
                except CheckpointError as error:
                    # by its words: on other ranks the errno is gone, only the text was gathered
                    if not any(words in str(error) for words in FULL):
                        raise
                    refused = error
            waited = time.monotonic() - since
            # by one clock: a rank that gave up alone would leave the others in action()
            if self.peers.gather(waited >= self.patience)[0]:
                raise refused
            if self.peers.rank == 0 and waited - told >= TELL:
                told = waited
                left = (self.patience - waited) / 60
                print(f"waiting {left:.1f} more minutes for room: {refused}", flush=True)
            self.beat("waiting for room on the disk")
            time.sleep(min(POLL, self.patience))

    def _lacking(self, needed: int, what: str) -> str:
        """What is missing, in words; "" where there is room."""
        # quotas and mounts may differ by node: one view decides, or the ranks go two ways
        mine = (free(self.folder) if self.peers.rank == 0 else 0, needed)
        there, needed = self.peers.gather(mine)[0]
        if there >= needed:
            return ""
        return f"{what} needs {_size(needed)}, and {self.folder} has {_size(there)} free"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
