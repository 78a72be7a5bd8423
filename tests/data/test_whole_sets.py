"""Parts of one split: all there, or refused with the name of what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tram_ds.data.choose import open_source
from tram_ds.data.tables import UNFINISHED, find_parquet
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
        ("train-2024-01-05", "train-2024-01-20", "train-2024-03-01"),
        ("train_2019", "train_2024"),
        ("train.2024.02", "train.2024.11"),
        ("train-00000-of-00002", "train-00001-of-00002"),
        ("train-1-of-2", "train-2-of-2"),
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
        (tuple(f"train-{n}" for n in range(2005) if n != 7), "lacks train-7:"),
        (("train-1-05", "train-1-06"), "lacks train-1-1, train-1-2, train-1-3:"),
        (("train.5",), r"lacks train\.1, train\.2, train\.3:"),
        (("train-a-0", "train-a-1", "train-b-0", "train-b-2"), "lacks train-b-1:"),
        (("train-00000-of-00003", "train-00002-of-00003"), "lacks part 1 of 3"),
        (("train-1-of-3", "train-3-of-3"), "lacks part 2 of 3"),
    ],
)
def test_a_gap_is_named(tmp_path: Path, names: tuple[str, ...], lacks: str) -> None:
    with pytest.raises(DataError, match=lacks):
        found(tmp_path, *names)


def test_other_splits_are_not_its_parts(tmp_path: Path) -> None:
    (tmp_path / "test-1.parquet").touch()
    assert found(tmp_path, "train-0", "train-1") == ["train-0", "train-1"]


@pytest.mark.parametrize("folder", ["", "domain"])
def test_a_link_to_nothing_is_a_part_that_is_missing(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "train-a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / folder / "train-b.jsonl").symlink_to("/nowhere/b")
    with pytest.raises(DataError, match=r"train-b\.jsonl is a link to /nowhere/b, which is not"):
        open_source(str(tmp_path), tmp_path / "cache")
    (tmp_path / "train-b.parquet").symlink_to("/nowhere/b")
    with pytest.raises(DataError, match=r"train-b\.parquet is a link to /nowhere/b"):
        found(tmp_path, "train-a")


@pytest.mark.parametrize("ending", UNFINISHED)
def test_a_download_that_has_not_ended_is_no_part(tmp_path: Path, ending: str) -> None:
    (tmp_path / "train-a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / f"train-b.jsonl{ending}").touch()
    with pytest.raises(DataError, match="a download that has not ended: finish it, or remove it"):
        open_source(str(tmp_path), tmp_path / "cache")
    (tmp_path / f"train-b.parquet{ending}").touch()
    with pytest.raises(DataError, match=f"train-b.parquet{ending} is a download"):
        found(tmp_path, "train-a")
