"""Folders of domains: what is there is read, what is not is named."""

from __future__ import annotations

import pytest

from tram_ds.data.choose import open_source
from tram_ds.data.sources import CHUNK, FolderSource, corpus_digest
from tram_ds.runtime.errors import DataError


@pytest.fixture
def root(tmp_path):
    for domain, split in [
        ("math", "train"),
        ("math", "validation"),
        ("math", "test"),
        ("art", "test"),
    ]:
        (tmp_path / domain).mkdir(exist_ok=True)
        (tmp_path / domain / f"{split}.txt").write_text(f"{domain} {split}\n")
    (tmp_path / "PROVENANCE.txt").write_text("not a domain")
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "empty_folder" / "notes.md").touch()
    return tmp_path


def test_lists_domains_and_splits_under_any_name_of_valid(root):
    source = open_source(str(root))
    assert source.domains() == ["art", "math"]
    assert source.splits("math") == ["train", "valid", "test"] and source.splits("art") == ["test"]
    assert "".join(source.read("math", "valid")) == "math validation\n"


def test_bytes_cut_inside_a_character_are_replaced_at_any_chunk_border(root):
    text = "é" * CHUNK
    (root / "math" / "train.txt").write_bytes(text.encode() + "é".encode()[:1])
    chunks = list(FolderSource(root).read("math", "train"))
    assert "".join(chunks) == text + "\ufffd" and len(chunks) > 1


def test_digest_follows_the_content(root):
    source = FolderSource(root)
    parts = [("math", "train"), ("art", "test")]
    before = corpus_digest(source, parts)
    assert before == corpus_digest(FolderSource(root), parts[::-1])
    (root / "art" / "test.txt").write_text("art tesT and more\n")
    assert corpus_digest(source, parts) != before


@pytest.mark.parametrize(
    "domain, split, message",
    [
        ("maths", "test", "unknown domain 'maths'.*did you mean 'math'.*it has art, math"),
        ("Math", "test", "did you mean 'math'"),
        ("ma\nth", "test", r"'ma\\nth' is not a domain name"),
        ("art", "train", r"'art'.*no train split.*it has test\.txt"),
        ("../outside", "test", "not a domain name"),
        ("..", "test", "not a domain name"),
        ("a/b", "test", "not a domain name"),
        ("zero_shot", "test", "what an average is called"),
        ("avg", "test", "what an average is called"),
        ("", "test", "not a domain name"),
    ],
)
def test_what_is_not_there_is_named(root, domain, split, message):
    with pytest.raises(DataError, match=message):
        FolderSource(root).read(domain, split)


def test_an_accent_written_in_two_ways_is_said_to_be_so(root):
    (root / "math").rename(root / "mathe\u0301")  # as macOS writes it
    with pytest.raises(DataError, match=r"written 'mathe\\u0301' there, and 'math\\xe9' in the"):
        FolderSource(root).splits("math\u00e9")


def test_an_empty_file_is_named(root):
    (root / "math" / "train.txt").write_text("")
    with pytest.raises(DataError, match=r"train\.txt is empty.*'math'"):
        FolderSource(root).read("math", "train")
    assert len(FolderSource(root).digest("math", "train")) == 64  # nobody may ever read it


def test_unknown_data_names_the_ways_out(root):
    with pytest.raises(DataError, match=r"'no-such'.*installed_docs.*folder"):
        open_source("no-such")
    with pytest.raises(DataError, match=r"has no domain.*found notes\.md"):
        open_source(str(root / "empty_folder"))


def test_generated_source_is_stable_and_its_domains_differ():
    source = open_source("generated")
    text = {domain: "".join(source.read(domain, "train")) for domain in source.domains()}
    assert len(set(text.values())) == len(source.domains()) >= 2
    assert source.digest("weather", "test") == open_source("generated").digest("weather", "test")
    with pytest.raises(DataError, match="did you mean 'weather'"):
        source.read("wether", "test")
