"""Rows of each kind of file: the same rows, and what is wrong named by its place."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tram_ds.data import rows as module
from tram_ds.data.rows import kind_of, read_rows, stem_of
from tram_ds.runtime.errors import DataError

TEXTS = ["one, two", 'she said "no"', "naïve Ω\nsecond line", "last\u2028one"]
KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".json.zst"]


def write(path, texts, column="text", **others):
    """The texts as rows, in the kind of file that the name says."""
    table = [
        {column: text} | {key: value[i] for key, value in others.items()}
        for i, text in enumerate(texts)
    ]
    kind = kind_of(path)
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=2)
        return path
    plain = path.with_name(".plain")
    with plain.open("w", encoding="utf-8", newline="") as file:
        if kind == ".json":
            json.dump(table, file, indent=1)
        elif kind == ".jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in table))
        elif kind == ".txt":
            file.write("".join(text + "\n" for text in texts))
        else:
            out = csv.DictWriter(file, list(table[0]), delimiter="\t" if kind == ".tsv" else ",")
            out.writeheader()
            out.writerows(table)
    data = plain.read_bytes()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


def texts_of(path, column="text"):
    return [row.values.get(column) for row in read_rows(path, [column])]


def places(path):
    return [(row.place, row.wrong) for row in read_rows(path, ["text"]) if row.wrong]


@pytest.mark.parametrize("chunk", [1 << 20, 5])
@pytest.mark.parametrize("ending", KINDS)
def test_every_kind_gives_the_same_rows_in_chunks_of_any_size(tmp_path, monkeypatch, ending, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert texts_of(write(tmp_path / f"a{ending}", TEXTS, extra=[1, 2, 3, 4])) == TEXTS


def test_a_text_files_rows_are_its_paragraphs_and_together_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n\n\nthree\n\n")
    assert texts_of(path) == ["\n\none\ntwo\n\n\n", "three\n\n"]
    long = "".join(f"line {i} of a text without empty lines\n" for i in range(500))
    path.write_text(long + "end")
    texts = [str(text) for text in texts_of(path)]
    assert "".join(texts) == long + "end" and 4 < len(texts) < 7
    assert all(text.endswith("\n") and len(text) < 4200 for text in texts[:-1])


@pytest.mark.parametrize(
    "name, kind, stem",
    [
        ("a.b.jsonl.gz", ".jsonl", "a.b"),
        ("train.txt", ".txt", "train"),
        ("a.parquet.gz", None, "a.parquet"),
        ("a.gz", None, "a"),
        ("a.xml", None, "a.xml"),
    ],
)
def test_a_kind_is_told_by_the_ending(tmp_path, name, kind, stem):
    assert kind_of(tmp_path / name) == kind and stem_of(tmp_path / name) == stem


def test_a_row_that_is_none_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n[1]\n{"text": "b"}\n')
    assert places(path) == [("line 3", "no JSON"), ("line 4", "no JSON object")]
    assert [row.place for row in read_rows(path, ["text"])] == [f"line {n}" for n in (1, 3, 4, 5)]
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"a\nb",1\nc\nd,2,3\n"e"f,4\ng,5\n')
    assert places(path) == [
        ("line 4", "1 fields where the header has 2"),
        ("line 5", "3 fields where the header has 2"),
        ("line 6", "no CSV"),
    ]
    assert [text for text in texts_of(path) if text] == ["a\nb", "g"]
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 3, {"text": "b"}]')
    assert places(path) == [("row 2", "no JSON object")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "is empty"),
        ("a.json", b'[{"text": "a"}, {"text": ', "no JSON list after its row 1"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "no JSON list after its row 1"),
        ("a.json", b'[{"text": "a"}] x', "no JSON list after its row 1"),
        ("a.json", b'[{"text": "a"},]', "no JSON list after its row 1"),
        ("a.csv", b"body,n\na,1\n", "no column text; it has body, n: set task.column"),
        ("a.csv", b'text,n\na,1\n"b,2\nc,3\n', "a quote that line 3 opens is never closed"),
        ("a.csv", b"\n\n", "has no header"),
        ("a.csv", b"text,text\na,b\n", "has the column text twice"),
        ("a.parquet", b"PAR1 and no more", "damaged or no parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], r"a\.jsonl\.gz is damaged"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz is damaged"),
        ("a.txt.zst", b"not packed", r"a\.txt\.zst is damaged"),
        ("a.txt.zst", bytes(pa.compress(b"text" * 999, "zstd", asbytes=True))[:-9], "is damaged"),
        ("a.txt", gzip.compress(b"text"), "is a gzip file, not text"),
        ("a.jsonl", b'{"text": "\xff\xfe\xfd\xfc\xfb\xfa"}\n' * 9, "are not UTF-8"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path, ["text"]))
    assert csv.field_size_limit() == 131072


def test_a_parquet_file_without_the_column_lists_those_that_are_there(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS, "body", n=[1, 2, 3, 4])
    with pytest.raises(DataError, match=r"no column text; it has body, n: set task\.column"):
        list(read_rows(path, ["text"]))


def test_a_list_that_breaks_off_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "LONGEST", 64)
    path = tmp_path / "a.json"
    path.write_text("[" + "x" * 1000)
    with pytest.raises(DataError, match="no JSON list after its row 0"):
        list(read_rows(path, ["text"]))
