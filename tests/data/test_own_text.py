"""A person's own files as a source: the same text from every kind, a held-out share, and rows that
cannot be used counted and named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.data.test_rows import KINDS, write
from tram_ds.data import own_text
from tram_ds.data.choose import open_source
from tram_ds.data.own_text import OwnText
from tram_ds.data.usable import Reading
from tram_ds.runtime.errors import DataError

TEXTS = [f"row {i} of {i % 7} things" for i in range(200)]


def all_text(source):
    return {
        (domain, split): "".join(source.read(domain, split))
        for domain in source.domains()
        for split in source.splits(domain)
    }


def side(text, share, seed):
    """Where a row belongs, from its definition: a place in [0, 1) that its text and the seed
    give."""
    place = int(hashlib.sha256(f"{seed}\0{text}\n".encode()).hexdigest()[:16], 16) / 16**16
    return "valid" if place < share else "test" if place < 2 * share else "train"


@pytest.mark.parametrize("ending", KINDS)
def test_the_same_rows_are_the_same_text_from_every_kind(tmp_path, ending):
    path = write(tmp_path / f"mine{ending}", TEXTS)
    source = OwnText(str(path), Reading(held_out=0.1, held_out_seed=3), tmp_path / "cache")
    expected = {
        ("mine", split): "".join(t + "\n" for t in TEXTS if side(t, 0.1, 3) == split)
        for split in ("train", "valid", "test")
    }
    assert all_text(source) == expected and all(expected.values())
    counts = {split: text.count("\n") for (_, split), text in expected.items()}
    assert sum(counts.values()) == 200
    said = ", ".join(f"{number} {split}" for split, number in counts.items())
    assert source.said() == {
        "rows": f"{said} in 1 domain",
        "held_out": "0.1 for valid and test, seed 3",
    }
    digest = hashlib.sha256(expected["mine", "test"].encode()).hexdigest()
    assert source.digest("mine", "test") == digest


def test_equal_rows_are_on_one_side_and_the_seed_chooses(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS + TEXTS)
    sides = []
    for seed in (0, 1):
        text = all_text(OwnText(str(path), Reading(held_out_seed=seed), tmp_path / "cache"))
        parts = [set(part.splitlines()) for part in text.values()]
        assert sum(map(len, parts)) == 200
        sides.append(parts)
    assert sides[0] != sides[1]


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".json.zst", ".jsonl.gz"])
def test_real_text_is_the_same_from_every_kind(tmp_path, ending):
    data = Path(os.environ.get("TRAM_DS_DATA", "none")) / "edu_domains" / "art"
    if not data.is_dir():
        pytest.skip("TRAM_DS_DATA does not point at a folder with edu_domains")
    text = {split: (data / f"{split}.txt").read_text() for split in ("train", "valid", "test")}
    for split, whole in text.items():
        lines = [line for line in whole.splitlines() if line.strip()]
        write(tmp_path / f"{split}{ending}", lines)
        text[split] = "".join(f"{line}\n" for line in lines)
    source = OwnText(str(tmp_path), Reading(), tmp_path / "cache")
    assert all_text(source) == {(tmp_path.name, split): whole for split, whole in text.items()}
    assert list(source.said()) == ["rows"]


def test_a_text_file_with_splits_of_its_own_is_read_as_it_is(tmp_path):
    text = "one\n\ntwo\n\n\nthree\n"
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n{text}")
    (tmp_path / "PROVENANCE.txt").write_text("whence")
    source = open_source(str(tmp_path), tmp_path / "cache")
    names = {"train": "train", "valid": "validation", "test": "test"}
    assert all_text(source) == {
        (tmp_path.name, split): f"{name}\n\n{text}" for split, name in names.items()
    }
    assert isinstance(source, OwnText)
    assert source.said() == {
        "rows": "4 train, 4 valid, 4 test in 1 domain",
        "not_read": "PROVENANCE.txt",
    }


def test_only_the_split_that_is_not_there_is_held_out(tmp_path):
    write(tmp_path / "train-0.jsonl", TEXTS[:100])
    write(tmp_path / "train-1.jsonl", TEXTS[100:])
    write(tmp_path / "test.jsonl", ["alone"])
    source = OwnText(str(tmp_path), Reading(held_out=0.1), tmp_path / "cache")
    domain = tmp_path.name
    text = all_text(source)
    assert text[domain, "test"] == "alone\n"
    assert text[domain, "valid"] == "".join(t + "\n" for t in TEXTS if side(t, 0.1, 0) == "valid")
    assert source.said()["held_out"] == "0.1 for valid, seed 0"


def test_domains_are_a_columns_values_or_files_or_folders(tmp_path):
    topics = [f"topic{i % 3}" for i in range(200)]
    path = write(tmp_path / "all.csv", TEXTS, topic=topics)
    source = OwnText(str(path), Reading(domain_column="topic", held_out=0.2), tmp_path / "cache")
    assert source.domains() == ["topic0", "topic1", "topic2"]
    for domain in source.domains():
        own = [text for text, topic in zip(TEXTS, topics, strict=True) if topic == domain]
        train = [text for text in own if side(text, 0.2, 0) == "train"]
        assert "".join(source.read(domain, "train")).splitlines() == train
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("art", "math"):
        write(folder / f"{name}.jsonl.gz", TEXTS)
    assert OwnText(str(folder), Reading(), tmp_path / "cache").domains() == ["art", "math"]
    nested = tmp_path / "folders"
    for name in ("art", "math"):
        (nested / name).mkdir(parents=True)
        write(nested / name / "train.parquet", TEXTS)
    assert open_source(str(nested), tmp_path / "cache").domains() == ["art", "math"]


def test_rows_that_cannot_be_used_are_counted_and_the_first_three_named(tmp_path):
    rows = [{"text": "good"}, {"text": 3}, {"body": "x"}, {"text": " "}, {"text": None}]
    lines = [json.dumps(row) for row in rows] + ["{", '{"text": "\\ud800"}', '{"text": "fine"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = OwnText(str(tmp_path / "a.jsonl"), Reading(held_out=1e-9), tmp_path / "cache")
    assert all_text(source) == {("a", "train"): "good\nfine\n"}
    assert source.said()["left_out"] == (
        "6 rows: a.jsonl line 2: text is 3, not text; a.jsonl line 3: no text; a.jsonl line 4: "
        "text is empty"
    )


@pytest.mark.parametrize(
    "content, reading, message",
    [
        ('{"body": "a", "n": 1}\n', Reading(), "no column text; it has body, n: set task.column"),
        (
            '{"text": 1}\n{"text": []}\n',
            Reading(),
            "none of its 2 rows can be used: a.jsonl line 1",
        ),
        ("{\n", Reading(), "none of its 1 rows can be used: a.jsonl line 1: no JSON"),
        ('{"text": "a"}\n', Reading(domain_column="topic"), "no column topic; it has text"),
        (
            '{"text": "a", "topic": "a/b"}\n',
            Reading(domain_column="topic"),
            "a.jsonl line 1: 'a/b' is not a domain name",
        ),
    ],
)
def test_a_file_of_which_nothing_is_left_is_refused(tmp_path, content, reading, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        OwnText(str(tmp_path / "a.jsonl"), reading, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "own_text").glob("[!.]*"))


def test_a_column_of_many_values_names_no_domains(tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "MOST", 5)
    path = write(tmp_path / "a.jsonl", TEXTS, id=list(range(200)))
    with pytest.raises(DataError, match=r"task\.domain_column id .* more than 5 values"):
        OwnText(str(path), Reading(domain_column="id"), tmp_path / "cache")


def test_too_few_rows_to_hold_any_out_say_what_to_do(tmp_path):
    path = write(tmp_path / "a.jsonl", ["x"])
    source = OwnText(str(path), Reading(held_out=1e-9), tmp_path / "cache")
    with pytest.raises(DataError, match=r"no test rows: none of its 1 rows .*task\.held_out 1e-09"):
        source.read("a", "test")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_rows_that_are_all_held_out_say_so(tmp_path, ending):
    seed = next(seed for seed in range(99) if side("hello", 0.4, seed) != "train")
    path = write(tmp_path / f"a{ending}", ["hello"])
    with pytest.raises(DataError, match=r"to train on: task\.held_out 0\.4 .* took all 1"):
        OwnText(str(path), Reading(held_out=0.4, held_out_seed=seed), tmp_path / "cache")


def test_changed_files_are_read_again(tmp_path):
    for text in ("one", "other"):
        path = write(tmp_path / "a.jsonl", [text])
        source = OwnText(str(path), Reading(held_out=1e-9), tmp_path / "cache")
        assert "".join(source.read("a", "train")) == f"{text}\n"


@pytest.mark.parametrize(
    "names, message",
    [
        (("train.jsonl", "train.csv"), "more than one train split: train.csv, train.jsonl"),
        (("train.txt", "valid.txt", "eval.txt"), "more than one valid split"),
        (("d/train.txt", "d/valid.txt", "d/validation.txt"), "more than one valid split"),
        (("d/train.txt", "d/train.jsonl"), "more than one train split: train.jsonl, train.txt"),
        (("d/train.txt", "d/train-0-of-1.txt"), "more than one set of parts"),
        (("d/train.txt", "d/test.csv"), "d has test.csv, but .* beside which nothing else is read"),
        (
            ("d/train.txt", "e/train.jsonl.gz"),
            r"e has train\.jsonl\.gz, but other splits",
        ),
        (
            ("d/train.txt", "d\u00e9/test.txt", "de\u0301/test.txt"),
            r"'de\\u0301' and 'd\\xe9'",
        ),
        (("d/train.txt", "d /test.txt"), "two of the domains of .* look the same: 'd' and 'd '"),
        (("Art.jsonl", "art.jsonl"), "differ by case alone, 'Art' and 'art'"),
        (("STRASSE.txt", "stra\u00dfe.txt"), "differ by case alone"),
        (("a b.jsonl", "a\tb.jsonl"), "not a domain name: .* control characters"),
        (("train-0.jsonl", "train-2.jsonl"), "lacks train-1"),
        (("a.txt", "a.jsonl"), "has a in more than one file"),
        (("train.jsonl", "b/train.jsonl"), "as splits itself and in b"),
        (("zero_shot.txt",), "what an average is called"),
        (("a.xml",), "has no domain: expected"),
    ],
)
def test_a_folder_that_can_be_read_in_two_ways_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path), tmp_path / "cache")


def test_keys_of_rows_are_refused_for_text_that_has_its_splits(tmp_path):
    with pytest.raises(DataError, match=r"task\.held_out 0\.1 .*generated has its text by domain"):
        open_source("generated", tmp_path, reading=Reading(held_out=0.1))
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"no kind of file that can be read: \.txt, \.jsonl"):
        open_source(str(tmp_path / "a.xml"))
