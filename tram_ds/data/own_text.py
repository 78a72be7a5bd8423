"""A person's own files as text by domain and split: read once, row by row, and kept as text.

A row is a part of a document: the text of a split is that of its rows, one after the other, each
ended by a newline. So rows of any kind of file give the tokens that a text file with the same lines
gives. Rows that cannot be used are counted, and the first of them named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.data.digests import file_digest
from tram_ds.data.layout import Files, find_files, unread
from tram_ds.data.rows import read_rows
from tram_ds.data.sources import (
    CHUNK,
    SPLITS,
    check_domain_name,
    refuse_alike_domains,
    some,
    unknown_domain,
)
from tram_ds.data.usable import Count, Part, Reading, column_of_text, ended, lacking, side, usable
from tram_ds.runtime.errors import DataError

VERSION = 3  # raise it when the rules change: it is part of the cache key
MOST = 200  # domains of a column
COUNT = "count.json"  # beside the domains' folders


class OwnText:
    """Implements tram_ds.data.sources.Source over files of rows."""

    def __init__(
        self,
        data: str,
        reading: Reading,
        cache_dir: str | os.PathLike[str] | None = None,
        part: Part = column_of_text,
        files: Files | None = None,
    ) -> None:
        """part: what is read of a row. files: None for those of the path `data`. DataError for
        files that cannot be read, or hold no row that can be used."""
        self.data, self.reading, self.part = data, reading, part
        self.files = find_files(Path(data)) if files is None else files
        self.unread = unread(Path(data), self.files) if files is None else []
        for domain in [] if reading.domain_column else self.files:
            check_domain_name(domain)
        self.folder = self._built(cache_dir)
        self.count = Count(**json.loads((self.folder / COUNT).read_text(encoding="utf-8")))
        refuse_alike_domains(self.domains(), str(data))
        self._refuse_all_held_out()

    def domains(self) -> list[str]:
        return sorted(self.count.used)

    def splits(self, domain: str) -> list[str]:
        check_domain_name(domain)
        if domain not in self.count.used:
            raise unknown_domain(domain, self.domains(), self.data)
        return [split for split in SPLITS if split in self.count.used[domain]]

    def read(self, domain: str, split: str) -> Iterator[str]:
        return _chunks(self._path(domain, split))

    def digest(self, domain: str, split: str) -> str:
        return file_digest(self._path(domain, split), self.folder.parent.parent)

    def said(self) -> dict[str, str]:
        """What was read, held out and left out: for the log and results.json."""
        reading, count = self.reading, self.count
        rows = ", ".join(f"{number} {split}" for split, number in count.sums().items())
        said = {"rows": f"{rows} in {len(count.used)} domain{'s' * (len(count.used) != 1)}"}
        missing = {split for splits in self.files.values() for split in lacking(splits)}
        if missing:
            names = " and ".join(split for split in SPLITS if split in missing)
            said["held_out"] = f"{reading.held_out:g} for {names}, seed {reading.held_out_seed}"
        if count.left_out:
            rows = f"{count.left_out} row{'s' * (count.left_out != 1)}"
            said["left_out"] = f"{rows}: {'; '.join(count.first)}"
        if self.unread:
            said["not_read"] = some(self.unread)
        return said

    def places(self, texts: Iterable[str]) -> dict[str, str]:
        """Text of a row -> the file and line where it stands first: the files are read again."""
        missing, found = set(texts), dict[str, str]()
        for path in (path for splits in self.files.values() for _, path in _each(splits)):
            rows = read_rows(path, None) if missing else iter(())
            for row in rows:
                text = "" if row.wrong else ended(self.part(row, self.reading.column)[0])
                if text in missing:
                    found[text] = f"{path.name} {row.place}"
                    missing.discard(text)
        return found

    def _refuse_all_held_out(self) -> None:
        given = any("train" in splits for splits in self.files.values())
        if not given or any("train" in splits for splits in self.count.used.values()):
            return
        rows = sum(self.count.sums().values())
        raise DataError(
            f"task.data {self.data}: no row is left to train on: task.held_out "
            f"{self.reading.held_out:g} for validation and for test each, by the rows' content, "
            f"took all {rows}: give more rows, or files valid.* and test.*"
        )

    def _path(self, domain: str, split: str) -> Path:
        if split in self.splits(domain):
            return self.folder / domain / f"{split}.txt"
        rows = sum(self.count.used[domain].values())
        raise DataError(
            f"domain '{domain}' of {self.data} has no {split} rows: none of its {rows} rows fell "
            f"into task.held_out {self.reading.held_out:g}: raise it, give a file {split}.*, or "
            "leave the domain out (task.exclude)"
        )

    def _built(self, cache_dir: str | os.PathLike[str] | None) -> Path:
        parts = [
            f"{domain}\0{split}\0{path.name}\0{file_digest(path, cache_dir)}"
            for domain, splits in self.files.items()
            for split, path in _each(splits)
        ]
        key = digest_of(VERSION, repr(self.reading), self.part.__name__, *parts)
        folder = cache_root(cache_dir) / "own_text" / key

        def build(folder: Path) -> None:
            count = write_text(folder, self.files, self.reading, self.part)
            (folder / COUNT).write_text(json.dumps(vars(count)), encoding="utf-8")

        return build_once(folder, build, lambda folder: (folder / COUNT).is_file())


def write_text(folder: Path, files: Files, reading: Reading, part: Part) -> Count:
    """Writes `<domain>/<split>.txt` of the files' rows. DataError for a file without a row that can
    be used."""
    count = Count()
    with ExitStack() as stack:
        # open to the end: with domains by column their rows come in any order
        opened: dict[tuple[str, str], Any] = {}
        for name, splits in files.items():
            for split, path in _each(splits):
                held = lacking(splits) if split == "train" else []
                for _, domain, text in usable(path, name, reading, part, count):
                    key = domain, side(text, split, held, reading)
                    if key not in opened:
                        _refuse_many(count, path, reading)
                        opened[key] = stack.enter_context(_created(folder / domain, key[1]))
                    opened[key].write(text)
                    count.use(*key)
    return count


def _each(splits: dict[str, list[Path]]) -> Iterator[tuple[str, Path]]:
    return ((split, path) for split, paths in splits.items() for path in paths)


def _created(folder: Path, split: str) -> Any:
    folder.mkdir(mode=0o700, exist_ok=True)
    # newline="": a \r inside a row stays one, here and where it is read
    return (folder / f"{split}.txt").open("w", encoding="utf-8", newline="")


def _refuse_many(count: Count, path: Path, reading: Reading) -> None:
    if len(count.used) > MOST:
        column = reading.domain_column
        raise DataError(
            f"task.domain_column {column} of {path} has more than {MOST} values: it names no "
            "domains"
            if column
            else f"{path.parent} holds more than {MOST} domains: give fewer files"
        )


def _chunks(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from iter(lambda: file.read(CHUNK), "")
