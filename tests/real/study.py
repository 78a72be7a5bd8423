"""The folders of the study E-XNLI (docs/evidence.md): English pairs to train on, three languages to
score, and the encoder with the tokens that they use.

python -m tests.real.study SAMPLE [FOLDER]     # FOLDER: study
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.real import e5

LANGUAGES = ("en", "sw", "ur")
HELD_OUT = 300  # of the English development rows: validation


def make(sample: Path, folder: Path, rows: int | None = None) -> None:
    """xnli/ and e5-xnli/ in `folder`, of SAMPLE/{en,sw,ur}/{test,validation}*.parquet (premise,
    hypothesis, label): trained on the English test split, scored on the development rows that are
    no validation. rows: at most so many of each, for tests."""
    texts: list[str] = []

    def write(table: Any, language: str, split: str) -> None:
        place = folder / "xnli" / language
        place.mkdir(parents=True, exist_ok=True)
        table = table.slice(0, rows)
        pq.write_table(table, place / f"{split}-0.parquet")
        texts.extend(table["premise"].to_pylist() + table["hypothesis"].to_pylist())

    for language in LANGUAGES:
        development = read(sample, language, "validation")
        write(development.slice(0, len(development) - HELD_OUT), language, "test")
        if language == "en":
            write(read(sample, language, "test"), language, "train")
            write(development.slice(len(development) - HELD_OUT), language, "validation")
    model = folder / "e5-xnli"
    model.mkdir(exist_ok=True)
    e5.convert(model, texts)


def read(sample: Path, language: str, split: str) -> pa.Table:
    return pq.read_table(next((sample / language).glob(f"{split}*.parquet")))


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "study"))
