"""A split that is not there is named, with those that are."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tram_ds.data.domains import chosen
from tram_ds.data.images import ImageSource
from tram_ds.data.sources import FolderSource
from tram_ds.runtime.errors import DataError


@pytest.mark.parametrize("split", ["train", "valid"])
def test_of_a_text_domain(tmp_path: Path, split: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "test.txt").write_text("text")
    told = f"domain 'a' in {tmp_path} has no {split} split ({split}.txt"
    with pytest.raises(DataError, match=re.escape(told) + r".*it has test\.txt"):
        FolderSource(tmp_path).read("a", split)


def test_of_a_folder_of_pictures(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "test.parquet")
    told = re.escape(f"task.data {tmp_path} has no train split; it has test (expected ")
    with pytest.raises(DataError, match=told):
        ImageSource(str(tmp_path), tmp_path / "cache", None)


@pytest.mark.parametrize(
    ("exclude", "told"),
    [([], r": a \(test\), b \(valid and test\)$"), (["a", "b"], ": all are exc")],
)
def test_of_every_domain(exclude: list[str], told: str) -> None:
    task = SimpleNamespace(train=None, exclude=exclude, eval=None, data="x")
    splits = {"a": ["test"], "b": ["valid", "test"]}
    with pytest.raises(DataError, match="no domain of task.data x outside .*train split" + told):
        chosen(task, ["a", "b"], splits.__getitem__)
