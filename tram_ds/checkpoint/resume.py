"""Saving and resuming a run: one format for every engine and world size; a checkpoint exists whole
or not at all.

What is written: fp32 masters, optimizer moments, references (theta_{t-1}, theta_0, EMA), persistent
buffers, and a JSON manifest with everything else. Not written, because they follow from the step
and the seed: data position, random state, learning rate. Everything here that takes a stepper is
collective: all ranks of its job call it, at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tram_ds.algorithms.stepper import Stepper
from tram_ds.checkpoint import files, tensors
from tram_ds.checkpoint import state as states
from tram_ds.checkpoint.changes import changed
from tram_ds.checkpoint.commits import candidates, latest
from tram_ds.checkpoint.manifest import Manifest, problems, read_manifest, verify
from tram_ds.checkpoint.save import Saver
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers

__all__ = ["Resumed", "Saver", "candidates", "changed", "latest", "load", "resume", "verify"]


@dataclass(frozen=True)
class Resumed:
    """What `resume` loaded. refused: newer commits that were not used, and why. changes:
    differences that were allowed."""

    path: Path
    manifest: Manifest
    refused: list[str]
    changes: list[str]


def load(stepper: Stepper, path: Path | str) -> Manifest:
    """Verifies the checkpoint in folder `path` and continues `stepper` from it, whatever engine
    wrote it. Collective.

    CheckpointError, on every rank: a file is damaged, a parameter differs in name or shape, or the
    optimizer's moments or the algorithm's reference are not in it (without its reference the next
    step would silently measure d = 0).
    """
    peers = Peers(stepper.engine.world_size)
    try:
        manifest, bad = _inspect(Path(path), peers)
        if bad:
            raise CheckpointError(bad)
        _fill(stepper, Path(path), manifest, peers)
        return manifest
    finally:
        peers.close()


def resume(
    stepper: Stepper,
    run_dir: Path | str,
    *,
    recipe: dict[str, Any] | None = None,
    data: str | None = None,
    allow_change: bool = False,
    fallback: bool = False,
) -> Resumed | None:
    """Loads the newest commit of the run, or returns None where there is none. Collective; hold the
    folder's lock.

    A damaged commit is refused by name; with fallback, the newest whole one before it is used.
    CheckpointError lists every difference between the recipe (and data digest) then and now, unless
    allow_change.
    """
    peers = Peers(stepper.engine.world_size)
    try:
        # rank 0's list for all: on NFS others may not see the newest yet, and load another
        found = peers.first("looking for checkpoints", lambda: candidates(run_dir))
        refused: list[str] = []
        for path in found:
            manifest, bad = _inspect(path, peers)
            if not bad:
                # after the files: what a damaged manifest says of its recipe is worth nothing
                changes = _changes(manifest, stepper, recipe, data)
                if changes and not allow_change:
                    raise CheckpointError(
                        f"{path.name} is of a different run; undo the change, or allow it with "
                        f"--allow-change: {'; '.join(changes)}"
                    )
                _fill(stepper, path, manifest, peers)
                return Resumed(path, manifest, refused, changes)
            refused.append(bad)
            if not fallback:
                break
        if not refused:
            return None
        other = "no earlier one is whole" if fallback else "--fallback goes back to an earlier one"
        raise CheckpointError(f"refused: {'; '.join(refused)} ({other})")
    finally:
        peers.close()


def _changes(
    manifest: Manifest, stepper: Stepper, recipe: dict[str, Any] | None, data: str | None
) -> list[str]:
    """Differences that matter; where one side gave no recipe, its algorithm and seed are still
    compared."""
    found = changed(manifest["recipe"], recipe) if manifest["recipe"] and recipe else []
    now = states.describe(stepper) | {"data": data}
    for key in ("algorithm", "seed", *(["data"] if data and manifest["data"] else [])):
        if manifest[key] != now[key] and not any(
            line.split(":")[0].split(".")[0] == key for line in found
        ):
            found.append(f"{key}: {manifest[key]!r} -> {now[key]!r}")
    return found


def _inspect(path: Path, peers: Peers) -> tuple[Manifest, str]:
    """(manifest, "") or ({}, what is wrong). Collective: the ranks share the hashing."""
    try:
        # one reading for all ranks, so that all go by the same file list
        manifest = peers.first("reading the manifest", lambda: read_manifest(path))
        mine = peers.every(
            "verifying", lambda: problems(path, manifest, peers.rank, peers.world_size)
        )
    except CheckpointError as error:
        return {}, str(error)
    return manifest, "; ".join(line for rank in peers.gather(mine) for line in rank)


def _fill(stepper: Stepper, path: Path, manifest: Manifest, peers: Peers) -> None:
    """Reads verified files into the stepper. Collective."""
    doing = f"loading {path}"
    # until the last byte is read: another process's retention may be at work in the folder
    with files.reading(path):
        peers.every(doing, lambda: states.refuse_displaced(stepper))
        shapes = states.shapes(stepper, peers)
        peers.every(doing, lambda: states.check(stepper, manifest, shapes))
        # into new memory, applied once all ranks have read: a failed read changes no stepper
        state, copies, wanted = peers.every(doing, lambda: states.empty(stepper, manifest))
        peers.every(doing, lambda: tensors.read(wanted, path, peers))
        peers.every(doing, lambda: states.apply(stepper, state, copies))
