"""Which of a person's files are which split of which domain, by their names alone."""

from __future__ import annotations

import re
from pathlib import Path

from tram_ds.data.rows import READERS, kind_of, stem_of
from tram_ds.data.sources import SPLITS, some
from tram_ds.data.tables import check_whole
from tram_ds.runtime.errors import DataError

Files = dict[str, dict[str, list[Path]]]  # domain -> split -> its files, in order

NAMES = {name: split for split, names in SPLITS.items() for name in names}
# `train`, `train-00000-of-00002`, `train_news`
NAMED = re.compile(rf"({'|'.join(NAMES)})(?:[-_.].*|\d*)")


def find_files(path: Path) -> Files:
    """The files of `task.data`; nothing if it holds none that can be read.

    A file is one domain with a train split. In a folder, `train.*` and its like are splits of one
    domain, in folders below it those of the domain that the folder is called after; without them
    every file is a domain.
    """
    if path.is_file():
        return {stem_of(path): {"train": [path]}} if kind_of(path) else {}
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {folder.name: splits for folder in folders if (splits := _splits(folder))}
    own = _splits(path)
    if own and found:
        raise DataError(
            f"{path} has files called as splits itself and in {some(sorted(found))}: keep one of "
            "the two"
        )
    if own:
        return {path.resolve().name: own}
    return found or _apart(path)


def unread(path: Path, files: Files) -> list[str]:
    """Data files of the folder `path` itself that are none of `files`."""
    if path.is_file():
        return []
    taken = {file for splits in files.values() for paths in splits.values() for file in paths}
    return [file.name for file in _data_files(path) if file not in taken]


def kinds() -> str:
    """The endings that can be read, for a message."""
    return f"{', '.join(READERS)} (text kinds also .gz and .zst)"


def _data_files(folder: Path) -> list[Path]:
    there = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(path for path in there if kind_of(path))


def _splits(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in _data_files(folder):
        if name := NAMED.fullmatch(stem_of(path)):
            found.setdefault(NAMES[name[1]], []).append(path)
    for split, paths in found.items():
        names = {(NAMED.fullmatch(stem_of(path)) or [""])[1] for path in paths}
        if len(names) > 1 or len({kind_of(path) for path in paths}) > 1:
            raise DataError(
                f"{folder} has more than one {split} split: "
                f"{some([path.name for path in paths])}: keep one"
            )
        check_whole(paths)
    return {split: found[split] for split in SPLITS if split in found}


def _apart(folder: Path) -> Files:
    """Every file as a domain."""
    found: Files = {}
    for path in _data_files(folder):
        if stem_of(path) in found:
            raise DataError(f"{folder} has {stem_of(path)} in more than one file: keep one")
        found[stem_of(path)] = {"train": [path]}
    return found
