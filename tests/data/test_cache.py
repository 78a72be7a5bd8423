"""Where the cache is, and what it says where it cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tram_ds.data import digests
from tram_ds.data.cache import build_once, cache_root
from tram_ds.runtime.errors import DataError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TRAM_DS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("xdg", [None, "", "relative/is/ignored"])
def test_it_is_in_the_home_folder(
    home: Path, xdg: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_root() == home / ".cache" / "tram_ds"
    assert cache_root().stat().st_mode & 0o777 == 0o700


def test_it_is_where_caches_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_root() == tmp_path / "caches" / "tram_ds"
    monkeypatch.setenv("TRAM_DS_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    assert cache_root("~/given") == Path.home() / "given"


def full(folder: Path) -> None:
    (folder / "first").write_text("whole")
    os.symlink("/dev/full", folder / "second")
    (folder / "second").write_text("no room for it")


def read_only(folder: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder / "first"))


def not_ours(folder: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "first"))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (full, "No space left on device"),
        (read_only, "Read-only file system"),
        (not_ours, "Permission denied"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, build: Callable[[Path], None], why: str
) -> None:
    said = rf"cannot write to the cache folder {tmp_path} \({why}\): free some space there, or set "
    with pytest.raises(DataError, match=said):
        build_once(tmp_path / "entry", build, lambda path: (path / "first").exists())
    assert [path.name for path in tmp_path.iterdir()] == [".entry.lock"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOENT])
def test_what_cannot_be_read_meanwhile_keeps_its_name(tmp_path: Path, code: int) -> None:
    def build(folder: Path) -> None:
        raise OSError(code, os.strerror(code), "/data/home/train.txt")

    with pytest.raises(OSError, match=r"/data/home/train\.txt"):
        build_once(tmp_path / "entry", build, Path.exists)


def test_what_cannot_be_remembered_is_found_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(digests, "write_whole", no_room)
    (tmp_path / "file").write_text("text")
    asked: list[int] = []
    for _ in range(2):
        digests.remembered(tmp_path / "file", "how long", lambda: asked.append(4), tmp_path)
    assert asked == [4, 4]
