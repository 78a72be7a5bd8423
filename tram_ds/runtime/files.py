"""Files and folders written whole, private to their owner; and the only place that removes or
replaces any: everything else in tram_ds/ and launch/ asks here (tests/runtime/test_files.py)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"  # ends the hidden name that write_whole writes under


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes or replaces a file: readers, and whoever looks after a crash, see the old text or the
    new one. Mode 0600."""
    # in the same folder: a rename is one step within a file system only
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
    try:
        # the mode from the first byte on: chmod afterwards would leave a moment for others
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            # before the rename: some file systems keep the new name and lose the bytes
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        remove_file(temporary)


def is_temporary(path: Path) -> bool:
    """Whether `path` is what a killed write_whole left."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def refuse_unwritable(path: Path, key: str) -> None:
    """ValueError unless a file can be written at `path`; its folder is made. Nothing else is left.

    key: what messages call it, such as `--out`.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # its name may be too long
        probe.touch(mode=0o600)
        remove_file(probe)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {path}: cannot be written ({error}): give another") from error


def keep_text(path: Path, text: str, key: str) -> int:
    """Writes results that cost hours to `path`, which could be written when they were begun.

    Where it no longer can they are kept in the system's folder for temporary files, and failing
    that too they are printed; which, and why, is said in one line. Returns the exit code, 2 then.
    """
    try:
        path.write_text(text, encoding="utf-8")
        return 0
    except OSError as error:
        why = error
    try:
        place, kept = tempfile.mkstemp(f"-{path.name[-40:]}", "tram_ds-")
        with open(place, "w", encoding="utf-8") as file:
            file.write(text)
        where = f"they are kept as {kept}"
    except OSError:
        print(text, end="")
        where = "they are printed above"
    print(f"error: {key} {path}: the results cannot be written ({why}): {where}", file=sys.stderr)
    return 2


def private_dir(path: Path) -> None:
    """Makes the folder with mode 0700 if it does not exist; the mode of an existing one is the
    user's choice."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `final` at the end; where anything fails before, none
    of it is left. OSError where `final` holds anything."""
    final.parent.mkdir(parents=True, exist_ok=True)
    name = f".{final.name[:40]}."
    with tempfile.TemporaryDirectory(prefix=name, suffix=TEMPORARY, dir=final.parent) as own:
        folder = Path(own) / "folder"
        folder.mkdir()
        yield folder
        sync_tree(folder)
        publish(folder, final)


def publish(partial: Path, final: Path) -> None:
    """The finished `partial` becomes `final` in one step: a file in place of an old one, a folder
    where there is none or an empty one (OSError where it holds anything). Its contents are
    durable already: `sync_tree`."""
    os.replace(partial, final)
    sync(final.parent)  # a rename is durable once the folder that holds the name is


def sync(path: Path) -> None:
    """Returns when what the file, or the list of names in the folder, holds now is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """sync() for the folder and all that is in it, innermost first; links are not followed."""
    for top, _, names in os.walk(folder, topdown=False):
        for path in (Path(top) / name for name in names):
            if not path.is_symlink():
                sync(path)
        sync(Path(top))


def set_aside(path: Path, to: Path) -> None:
    """Another name for what somebody may still want; FileExistsError where that name is taken."""
    if os.path.lexists(to):
        raise FileExistsError(f"{to} is there already")
    # a look before, because rename replaces a file or an empty folder without a word
    os.rename(path, to)


def remove_file(path: Path) -> None:
    """Removes a file of ours, or a link; the link's target stays. Nothing where there is none."""
    path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Removes a folder; OSError where anything is in it."""
    folder.rmdir()


def remove_tree(folder: Path, ours: Callable[[Path], bool]) -> bool:
    """Removes a folder of which `ours(path)` holds for every file; else nothing of it, and False.

    A link is a file, and is never followed; so a folder that is one is not a tree of ours.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    found = [Path(top) / name for top, _, names in os.walk(folder) for name in names]
    links = [Path(top) / name for top, names, _ in os.walk(folder) for name in names]
    if not all(map(ours, [*found, *filter(Path.is_symlink, links)])):
        return False
    # only now: every file was looked at before the first one goes
    shutil.rmtree(folder)
    return True
