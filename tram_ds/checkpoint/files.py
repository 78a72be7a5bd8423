"""Checkpoints on disk: the commit, and retention. Plain files, no tensors, no collectives.

<run_dir>/checkpoints/step-00000100/    committed: the rename to this name is the commit
    shard-00001-model-00001-of-00003.safetensors   rank 0's part of the first kind of tensors, ...
    manifest.json                       everything else, with size and sha256 of every file
<run_dir>/checkpoints/latest            the newest commit's name, for people and scripts; never
                                        needed to load
step-X.tmp-ID       a save in progress, or what a killed one left: never a candidate, removed at the
                    next start
step-X.old          the commit that a second save of the same step replaces: a candidate until that
                    one is in place
step-X.superseded   a commit beyond a step saved later: the run went back and took another way.
                    Yours to delete
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tram_ds.checkpoint.commits import candidates, folder, name, step_of
from tram_ds.checkpoint.manifest import Manifest, describe, digest_of
from tram_ds.runtime import files as disk
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.locks import locked
from tram_ds.runtime.run_layout import LATEST, MANIFEST, WEIGHTS


def prepare(run_dir: Path | str) -> Path:
    """Makes the folder, proves it writable, and removes what killed saves left. Call it while
    holding the run's lock."""
    where = folder(run_dir)
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkdir's mode is cut by the umask, and does nothing to a folder that is there
    os.chmod(where, 0o700)
    probe = where / f"probe.tmp-{secrets.token_hex(4)}"
    disk.write_whole(probe, "writable")
    # a list: entries go while it is walked through
    for path in list(where.iterdir()):
        replaced = path.name.endswith(".old") and (where / path.name.removesuffix(".old")).exists()
        if ".tmp-" in path.name or disk.is_temporary(path) or replaced:
            _remove(path)
    return where


def begin(where: Path, step: int) -> Path:
    """A new, private folder to write the checkpoint of `step` into."""
    # pid and random part: two saves of one step never write into one folder
    partial = where / f"{name(step)}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir(mode=0o700)
    return partial


def seal(partial: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Makes this rank's files private and durable, and describes them: file name -> size and
    sha256."""
    mine = sorted(p for p in partial.iterdir() if p.name.startswith(prefix))
    for file in mine:
        # durable before the manifest names it: the commit's rename must not outrun the bytes
        os.chmod(file, 0o600)
        disk.sync(file)
    return {file.name: describe(file) for file in mine}


def commit(partial: Path, manifest: Manifest, keep: int) -> Path:
    """Writes the manifest, makes everything durable, renames: after that, and only then, the
    checkpoint exists."""
    written = {p.name for p in partial.iterdir()}
    if written != set(manifest["files"]):
        odd = ", ".join(sorted(written ^ set(manifest["files"])))
        raise CheckpointError(
            f"{partial}: does not hold exactly what its ranks wrote ({odd}): is it on storage "
            "that all nodes share?"
        )
    # as it will be read back: the digest is of JSON's lists and keys, not of tuples and numbers
    manifest = json.loads(json.dumps(manifest, default=str))
    disk.write_whole(
        partial / MANIFEST,
        json.dumps(manifest | {"digest": digest_of(manifest)}, indent=1, sort_keys=True),
    )
    where, final = partial.parent, partial.parent / name(manifest["step"])
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        if old.exists():
            _remove(old)
        if old.exists():  # somebody's file is in it
            disk.set_aside(old, _free(final.with_name(f"{final.name}.superseded")))
        disk.set_aside(final, old)
    # The order is the promise: until this rename the old commits are what a crash leaves, and only
    # after it does any of them go.
    disk.publish(partial, final)
    # after the rename, so that a crash leaves at most an older name in it, never one of no commit
    disk.write_whole(where / LATEST, final.name + "\n")
    _retire(where, final, keep)
    return final


def _retire(where: Path, newest: Path, keep: int) -> None:
    """Sets abandoned commits aside and deletes those beyond `keep`, never the newest nor one that
    is being read."""
    for path in candidates(where.parent):
        # kept as a candidate, it would be the newest at the next resume, and undo the way back
        if (step_of(path) or 0) > (step_of(newest) or 0):
            disk.set_aside(path, _free(path.with_name(f"{path.name}.superseded")))
    commits = candidates(where.parent)
    surplus = [p for p in commits if p.name.endswith(".old")] + [
        p for p in commits if not p.name.endswith(".old")
    ][keep:]
    for path in surplus:
        if path != newest and not _being_read(path):
            _remove(path)


def _free(path: Path) -> Path:
    return path if not path.exists() else path.with_name(f"{path.name}-{secrets.token_hex(4)}")


def discard(partial: Path | None) -> None:
    """Removes a save that failed, as far as that is possible."""
    if partial is not None:
        with suppress(OSError):
            _remove(partial)


def _remove(path: Path) -> None:
    """Removes a commit or what is left of a save, but no commit that somebody put a file into.

    Renames first: a deletion that is killed half-way must not leave something that looks like a
    commit.
    """
    if ".tmp-" not in path.name and not disk.is_temporary(path):
        if path.is_symlink() or not all(map(_written_by_a_save, path.iterdir())):
            return
        # a name that prepare() clears away at the next start, should this process die here
        doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
        disk.set_aside(path, doomed)
        path = doomed
    if not disk.remove_tree(path, ours=lambda _: True):
        disk.remove_file(path)


def _written_by_a_save(file: Path) -> bool:
    ours = file.name == MANIFEST or file.name.endswith(WEIGHTS)
    return ours and file.is_file() and not file.is_symlink()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Holds a shared lock on the manifest inside: another process's retention leaves this
    checkpoint alone.

    Best effort: on file systems without flock (some NFS mounts) nothing is held.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # one that is gone or not ours to read is refused by its reader
            stack.enter_context(locked(path / MANIFEST, shared=True, create=False))
        yield


def _being_read(path: Path) -> bool:
    try:
        # ours alone, had for a moment: a reader holds it shared, and then it is not to be had
        with locked(path / MANIFEST, timeout=0, create=False):
            return False
    except TimeoutError:
        return True
    except OSError:
        return False
