"""Any data set of the hub with files of rows is those files in a folder; from the hub's own cache,
without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_m2d2 import offline_hub, put_in_hub_cache  # noqa: F401 (a fixture)
from tram_ds.data.choose import open_conversations, open_source
from tram_ds.data.usable import Reading
from tram_ds.runtime.errors import DataError

REPO = "somebody/talks"


def lines(word: str, number: int = 40) -> bytes:
    return "".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(number)).encode()


def words_of(source, domain: str, split: str) -> set[str]:
    return {line.split()[0] for line in "".join(source.read(domain, split)).splitlines()}


def test_one_folder_of_splits_is_the_domain_of_the_repositorys_name(offline_hub, tmp_path):  # noqa: F811
    content = {
        "data/train-00000-of-00002.jsonl": lines("one"),
        "data/train-00001-of-00002.jsonl": lines("two"),
        "data/validation-00000-of-00001.jsonl": lines("other"),
        "README.md": b"a card",
    }
    put_in_hub_cache(offline_hub, REPO, content)
    folder = tmp_path / "talks"
    folder.mkdir()
    for name, data in content.items():
        (folder / Path(name).name).write_bytes(data)
    source, local = (open_source(data, tmp_path / "cache") for data in (REPO, str(folder)))
    assert source.domains() == local.domains() == ["talks"]
    for split in ("train", "valid", "test"):  # test is held out of train
        assert "".join(source.read("talks", split)) == "".join(local.read("talks", split))
        assert source.digest("talks", split) == local.digest("talks", split)
    assert words_of(source, "talks", "train") == {"one", "two"}
    assert words_of(source, "talks", "valid") == {"other"}


def test_folders_of_splits_are_domains_and_a_column_is_named(offline_hub, tmp_path):  # noqa: F811
    for language in ("en", "sw"):
        table = pa.table({"body": [f"{language} {i}" for i in range(60)]})
        pq.write_table(table, tmp_path / f"{language}.parquet")
    content = {
        "en/train-00000-of-00001.parquet": tmp_path / "en.parquet",
        "sw/train-00000-of-00001.parquet": tmp_path / "sw.parquet",
        "dataset_infos.json": b"{}",
    }
    put_in_hub_cache(offline_hub, REPO, content)
    reading = Reading(column="body")
    source = open_source(REPO, tmp_path / "cache", reading=reading)
    assert source.domains() == ["en", "sw"] and words_of(source, "sw", "train") == {"sw"}
    alone = open_source(REPO, tmp_path / "cache", reading=reading, files="sw/*")
    assert alone.domains() == ["talks"] and words_of(alone, "talks", "train") == {"sw"}
    with pytest.raises(DataError, match=r"has no column text; it has body"):
        open_source(REPO, tmp_path / "cache")


def test_files_of_a_repository_without_splits_are_domains(offline_hub, tmp_path):  # noqa: F811
    put_in_hub_cache(offline_hub, REPO, {"a.jsonl": lines("a"), "b.jsonl.gz": b""})
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is empty"):
        open_source(REPO, tmp_path / "cache")
    assert open_source(REPO, tmp_path / "cache", files="a.*").domains() == ["a"]


def test_two_sets_of_one_split_are_told_apart_by_task_files(offline_hub, tmp_path):  # noqa: F811
    """As ultrachat_200k has it: train_sft and train_gen, of which one is meant; shards of one are
    no two."""
    rows = [{"messages": turns("hello", f"number {i}")} for i in range(40)]
    talks = "\n".join(map(json.dumps, rows)).encode()
    names = [
        "data/train_gen-0.jsonl",
        "data/train_sft-0.jsonl",
        "data/test_sft-0.jsonl",
        "data/test_sft-1.jsonl",
    ]
    put_in_hub_cache(offline_hub, REPO, dict.fromkeys(names, talks))
    with pytest.raises(DataError, match=r"more than one train split: .*train_gen.*train_sft"):
        open_conversations(REPO, tmp_path / "cache")
    source = open_conversations(REPO, tmp_path / "cache", files="data/*_sft-*")
    assert source.domains() == ["talks"] and source.splits("talks") == ["train", "valid", "test"]
    assert source.count.sums()["test"] == 80


def turns(asked: str, said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


@pytest.mark.parametrize("opened", [open_source, open_conversations])
def test_what_is_not_there_or_cannot_be_read_is_refused(
    offline_hub,  # noqa: F811
    tmp_path,
    monkeypatch,
    opened,
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"hub data set no/such .*none called no/such here"):
        opened("no/such", tmp_path / "cache")
    put_in_hub_cache(offline_hub, REPO, {"data/train.tar": b"x", "dataset_infos.json": b"{}"})
    with pytest.raises(DataError, match=r"somebody/talks has no file that can be read \(\.txt"):
        opened(REPO, tmp_path / "cache")
    with pytest.raises(DataError, match=re.escape("data/*.csv of the hub data set somebody/talks")):
        opened(REPO, tmp_path / "cache", files="data/*.csv")
    put_in_hub_cache(offline_hub, "x/y", {"a/b/train.csv": b"text\n1\n", "c/b/train.csv": b"2\n"})
    with pytest.raises(DataError, match=r"more than one folder of a name: a/b, c/b: set task"):
        opened("x/y", tmp_path / "cache")
    Path("here").mkdir()
    with pytest.raises(DataError, match="there is no such folder"):
        opened("here/notes", tmp_path / "cache")
    with pytest.raises(DataError, match=r"task\.files a\.\* chooses among .* hub.*generated"):
        opened("generated", tmp_path / "cache", files="a.*")
    with pytest.raises(DataError, match=r"somebody/talks at revision abc"):
        opened(REPO, tmp_path / "cache", "abc")
