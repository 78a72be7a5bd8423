"""Parts of one split: all there, or refused with the name of what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tram_ds.data.tables import find_parquet
from tram_ds.runtime.errors import DataError


def found(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / f"{name}.parquet").touch()
    return [path.stem for path in find_parquet(folder, "train")]


@pytest.mark.parametrize(
    "names",
    [
        ("train",),
        ("train-0", "train-1", "train-2"),
        ("train_1", "train_2"),
        ("train-part00", "train-part01"),
        ("train.9", "train.10", "train.8", *(f"train.{n}" for n in range(8))),
        ("train-news", "train-books"),
        ("train-v3",),
        ("train-20200131", "train-20200302"),
        ("train-00000-of-00002", "train-00001-of-00002"),
    ],
)
def test_whole_sets_are_taken(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert sorted(found(tmp_path, *names)) == sorted(names)


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (("train-0", "train-2"), "lacks train-1:"),
        (("train_part1", "train_part3"), "lacks train_part2:"),
        (("train-00002", "train-00003"), "lacks train-1:"),
        (("train.5",), r"lacks train\.1, train\.2, train\.3:"),
        (("train-a-0", "train-a-1", "train-b-0", "train-b-2"), "lacks train-b-1:"),
        (("train-00000-of-00003", "train-00002-of-00003"), "lacks part 1 of 3"),
    ],
)
def test_a_gap_is_named(tmp_path: Path, names: tuple[str, ...], lacks: str) -> None:
    with pytest.raises(DataError, match=lacks):
        found(tmp_path, *names)


def test_other_splits_are_not_its_parts(tmp_path: Path) -> None:
    (tmp_path / "test-1.parquet").touch()
    assert found(tmp_path, "train-0", "train-1") == ["train-0", "train-1"]
