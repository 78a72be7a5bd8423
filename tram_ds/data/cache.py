"""Directories that are built once and never seen half-built, whoever else builds them and whenever
they are killed.

A directory is filled under a temporary name beside its final one and renamed into place. Builders
on one file system take turns through an flock, which the kernel drops when a process dies; where
flock is not available they race and the loser discards its copy. Directories are created 0700 and
files made private to the user (0600).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from tram_ds.runtime.errors import DataError
from tram_ds.runtime.files import publish, remove_tree, sync_tree
from tram_ds.runtime.locks import locked
from tram_ds.runtime.paths import expanded

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache directory, created: `cache_dir`, or $TRAM_DS_CACHE, or tram_ds in
    $XDG_CACHE_HOME, or in ~/.cache where that is unset or, as its standard says, not absolute."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    shared = xdg if xdg.is_absolute() else Path("~/.cache")
    own = expanded(os.environ.get("TRAM_DS_CACHE", ""), "TRAM_DS_CACHE")
    root = Path(cache_dir or own or shared / "tram_ds").expanduser()
    _make(root)
    return root


def build_once(path: Path, build: Callable[[Path], None], valid: Callable[[Path], bool]) -> Path:
    """Returns `path` holding what `build(empty_directory)` wrote and `valid(path)` accepts; builds
    only if needed.

    A `path` that `valid` rejects (damaged after it was written) is removed and built again.
    DataError where the cache has no room or may not be written; nothing half-built is left there.
    """
    if valid(path):
        return path
    _make(path.parent)
    with _writable(path.parent):
        return _built(path, build, valid)


def _built(path: Path, build: Callable[[Path], None], valid: Callable[[Path], bool]) -> Path:
    with locked(path.parent / f".{path.name}.lock") as alone:
        # nobody on this machine can be building now: whatever lies here was left by a killed
        # builder
        if alone:
            _discard(path.parent.glob(_temporary_prefix(path) + "*"))
        # again: another may have built it while this one waited for the lock
        if valid(path):
            return path
        _discard([path])
        # pid and random part: where the file system has no locks several build at once
        temporary = path.parent / f"{_temporary_prefix(path)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(mode=0o700)
        try:
            build(temporary)
            # before the rename, or a crash could leave the final name with half of the bytes
            _make_private_and_durable(temporary)
            _publish(temporary, path, valid)
        finally:
            _discard([temporary])
    return path


def digest_of(*parts: str | int) -> str:
    """Short hex key of the parts: 32 characters of their sha256."""
    # a NUL between: ("ab", "c") and ("a", "bc") are two keys
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:32]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create the cache folder {folder} ({error}); set TRAM_DS_CACHE to another"
        ) from error


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """A full or read-only cache is the user's to mend; what is read while one builds fails with
    other errors, which stay theirs."""
    try:
        yield
    except OSError as error:
        denied = isinstance(error, PermissionError) and str(error.filename).startswith(str(folder))
        if not denied and error.errno not in UNWRITABLE:
            raise
        raise DataError(
            f"cannot write to the cache folder {folder} ({error.strerror}): free some space there, "
            "or set TRAM_DS_CACHE or task.cache_dir to another"
        ) from error


def _temporary_prefix(path: Path) -> str:
    host = "".join(c if c.isalnum() else "_" for c in platform.node())
    return f".{path.name}.{host}.tmp-"  # with the host: an flock may hold on one node only


def _publish(temporary: Path, path: Path, valid: Callable[[Path], bool]) -> None:
    try:
        publish(temporary, path)
    except OSError:
        if not valid(path):  # another builder came first is fine; anything else is not
            raise


def _make_private_and_durable(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        # build() calls other libraries, whose files have whatever mode the umask leaves
        os.chmod(folder, 0o700)
        for name in files:
            os.chmod(os.path.join(folder, name), 0o600)
    sync_tree(directory)


def _discard(paths: Iterator[Path] | list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            remove_tree(path, ours=lambda _: True)  # a name that only this cache gives
