"""Rows of parquet files, memory-mapped: converted once to an Arrow file in the cache, then read row
by row."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.data.digests import file_digest
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import first_line

VERSION = 1  # raise it when the conversion changes: it is part of the cache key
PART = re.compile(r"(?P<number>\d+)-of-(?P<total>\d+)")  # as the hub names shards
# `train-3.parquet`, `train_part3.parquet`; a version (`train-v2`) is no number of a part
NUMBERED = re.compile(r"(?:^|[-_.]|part)(?P<number>\d{1,5})$")
# `train_2024`, `train-2024-01`, `train-2024-01-05`: of days, months and years none is missing
DATE = re.compile(r"(?<!\d)(?:19|20)\d\d(?:[-_.]?(?:0[1-9]|1[0-2])(?:[-_.]?[0-3]\d)?)?$")
# what browsers, huggingface_hub, wget's users and rsync's call a file that is not there yet
UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload")
BATCH = 256  # rows converted at once: bounds the memory


class Table(Sequence[tuple[Any, ...]]):
    """Rows as tuples of Python values, in the order of `columns`; read when asked for.

    names: column -> class names, of those columns that the files' own description calls class
    labels.
    """

    def __init__(self, table: pa.Table, names: dict[str, list[str]], digest: str) -> None:
        self.table, self.names, self.digest = table, names, digest
        self.columns = table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return tuple(column[index % len(self)].as_py() for column in self.table.columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column as Arrow, still on disk."""
        return self.table.column(name)


def find_parquet(folder: Path, split: str) -> list[Path]:
    """`<split>*.parquet` in a folder, sorted. DataError for parts `-of-N` that are not whole."""
    refuse_unfinished(folder.glob(f"{split}*.parquet*"))
    files = sorted(path for path in folder.glob(f"{split}*.parquet") if path.is_file())
    check_whole(files)
    return files


def open_table(
    files: Sequence[Path], columns: Sequence[str], cache_dir: str | os.PathLike[str] | None = None
) -> Table:
    """The `columns` of all rows of parquet files, one file after the other.

    DataError for a missing column (lists what is there), a missing value, no rows, or a damaged
    file.
    """
    schemas = [read_schema(path) for path in files]
    for path, schema in zip(files, schemas, strict=True):
        if missing := [name for name in columns if name not in schema.names]:
            raise DataError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}"
            )
    _check_names(files, schemas, columns)
    wanted = pa.schema([schemas[0].field(name) for name in columns])
    digest = digest_of(VERSION, *columns, *(file_digest(path, cache_dir) for path in files))
    target = cache_root(cache_dir) / "tables" / digest

    def build(folder: Path) -> None:
        with (
            pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, wanted) as writer,
        ):
            for path in files:
                _copy(path, wanted, writer)

    folder = build_once(target, build, lambda path: _mapped(path) is not None)
    table = _mapped(folder)
    if table is None:
        raise DataError(f"the table cache {folder} is damaged; delete it and run again")
    if table.num_rows == 0:
        raise DataError(f"{', '.join(str(path) for path in files)}: no rows")
    return Table(table, class_names(schemas[0]), digest)


def read_schema(path: Path) -> pa.Schema:
    """Column names and types of a parquet file."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is damaged or no parquet file ({first_line(error)}): get it again"
        ) from error


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its classes, from the description that Hugging Face data sets keep in
    their files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {
            name: feature
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
        return {name: _names(feature["names"]) for name, feature in labels.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _names(names: Any) -> list[str]:
    """In the order of their numbers: a list, or number -> name."""
    if isinstance(names, dict):
        return [str(names[key]) for key in sorted(names, key=int)]
    return [str(name) for name in names]


def _check_names(files: Sequence[Path], schemas: Sequence[pa.Schema], columns: Any) -> None:
    """DataError where two files number the classes of a column differently."""
    for column in columns:
        named = [
            (path, names)
            for path, schema in zip(files, schemas, strict=True)
            if (names := class_names(schema).get(column)) is not None
        ]
        for path, names in named[1:]:
            if names != named[0][1]:
                raise DataError(
                    f"the classes of {column} are called {', '.join(names)} in {path} but "
                    f"{', '.join(named[0][1])} in {named[0][0]}: number them alike in all files"
                )


def refuse_unfinished(paths: Iterable[Path]) -> None:
    """DataError for a link to what is not there, and for what a download left half-way: without
    them a set is not whole, and nothing else would say so."""
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise DataError(
                f"{path} is a link to {os.readlink(path)}, which is not there: get the file, or "
                "remove the link"
            )
        if path.suffix in UNFINISHED:
            raise DataError(f"{path} is a download that has not ended: finish it, or remove it")


def check_whole(files: Sequence[Path]) -> None:
    """DataError for parts named `...-00000-of-00003...` that lack some, or are of two sets, and for
    numbered parts (`...-0`, `...-2`) with a gap; both begin at 0 or 1."""
    _check_numbered(files)
    parts = [(path, PART.search(path.name)) for path in files]
    totals = {int(found["total"]) for _, found in parts if found}
    if not totals:
        return
    folder = files[0].parent
    if len(totals) > 1 or not all(found for _, found in parts):
        names = ", ".join(path.name for path in files)
        raise DataError(f"{folder} holds more than one set of parts: {names}; keep one whole set")
    total = totals.pop()
    numbers = [int(found["number"]) for _, found in parts if found]
    first = int(total in numbers and 0 not in numbers)
    missing = sorted(set(range(first, total + first)) - set(numbers))
    if missing or len(numbers) != total:
        here = ", ".join(path.name for path in files)
        lacks = f"lacks part {', '.join(map(str, missing))}" if missing else "has a part twice"
        raise DataError(f"{folder} {lacks} of {total} (there are {here}): get the whole set")


def _check_numbered(files: Sequence[Path]) -> None:
    sets: dict[str, list[str]] = {}
    for path in files:
        if not PART.search(path.name) and (found := NUMBERED.search(path.stem)):
            sets.setdefault(path.stem[: found.start("number")], []).append(found["number"])
    for stem, written in sets.items():
        # all of them: the part 1999 of 2,500 looks like a year too
        if all(DATE.search(f"{stem}{number}") for number in written):
            continue
        numbers = [int(number) for number in written]
        first = 1 if 0 not in numbers else 0
        if missing := sorted(set(range(first, max(numbers))) - set(numbers)):
            lacks = ", ".join(f"{stem}{number}" for number in missing[:3])
            raise DataError(
                f"{files[0].parent} has parts of {stem!r} up to {max(numbers)} but lacks {lacks}: "
                "get the whole set, or give parts that stand alone names without a number"
            )


def _copy(path: Path, wanted: pa.Schema, writer: Any) -> None:
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH, columns=wanted.names):
            batch = batch.select(wanted.names)
            for name, column in zip(wanted.names, batch.columns, strict=True):
                if column.null_count:
                    first = row + column.is_null().to_pylist().index(True)
                    raise DataError(f"{path}: row {first} has no {name}; every row needs one")
            # an Arrow file has one schema, and shards of a set may differ: string and large_string
            writer.write_batch(batch.cast(wanted))
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read after row {row} ({first_line(error)}): get it again"
        ) from error


def _mapped(folder: Path) -> pa.Table | None:
    try:
        # of a map read_all() copies nothing, and the ranks of a node share its pages
        return pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    except (pa.ArrowException, OSError):
        return None
