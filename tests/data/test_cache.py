"""Where the cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tram_ds.data.cache import cache_root


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
