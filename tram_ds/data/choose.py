"""Which source a name stands for: `task.data` in, one `Source` out. The only module of data/ that
knows every source."""

from __future__ import annotations

import os
from pathlib import Path

from tram_ds.data import m2d2
from tram_ds.data.generated import GeneratedSource
from tram_ds.data.installed_docs import cached_folder
from tram_ds.data.sources import HUB_ID, FolderSource, Source, refuse_revision
from tram_ds.runtime.errors import DataError


def open_source(
    data: str, cache_dir: str | os.PathLike[str] | None = None, revision: str | None = None
) -> Source:
    """The source called `data`: "installed_docs", "generated", M2D2's hub id, or a folder of
    domains or archives.

    revision: of the hub's data set. DataError for anything else.
    """
    if data != HUB_ID or Path(data).is_dir():
        refuse_revision(data, revision)
    if data == "installed_docs":
        return FolderSource(cached_folder(cache_dir))
    if data == "generated":
        return GeneratedSource()
    path = Path(data).expanduser()
    if (path.is_dir() and m2d2.archives_in(path)) or (
        path.is_file() and path.name.endswith(".tar.gz")
    ):
        return m2d2.local_source(path, cache_dir)
    if path.is_dir():
        return FolderSource(data)
    if data == HUB_ID:
        return m2d2.hub_source(cache_dir, revision)
    raise DataError(
        f"task.data '{data}' is neither 'installed_docs' (text of the installed packages, needs "
        f"nothing), '{HUB_ID}' "
        "nor a folder on this machine; give a folder that holds <domain>/train.txt, valid.txt "
        "and test.txt"
    )
