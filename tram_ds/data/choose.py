"""Which source a name stands for: `task.data` in, one `Source` out. The only module of data/ that
knows every source."""

from __future__ import annotations

import os
from pathlib import Path

from tram_ds.data import m2d2
from tram_ds.data.conversations import conversation
from tram_ds.data.generated import GeneratedSource
from tram_ds.data.generated_conversations import conversations_folder
from tram_ds.data.installed_docs import cached_folder
from tram_ds.data.layout import find_files, kinds
from tram_ds.data.own_text import OwnText, Reading
from tram_ds.data.sources import HUB_ID, FolderSource, Source, refuse_revision
from tram_ds.runtime.errors import DataError

PLAIN = Reading()


def open_source(
    data: str,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    reading: Reading = PLAIN,
) -> Source:
    """The source called `data`: "installed_docs", "generated", M2D2's hub id, a folder of domains
    or archives, or files of rows.

    revision: of the hub's data set. reading: of rows. DataError for anything else.
    """
    path = Path(data)
    if data != HUB_ID or path.is_dir():
        refuse_revision(data, revision)
    if (source := _with_splits(data, path, cache_dir, revision)) is not None:
        _refuse_reading(data, reading)
        return source
    if path.exists() and find_files(path):
        return OwnText(data, reading, cache_dir)
    if path.is_file():
        raise DataError(f"task.data {data}: no kind of file that can be read: {kinds()}")
    if path.is_dir():
        return FolderSource(data)  # says what it expected and what is there
    raise DataError(
        f"task.data '{data}' is neither 'installed_docs' (text of the installed packages, needs "
        f"nothing), '{HUB_ID}' nor a file or folder on this machine; give a file ({kinds()}), or "
        "a folder that holds train.* or <domain>/train.*"
    )


def open_conversations(
    data: str,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    reading: Reading = PLAIN,
) -> OwnText:
    """The conversations of `data`: "generated", or a file or folder of rows. DataError for anything
    else."""
    refuse_revision(data, revision)
    path = conversations_folder(cache_dir) if data == "generated" else Path(data)
    if not (path.exists() and find_files(path)):
        raise DataError(
            f"task.data '{data}' is neither 'generated' nor a file or folder of conversations on "
            f"this machine: give a file with a column messages, or prompt and completion "
            f"({kinds()})"
        )
    return OwnText(str(path), reading, cache_dir, conversation)


def _with_splits(
    data: str, path: Path, cache_dir: str | os.PathLike[str] | None, revision: str | None
) -> Source | None:
    """A source whose domains and splits are given, or None."""
    if data == "installed_docs":
        return FolderSource(cached_folder(cache_dir))
    if data == "generated":
        return GeneratedSource()
    if (path.is_dir() and m2d2.archives_in(path)) or (
        path.is_file() and path.name.endswith(".tar.gz")
    ):
        return m2d2.local_source(path, cache_dir)
    if path.is_dir() and FolderSource.fits(path):
        return FolderSource(data)
    return m2d2.hub_source(cache_dir, revision) if data == HUB_ID else None


def _refuse_reading(data: str, reading: Reading) -> None:
    for key, value in vars(reading).items():
        if value != vars(PLAIN)[key]:
            raise DataError(
                f"task.{key} {value} is for files of rows, and task.data {data} has its text by "
                "domain and split: remove it"
            )
