"""Rows of people's own files: text, JSON, CSV, Parquet, the text kinds also in gzip or zstandard.

Files are read as streams: what is in memory is one row, or one row group of a Parquet file. A row
that is none (no JSON, too few fields) comes with what is wrong with it; a file that is broken as a
whole is a DataError.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tram_ds.data.sources import CHUNK
from tram_ds.data.tables import BATCH, read_schema
from tram_ds.data.text import decoded
from tram_ds.data.tokenize import lines
from tram_ds.runtime.errors import DataError

PARAGRAPH = 4096  # characters after which a text file's row ends with the line it is in
LONGEST = 1 << 28  # characters of a row

Columns = list[str] | None


@dataclass(frozen=True)
class Row:
    """A row of a file. place: `line 3` or `row 3`, from 1. wrong: why it is no row, or nothing."""

    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    wrong: str = ""


def kind_of(path: Path) -> str | None:
    """`.txt`, `.jsonl`, ... of a file that can be read, without .gz or .zst; None for others."""
    *_, before, last = ["", "", *path.suffixes]
    packed = last in PACKED
    kind = before if packed else last
    return kind if kind in READERS and not (packed and kind == ".parquet") else None


def stem_of(path: Path) -> str:
    """A data file's name without its endings: `train` of `train.jsonl.gz`."""
    name = path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name
    return name.removesuffix(kind_of(path) or "")


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a file. columns: those that are wanted of kinds that name them once for all rows,
    DataError if such a file lacks one; None = whatever is there."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return READERS[kind_of(path) or ""](path, columns)


def lacks(path: Path, missing: list[str], there: list[str]) -> DataError:
    """The error for columns that no row has."""
    return DataError(
        f"{path} has no column {', '.join(missing)}; it has {', '.join(there) or 'none'}: set "
        "task.column"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file's bytes, unpacked. DataError where they end too early or are damaged."""
    try:
        with PACKED.get(path.suffix, partial(open, mode="rb"))(path) as file:
            yield file
    except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
        why = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged ({why}): get it again") from error


def _zstd(path: Path) -> Any:
    return pa.input_stream(str(path), compression="zstd")


def _text(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        yield from decoded(iter(lambda: file.read(CHUNK), b""), str(path))


def _lines(path: Path) -> Iterator[str]:
    """Lines with their newline, the last perhaps without."""
    return lines(_text(path), LONGEST)


def _paragraphs(path: Path, columns: Columns) -> Iterator[Row]:
    """A text file's rows: up to the next line that is not empty after an empty one, or after
    PARAGRAPH characters. Together they are the text, under the first column asked for."""
    name, held = (columns or ["text"])[0], list[str]()
    size, first = 0, 1
    for number, line in enumerate(_lines(path), 1):
        ended = size >= PARAGRAPH or (bool(held) and not held[-1].strip())
        if ended and line.strip() and any(part.strip() for part in held):
            yield Row(f"line {first}", {name: "".join(held)})
            held, size, first = [], 0, number
        held.append(line)
        size += len(line)
    yield Row(f"line {first}", {name: "".join(held)})


def _json_lines(path: Path, columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _parsed(f"line {number}", line)


def _json(path: Path, columns: Columns) -> Iterator[Row]:
    """A list of objects, or an object a line."""
    beginning = next((text.lstrip() for text in _text(path) if text.strip()), "")
    if not beginning.startswith("["):
        yield from _json_lines(path, columns)
        return
    for number, value in enumerate(_elements(path), 1):
        yield _checked(f"row {number}", value)


def _elements(path: Path) -> Iterator[Any]:
    """The values of a JSON list, each parsed as soon as enough of the file is read."""
    held, number = "", 0
    for chunk in _text(path):
        held += chunk
        while (found := _element(held, "," if number else "[")) is not None:
            value, held = found
            number += 1
            yield value
        if len(held) > LONGEST:
            break
    if held.strip() != "]" and (number or "".join(held.split()) != "[]"):
        raise DataError(f"{path} is no JSON list after its row {number}: get it again")


def _element(text: str, mark: str) -> tuple[Any, str] | None:
    """(value behind the mark, rest of the text), or None where the text has no whole one."""
    text = text.lstrip()
    begin = len(text) - len(text.removeprefix(mark).lstrip())
    try:
        # RecursionError: brackets within brackets, deeper than Python's stack
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    # a number at the end may go on in the next chunk
    return (value, text[end:]) if begin and end < len(text) else None


def _parsed(place: str, text: str) -> Row:
    try:
        return _checked(place, json.loads(text))
    except (ValueError, RecursionError):
        return Row(place, wrong="no JSON")


def _checked(place: str, value: Any) -> Row:
    return Row(place, value) if isinstance(value, dict) else Row(place, wrong="no JSON object")


def _csv(path: Path, columns: Columns, delimiter: str = ",") -> Iterator[Row]:
    # 128 KiB by default; it is the whole process's, so it is put back
    limit = csv.field_size_limit(LONGEST)
    try:
        # strict: else a quote that is never closed takes the rest of the file for its field
        yield from _fields(
            path, columns, csv.reader(_lines(path), delimiter=delimiter, strict=True)
        )
    finally:
        csv.field_size_limit(limit)


def _fields(path: Path, columns: Columns, reader: Any) -> Iterator[Row]:
    header = _next(path, reader)
    if not header or isinstance(header, str):
        raise DataError(f"{path} has no header: its first line names the columns")
    if missing := [name for name in columns or [] if name not in header]:
        raise lacks(path, missing, header)
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"{path} has the column {twice[0]} twice: rename one in its first line")
    while True:
        place = f"line {reader.line_num + 1}"
        values = _next(path, reader)
        if values is None:
            return
        if isinstance(values, str):
            yield Row(place, wrong=values)
        elif len(values) == len(header):
            yield Row(place, dict(zip(header, values, strict=True)))
        elif values:
            yield Row(place, wrong=f"{len(values)} fields where the header has {len(header)}")


def _next(path: Path, reader: Any) -> list[str] | str | None:
    """The next fields, or what is wrong with them, or None at the end. DataError for a quote
    without end: no row behind it could be told."""
    line = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        if "unexpected end" in str(error) or "field limit" in str(error):
            raise DataError(
                f"{path}: a quote that line {line} opens is never closed; a quote inside a field "
                'is written ""'
            ) from error
        return "no CSV"


def _parquet(path: Path, columns: Columns) -> Iterator[Row]:
    names = read_schema(path).names
    if missing := [name for name in columns or [] if name not in names]:
        raise lacks(path, missing, names)
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH, columns=columns):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", values)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read after row {number} ({str(error).splitlines()[0]}): get it again"
        ) from error


PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _zstd}
READERS: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    ".txt": _paragraphs,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}
