"""Saving a run: all ranks write, rank 0 commits; a checkpoint exists whole or not at all.

Collective, as checkpoint.resume, which says what is written and what follows from step and seed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch

from tram_ds.algorithms import references
from tram_ds.algorithms.stepper import Stepper
from tram_ds.checkpoint import commits, files, pieces, space, tensors
from tram_ds.checkpoint import state as states
from tram_ds.checkpoint.changes import kept
from tram_ds.checkpoint.commits import candidates
from tram_ds.checkpoint.manifest import Manifest
from tram_ds.checkpoint.space import Space
from tram_ds.checkpoint.tensors import Flats
from tram_ds.engines.optimizer_state import moment_names
from tram_ds.engines.reading import Reading
from tram_ds.runtime.exits import CheckpointError, PeerLost
from tram_ds.runtime.peers import TIMEOUT, Peers
from tram_ds.runtime.run_lock import RunLock

GRACE = 60.0  # seconds that a background save may take to finish when the run ends with an error


class Saver:
    """Writes checkpoints of one stepper into one run folder. Collective throughout.

    recipe: the resolved recipe as plain data. data: a digest of the training rows. Both are
    compared on resume.
    keep: newest checkpoints to keep. lock: the folder's, as runtime.run_lock.held gave it to this
    rank; checked by every save. Building it removes what killed saves left, and proves that the
    folder is writable, before step 0. patience: seconds that a save waits for room on a full disk;
    beat is called meanwhile. As a context manager it waits for a background save at the end.
    """

    def __init__(
        self,
        run_dir: Path | str,
        stepper: Stepper,
        *,
        recipe: dict[str, Any] | None = None,
        data: str | None = None,
        keep: int = 2,
        lock: RunLock | None = None,
        patience: float = 0.0,
        beat: Callable[[str], None] = lambda _: None,
        timeout: timedelta = TIMEOUT,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint is kept")
        self.stepper, self.keep, self.lock = stepper, keep, lock
        # a group of its own: a background save gathers while the steps reduce in theirs
        self.peers = Peers(stepper.engine.world_size, timeout)
        parameters = states.shapes(stepper, self.peers)
        self.told = {
            "recipe": None if recipe is None else kept(recipe),
            "data": data,
            "parameters": parameters,
        }
        self.folder = self.peers.first(
            f"preparing {commits.folder(run_dir)}", lambda: files.prepare(run_dir)
        )
        self.space = Space(self.folder, self.peers, patience, beat)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, asynchronous: bool = False, also: Manifest | None = None) -> Path:
        """Commits the state after the last step; returns the folder it is in. CheckpointError on
        all ranks or on none.

        asynchronous: returns at once, and writes in the background while the next step's passes
        run; its descent, or a load, waits for the writing. Until then only the engine may move
        weights, and the reference weights of before that step live on. An error is raised by the
        next save() or wait(), on all ranks. A second save waits for the first. also: what the
        manifest says beside the stepper's state.
        """
        self.wait()
        doing = f"saving step {self.stepper.steps} in {self.folder}"

        # before reading(), which asserts that the weights are at theta
        self.peers.every(doing, lambda: states.refuse_unsettled(self.stepper))
        reading = self.stepper.engine.reading() if asynchronous else None

        def collect() -> tuple[Flats, Manifest]:
            # here and not in the thread: the next step counts on while that writes
            told = states.describe(self.stepper) | self.told | (also or {})
            return states.collect(self.stepper, reading), told

        try:
            mine, manifest = self.peers.every(doing, collect)
            if reading is None:
                self._patiently(doing, mine, manifest)
            else:
                arguments = (doing, mine, manifest, reading)
                # daemon: one that hangs on storage must not keep the process from ending
                self._thread = threading.Thread(
                    target=self._in_background, args=arguments, daemon=True
                )
                self._thread.start()
        except BaseException:
            if reading is not None:  # the descent would wait for nobody
                reading.close()
            raise
        return self.folder / commits.name(manifest["step"])

    def wait(self) -> None:
        """Returns when no save is under way; raises the error of one that failed in the
        background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            # raised once: the next save starts afresh
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits, then leaves the process group. Collective."""
        try:
            self.wait()
        finally:
            self.peers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        # not close(), which is collective: after an error the other ranks may never come to it
        elif self._thread is not None:
            self._thread.join(GRACE)

    def _in_background(self, doing: str, mine: Flats, manifest: Manifest, reading: Reading) -> None:
        device = self.stepper.engine.device
        if device.type == "cuda":
            # a new thread starts on GPU 0, where it would claim memory
            torch.cuda.set_device(device)
        try:
            self._patiently(doing, mine, manifest)
        except Exception as error:
            self._error = error
        finally:
            reading.close()

    def room(self, exports: int, dtype: torch.dtype = torch.float32) -> None:
        """CheckpointError, before the first step, where the disk has no room for what the run will
        keep: its checkpoints, the one being written beside them, `exports` whole models of `dtype`,
        logs."""
        module = self.stepper.engine.module
        weights, trained = (space.weights_bytes(module, trained=t) for t in (False, True))
        moments = moment_names(self.stepper.engine.weights.optimizer) or ()
        copies = 1 + len(moments) + len(references.names(self.stepper.algorithm))
        # rank 0's count: require() compares with what rank 0 sees of the disk
        there = self.peers.gather(len(candidates(self.folder.parent)))[0]
        # keep + 1: a commit is whole before an old one goes, so the two stand side by side
        more = max(1, self.keep + 1 - there)
        exported = weights * dtype.itemsize // space.FP32 * exports
        # trained: of adapters a checkpoint holds no base, an export may
        needed = trained * copies * more + exported + space.LOGS
        self.space.require(
            needed, f"this run ({more} more checkpoints, exports: {exports} of the model)"
        )

    def _patiently(self, doing: str, mine: Flats, manifest: Manifest) -> Path:
        """Writes once there is room. Collective."""
        # of all ranks together: they write into one folder
        needed = sum(self.peers.gather(sum(flat.piece.nbytes for flat in mine.values())))
        return self.space.until_done(needed, doing, lambda: self._write(doing, mine, manifest))

    def _begin(self, step: int) -> Path:
        if self.lock is not None:
            self.lock.check()
        return files.begin(self.folder, step)

    def _write(self, doing: str, mine: Flats, manifest: Manifest) -> Path:
        """Collective. All ranks write; rank 0 commits once every rank has written and hashed its
        files."""
        peers, partial = self.peers, None
        try:
            partial = peers.first(doing, lambda: self._begin(manifest["step"]))
            kinds, names = states.kinds(manifest), states.names(manifest)
            # Each call ends with all ranks knowing of every failure, so that none waits in the next
            # for a rank that has given up.
            peers.every(doing, lambda: tensors.write(mine, partial, kinds, names, peers))
            # each hashes its own files, so that rank 0 need not read them all
            sealed = peers.every(doing, lambda: files.seal(partial, pieces.prefix(peers.rank)))
            whole = manifest | {
                "files": {k: v for rank in peers.gather(sealed) for k, v in rank.items()}
            }
            return peers.first(doing, lambda: files.commit(partial, whole, self.keep))
        except (CheckpointError, PeerLost) as error:
            if peers.rank == 0:
                files.discard(partial)
            newest = commits.latest(self.folder.parent)
            left = (
                f"the newest checkpoint is {newest}" if newest else "there is no earlier checkpoint"
            )
            # the same kind again: exit codes tell a lost peer from a disk
            raise type(error)(f"{error}; the partial folder is removed, {left}") from error
