"""Which rows of people's own files can be used: the text of each, its domain and its split.

Rows that cannot be used are counted, and the first of them named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tram_ds.data.rows import Row, lacks, read_rows
from tram_ds.data.sources import SPLITS, check_domain_name
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import short

NAMED = 3  # rows that are left out and named
COLUMNS = 200  # names of columns listed where the one asked for is in no row


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


def usable(
    path: Path, name: str, reading: Reading, part: Part, count: Count, first: int = 0
) -> Iterator[tuple[int, str, str]]:
    """(number, domain, text that ends with a newline) of each row of a file that can be used.
    first: the row to begin with, from 0. DataError for a file read from its beginning of which no
    row can."""
    good, seen, own = 0, dict[str, None](), Count()
    needed = _columns(reading, part)
    # of text the columns that are needed, so that Parquet reads no others; conversations need all,
    # because what stands beside their messages is refused
    rows = read_rows(path, needed if part is column_of_text else None)
    for number, row in enumerate(islice(rows, first, None), first):
        if len(seen) < COLUMNS:
            seen.update(dict.fromkeys(row.values))
        text, wrong = ("", row.wrong) if row.wrong else part(row, reading.column)
        if wrong := wrong or _wrong(row, text, reading):
            own.leave(path, row, wrong)
            count.leave(path, row, wrong)
            continue
        good += 1
        domain = str(row.values[reading.domain_column]) if reading.domain_column else name
        yield number, _domain(domain, path, row), ended(text)
    if not good and not first:
        raise _none(path, own, [c for c in needed if c not in seen], list(seen))


def _none(path: Path, left: Count, missing: list[str], seen: list[str]) -> DataError:
    if seen and missing:
        return lacks(path, missing, seen)
    columns = f"; its columns are {', '.join(seen)}" if seen else ""
    return DataError(
        f"{path}: none of its {left.left_out} rows can be used: "
        f"{'; '.join(left.first) or 'none'}{columns}"
    )


def ended(text: str) -> str:
    """A row's text as it stands in a document: with a newline behind it."""
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
        # JSON may escape half of a pair, which no UTF-8 file can hold
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


def lacking(splits: dict[str, list[Path]]) -> list[str]:
    """The held-out splits that a domain has no files of: they are taken from its train rows."""
    return [split for split in ("valid", "test") if "train" in splits and split not in splits]


def side(text: str, split: str, held: list[str], reading: Reading) -> str:
    """The split a row belongs to: by its text alone, so that equal rows are on one side."""
    digest = hashlib.sha256(f"{reading.held_out_seed}\0{text}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    # of [0, 1) the first held_out are one split's, the next the other's
    number = int(place / reading.held_out)
    return held[number] if number < len(held) else split
