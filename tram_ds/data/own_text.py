"""A person's own files as text by domain and split: read once, row by row, and kept as text.

A row is a part of a document: the text of a split is that of its rows, one after the other, each
ended by a newline. So rows of any kind of file give the tokens that a text file with the same lines
gives. Rows that cannot be used are counted, and the first of them named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.data.digests import file_digest
from tram_ds.data.layout import Files, find_files, unread
from tram_ds.data.rows import Row, lacks, read_rows
from tram_ds.data.sources import (
    CHUNK,
    SPLITS,
    check_domain_name,
    refuse_alike,
    some,
    unknown_domain,
)
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import short

VERSION = 2  # raise it when the rules change: it is part of the cache key
NAMED = 3  # rows that are left out and named
MOST = 200  # domains of a column


@dataclass(frozen=True)
class Reading:
    """What is read of rows, and what is held out of them; the keys of `task` with these names."""

    column: str = "text"
    domain_column: str | None = None
    held_out: float = 0.05
    held_out_seed: int = 0


# (row, task.column) -> (its text, nothing) or (nothing, why it has none)
Part = Callable[[Row, str], tuple[str, str]]


def column_of_text(row: Row, column: str) -> tuple[str, str]:
    """The text under a column."""
    text = row.values.get(column)
    if text is None:
        return "", f"no {column}"
    if not isinstance(text, str):
        return "", f"{column} is {short(text, 20)}, not text"
    return text, "" if text.strip() else f"{column} is empty"


@dataclass
class Count:
    """What was read: rows used, domain -> split -> how many, and those left out."""

    used: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: int = 0
    first: list[str] = field(default_factory=list)

    def use(self, domain: str, split: str) -> None:
        splits = self.used.setdefault(domain, {})
        splits[split] = splits.get(split, 0) + 1

    def leave(self, path: Path, row: Row, wrong: str) -> None:
        self.left_out += 1
        if len(self.first) < NAMED:
            self.first.append(f"{path.name} {row.place}: {wrong}")

    def sums(self) -> dict[str, int]:
        """Split -> rows of all domains."""
        counts = {split: [s.get(split, 0) for s in self.used.values()] for split in SPLITS}
        return {split: sum(numbers) for split, numbers in counts.items() if sum(numbers)}


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
        refuse_alike(self.domains(), f"the domains of {data}")
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
        lacking = {split for splits in self.files.values() for split in _lacking(splits)}
        if lacking:
            names = " and ".join(split for split in SPLITS if split in lacking)
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
                text = "" if row.wrong else _ended(self.part(row, self.reading.column)[0])
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


COUNT = "count.json"  # beside the domains' folders


def write_text(folder: Path, files: Files, reading: Reading, part: Part) -> Count:
    """Writes `<domain>/<split>.txt` of the files' rows. DataError for a file without a row that can
    be used."""
    count = Count()
    with ExitStack() as stack:
        opened: dict[tuple[str, str], Any] = {}
        for name, splits in files.items():
            for split, path in _each(splits):
                held = _lacking(splits) if split == "train" else []
                for domain, text in _texts(path, name, reading, part, count):
                    key = domain, _split(text, split, held, reading)
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


def _texts(
    path: Path, name: str, reading: Reading, part: Part, count: Count
) -> Iterator[tuple[str, str]]:
    """(domain, text that ends with a newline) of each row of a file that can be used."""
    usable, seen, own = 0, dict[str, None](), Count()
    needed = _columns(reading, part)
    for row in read_rows(path, needed if part is column_of_text else None):
        if len(seen) < MOST:
            seen.update(dict.fromkeys(row.values))
        text, wrong = ("", row.wrong) if row.wrong else part(row, reading.column)
        if wrong := wrong or _wrong(row, text, reading):
            own.leave(path, row, wrong)
            continue
        usable += 1
        domain = str(row.values[reading.domain_column]) if reading.domain_column else name
        yield _domain(domain, path, row), _ended(text)
    if not usable:
        if seen and (missing := [column for column in needed if column not in seen]):
            raise lacks(path, missing, list(seen))
        columns = f"; its columns are {', '.join(seen)}" if seen else ""
        raise DataError(
            f"{path}: none of its {own.left_out} rows can be used: "
            f"{'; '.join(own.first) or 'none'}{columns}"
        )
    count.left_out += own.left_out
    count.first = (count.first + own.first)[:NAMED]


def _ended(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def _columns(reading: Reading, part: Part) -> list[str]:
    """Those without which no row can be used."""
    text = [reading.column] if part is column_of_text else []
    return text + ([reading.domain_column] if reading.domain_column else [])


def _wrong(row: Row, text: str, reading: Reading) -> str:
    """Why a row that has its text cannot be used, or nothing."""
    if reading.domain_column:
        name = row.values.get(reading.domain_column)
        if name is None:
            return f"no {reading.domain_column}"
        if not _is_name(name):
            return f"{reading.domain_column} is {short(name, 20)}, no name"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half a surrogate pair in its text"
    return ""


def _is_name(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and bool(str(value).strip())


def _domain(name: str, path: Path, row: Row) -> str:
    try:
        check_domain_name(name)
    except DataError as error:
        raise DataError(f"{path} {row.place}: {error}") from error
    return name


def _lacking(splits: dict[str, list[Path]]) -> list[str]:
    """The held-out splits that a domain has no files of: they are taken from its train rows."""
    return [split for split in ("valid", "test") if "train" in splits and split not in splits]


def _split(text: str, split: str, held: list[str], reading: Reading) -> str:
    """The split a row belongs to: by its text alone, so that equal rows are on one side."""
    digest = hashlib.sha256(f"{reading.held_out_seed}\0{text}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    number = int(place / reading.held_out)
    return held[number] if number < len(held) else split


def _chunks(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from iter(lambda: file.read(CHUNK), "")
