"""Scores of single rows, kept beside the scores of whole domains: with them a comparison knows how
much of a difference is the choice of a finite test set."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BYTES = 6  # of a row's number: 48 bits, which a double holds exactly


@dataclass(frozen=True)
class RowScores:
    """One number a row, in the rows' order. weight: its counted targets, 1 of an example with one
    label. value: how many of them are right, or the sum of their losses where the metric is a
    perplexity. The domain's accuracy, or its mean loss, is value.sum() / weight.sum().

    digest: of the rows' contents in their order, the same for two runs that scored the same ones.
    """

    value: np.ndarray
    weight: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.value)

    @property
    def score(self) -> float:
        return float(self.value.sum(dtype=float) / self.weight.sum(dtype=float))


Kept = dict[str, dict[str, RowScores]]  # the caller's word, such as a split -> domain -> rows


def number_of(row: Any) -> int:
    """A number of 48 bits that rows of other content have another of. row: text, numbers, arrays,
    a picture, or a tuple of such."""
    digest = hashlib.blake2b(digest_size=BYTES)
    _feed(digest, row)
    return int.from_bytes(digest.digest(), "little")


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, tuple | list):
        # lengths and types go in too, or ("ab", "c") and ("a", "bc") would be one row
        digest.update(f"({len(value)}".encode())
        for part in value:
            _feed(digest, part)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        digest.update(f"s{len(text)}:".encode() + text)
    else:
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())


def of(table: np.ndarray, accuracy: bool) -> RowScores:
    """table: (rows, 4) loss, count, correct and number_of every row."""
    numbers = table[:, 3].astype("<i8")
    digest = hashlib.sha256(numbers.tobytes()).hexdigest()[:32]
    value = table[:, 2].astype(np.int32) if accuracy else table[:, 0].astype(np.float32)
    return RowScores(value, table[:, 1].astype(np.int32), digest)


def packed(kept: Kept) -> bytes:
    """A compressed archive of arrays; of the same scores the same bytes."""
    arrays = {}
    for group, domains in kept.items():
        for domain, rows in domains.items():
            name = f"{group}/{domain}"
            arrays[f"{name}/value"] = rows.value
            # 1 throughout where an example has one label: left out of the file
            if (rows.weight != 1).any():
                arrays[f"{name}/weight"] = rows.weight
            arrays[f"{name}/digest"] = np.array(rows.digest)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def read(path: Path) -> Kept:
    """What `packed` made. ValueError where it cannot be read."""
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _read(path: Path) -> Kept:
    found: Kept = {}
    # a file of results must not be able to run code
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            stem, _, kind = name.rpartition("/")
            if kind == "digest":
                group, _, domain = stem.partition("/")
                value = arrays[f"{stem}/value"]
                there = f"{stem}/weight" in arrays.files
                weight = arrays[f"{stem}/weight"] if there else np.ones(len(value), np.int32)
                rows = RowScores(value, weight, str(arrays[name]))
                found.setdefault(group, {})[domain] = rows
    return found
