"""Which of a person's files are which split of which domain, by their names alone."""

from __future__ import annotations

import re
from pathlib import Path

from tram_ds.data.rows import PACKED, READERS, kind_of, stem_of
from tram_ds.data.sources import SPLITS, some
from tram_ds.data.tables import UNFINISHED, check_whole, refuse_unfinished
from tram_ds.runtime.errors import DataError

Files = dict[str, dict[str, list[Path]]]  # domain -> split -> its files, in order

NAMES = {name: split for split, names in SPLITS.items() for name in names}
# `train`, `train-00000-of-00002`, `train_news`
SHARD = re.compile(r"-\d+(-of-\d+)?$")
NAMED = re.compile(rf"({'|'.join(NAMES)})(?:[-_.].*|\d*)")


def find_files(path: Path) -> Files:
    """The files of `task.data`; nothing if it holds none that can be read.

    A file is one domain with a train split. In a folder, `train.*` and its like are splits of one
    domain, in folders below it those of the domain that the folder is called after; without them
    every file is a domain.
    """
    if path.is_file():
        return {stem_of(path): {"train": [path]}} if kind_of(path) else {}
    # what has no suffix may be a link to a domain's folder; _data_files() looks at files
    refuse_unfinished(p for p in path.iterdir() if not p.suffix and p.name[0] != ".")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {
        folder.name: splits
        for folder in folders
        if (splits := _splits(folder, _data_files(folder)))
    }
    own = _splits(path, _data_files(path))
    if own and found:
        raise DataError(
            f"{path} has files called as splits itself and in {some(sorted(found))}: keep one of "
            "the two"
        )
    if own:
        return {path.resolve().name: own}
    return found or _apart(path, _data_files(path))


def files_of_repository(name: str, root: Path, paths: list[Path]) -> Files:
    """The same of files below `root` that somebody else has laid out: those of one folder are the
    splits of a domain, called after the folder, or `name` where there is but one."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted(paths):
        if kind_of(path):
            folders.setdefault(path.parent, []).append(path)
    splits = {folder: found for folder, own in folders.items() if (found := _splits(folder, own))}
    if not splits:
        return _apart(root, [path for own in folders.values() for path in own])
    for folder, found in splits.items():
        _refuse_sets(folder.relative_to(root), found)
    if len(splits) == 1:
        return {name: next(iter(splits.values()))}
    names = [folder.name if folder != root else name for folder in splits]
    if len(set(names)) < len(names):
        there = some(sorted(str(folder.relative_to(root)) for folder in splits))
        raise DataError(f"{name} has more than one folder of a name: {there}: set task.files")
    return dict(zip(names, splits.values(), strict=True))


def _refuse_sets(folder: Path, splits: dict[str, list[Path]]) -> None:
    """Where one's own `train_a` and `train_b` are parts of a split, those of somebody else's may be
    two sets for two purposes, such as train_sft and train_gen."""
    for split, paths in splits.items():
        sets = sorted({SHARD.sub("", stem_of(path)) for path in paths})
        if len(sets) > 1:
            raise DataError(
                f"{folder} has more than one {split} split: {some(sets)}: set task.files to a "
                f"pattern of those that are meant, such as {folder / sets[-1]}*"
            )


def unread(path: Path, files: Files) -> list[str]:
    """Data files of the folder `path` itself that are none of `files`."""
    if path.is_file():
        return []
    taken = {file for splits in files.values() for paths in splits.values() for file in paths}
    return [file.name for file in _data_files(path) if file not in taken]


def endings() -> list[str]:
    """Patterns of every file that may be one that can be read."""
    return [f"*{kind}{packed}" for kind in READERS for packed in ("", *PACKED)]


def kinds() -> str:
    """The endings that can be read, for a message."""
    return f"{', '.join(READERS)} (text kinds also .gz and .zst)"


def _data_files(folder: Path) -> list[Path]:
    there = [p for p in folder.iterdir() if not p.name.startswith(".")]
    refuse_unfinished(
        p for p in there if kind_of(p.with_suffix("") if p.suffix in UNFINISHED else p)
    )
    return sorted(path for path in there if path.is_file() and kind_of(path))


def _splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in files:
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


def _apart(folder: Path, files: list[Path]) -> Files:
    """Every file as a domain."""
    found: Files = {}
    for path in files:
        if stem_of(path) in found:
            raise DataError(f"{folder} has {stem_of(path)} in more than one file: keep one")
        found[stem_of(path)] = {"train": [path]}
    return found
