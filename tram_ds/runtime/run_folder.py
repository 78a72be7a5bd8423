"""Where a run may live, what is in its folder, and the only place that empties one.

The law: nothing that a run did not make is ever removed. `run_layout.MADE` is the whole list of
what a run makes; whatever else lies in a folder is somebody's, and then the folder is refused,
whatever was asked for. Symbolic links are somebody's too, and so is a model card that was changed.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from tram_ds.runtime import files
from tram_ds.runtime.run_layout import (
    CARD,
    JOBS,
    LOCKS,
    MADE,
    RunFolder,
    is_one_of,
    made,
    matches,
    replaced,
)
from tram_ds.runtime.signed import is_signed

SHOWN = 3  # strangers that a message names


def strangers(folder: Path, root: Path | None = None) -> list[str]:
    """Relative paths of what is in a run folder although no run makes it, in order; a folder full
    of it counts once.

    folder: a part of the run folder `root` (the whole of it by default).
    """
    root = root or folder
    return [str(p.relative_to(root)) for p, known in _entries(folder, root) if not known]


def refuse_place(run_dir: Path) -> None:
    """ValueError where no run may live: the folder one stands in or one above it (a root always
    is), a home folder."""
    # links resolved on both sides, or a link to home would pass
    real, here = run_dir.resolve(), Path.cwd().resolve()
    # $HOME may be set to anything
    homes = [Path.home().resolve(), Path(pwd.getpwuid(os.getuid()).pw_dir).resolve()]
    why = None
    if real == here or real in here.parents:
        why = "is the folder you are in" if real == here else "holds the folder you are in"
    elif any(real == home or real in home.parents for home in homes):
        why = "is a home folder" if real in homes else "holds a home folder"
    elif run_dir.exists() and not run_dir.is_dir():
        why = "is a file"
    if why:
        raise ValueError(
            f"run_dir = {run_dir} {why}: a run needs a folder of its own, such as "
            f"run_dir={_child(run_dir)}"
        )


def refuse(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """ValueError, with the ways out, where a run that starts in `run_dir` could cost somebody a
    file. Changes nothing.

    resume: the run that is there is continued. overwrite: what it made is removed first. With
    neither only a folder without a run is taken. A folder with anything in it that no run makes is
    refused with any of them.
    """
    refuse_place(run_dir)
    if run_dir.is_symlink() and overwrite:
        real = run_dir.resolve()
        raise ValueError(
            f"run_dir = {run_dir} is a symbolic link, which --overwrite does not follow: name "
            f"{real} itself"
        )
    if not run_dir.is_dir():
        return
    if others := strangers(run_dir):
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise ValueError(
            f"run_dir = {run_dir} holds what no run makes ({', '.join(others[:SHOWN])}{more}): "
            "choose a folder of its own, such "
            f"as run_dir={_child(run_dir)}, or move that out of it; a run removes only what a run "
            "made"
        )
    if not (resume or overwrite) and (found := begun(run_dir)):
        raise ValueError(
            f"{run_dir} holds a run ({found}): continue it with --resume, choose another run_dir, "
            "or remove what it made and "
            "start afresh with --overwrite"
        )


def empty(run_dir: Path) -> None:
    """Removes what a run made, but its locks. Call it after `refuse`, holding the folder's lock."""
    entries = list(_entries(run_dir, run_dir))
    assert all(known for _, known in entries), "refuse() comes first"
    for path, _ in entries:
        if path.parent != run_dir or not is_one_of(LOCKS, path.name):
            files.remove_file(path)
    # files first, then folders from the innermost out: each is empty when its turn comes
    folders = [Path(found) for found, _, _ in os.walk(run_dir)]
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        if folder != run_dir and not is_one_of(JOBS, folder.relative_to(run_dir).parts[0]):
            files.remove_empty(folder)  # fails where something came in meanwhile


def replace_export(partial: Path, folder: Path) -> None:
    """`partial` becomes `folder`, an export of this run. An old one with a stranger in it is set
    aside, not removed."""
    if folder.is_symlink() or (folder.exists() and strangers(folder, folder.parent)):
        aside = next(
            p
            for n in range(1, 10**6)
            if not (p := folder.with_name(f"{folder.name}.kept-{n}")).exists()
        )
        files.set_aside(folder, aside)
        print(f"{folder} held files that no run makes: kept as {aside}")
    # durable before any name changes
    files.sync_tree(partial)
    old = replaced(folder)
    # before the old one is discarded: after a crash between the renames it is the only one
    restore_export(folder)
    discard_export(old)
    # Two renames and nothing else between the old and the new: a crash there leaves both whole.
    if folder.exists():
        files.set_aside(folder, old)
    files.publish(partial, folder)
    discard_export(old)


def restore_export(folder: Path) -> None:
    """Puts back the export that a killed replace_export had set aside and not yet replaced."""
    if not folder.exists() and (old := replaced(folder)).is_dir():
        files.publish(old, folder)


def discard_export(folder: Path) -> None:
    """Removes an export, or a part of one, of which every file is one that a run makes; nothing
    where there is none."""
    files.remove_tree(folder, lambda path: _ours(path, folder.parent))


def _ours(path: Path, root: Path) -> bool:
    """Whether the file is one that a run makes, in the run folder `root`."""
    return made(str(path.relative_to(root))) and (path.name != CARD or is_signed(path))


def _entries(folder: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """Files of a run (path, True), and whatever else is there (path, False); known folders are gone
    through."""
    for path in _listed(folder):
        if path.parent == root and path.is_dir() and is_one_of(JOBS, path.name):
            continue  # neither a stranger nor the run's: left alone
        parts = path.relative_to(root).parts
        if path.is_dir() and not path.is_symlink():
            if any(
                matches(list(parts), pattern.split("/")[: len(parts)])
                for pattern in MADE
                if pattern.count("/") >= len(parts)
            ):
                yield from _entries(path, root)
            else:
                yield path, False
        else:
            known = not path.is_symlink() and path.is_file() and _ours(path, root)
            if known or os.path.lexists(path):
                yield path, known


def _listed(folder: Path) -> list[Path]:
    """What is in it; nothing where it is gone: a job that holds this folder may be saving, and
    what it replaces is no stranger."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def begun(run_dir: Path) -> str:
    """What shows that a run was here; "" where none was: no folder, or nothing in it but locks."""
    if not run_dir.is_dir():
        return ""
    folder = RunFolder(run_dir)
    saved = sorted(p.name for p in folder.checkpoints.glob("step-*") if ".tmp-" not in p.name)
    if folder.ended:
        return "finished"
    if saved:
        return f"saved up to {saved[-1]}"
    left = [p.name for p in sorted(run_dir.iterdir()) if not is_one_of((*LOCKS, *JOBS), p.name)]
    return f"not saved yet: {', '.join(left[:SHOWN])}" if left else ""


def _child(run_dir: Path) -> str:
    return str(run_dir / "my-run") if run_dir.is_dir() or not run_dir.name else f"{run_dir}-run"
