"""Which source a name stands for: `task.data` in, one `Source` out. The only module of data/ that
knows every source."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tram_ds.data import m2d2
from tram_ds.data.conversations import conversation
from tram_ds.data.generated import GeneratedSource
from tram_ds.data.generated_conversations import conversations_folder
from tram_ds.data.hub import hub_folder
from tram_ds.data.installed_docs import cached_folder
from tram_ds.data.layout import Files, endings, files_of_repository, find_files, kinds
from tram_ds.data.own_text import OwnText
from tram_ds.data.sources import HUB_ID, FolderSource, Source, refuse_revision
from tram_ds.data.streamed import StreamedText
from tram_ds.data.usable import Reading
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.paths import refuse_missing

PLAIN = Reading()
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a repository: its owner, and its own
NO_DATA = ("dataset_infos.json", "dataset_dict.json")  # what the hub's own tools leave beside data


def open_source(
    data: str,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    reading: Reading = PLAIN,
    files: str | None = None,
) -> Source:
    """The source called `data`: "installed_docs", "generated", M2D2's hub id, a folder of domains
    or archives, files of rows, or a data set of the hub that has such files.

    revision: of the hub's data set. reading: of rows. files: a pattern of the hub's files.
    DataError for anything else.
    """
    path = Path(data)
    if _on_hub(data):
        return OwnText(data, reading, cache_dir, files=_of_hub(data, revision, files))
    _refuse_files(data, files)
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
        f"nothing), a data set of the hub (OWNER/NAME), nor a file or folder on this machine; give "
        f"a file ({kinds()}), or a folder that holds train.* or <domain>/train.*"
    )


def open_stream(
    data: str, revision: str | None = None, reading: Reading = PLAIN, files: str | None = None
) -> StreamedText:
    """The files of rows called `data`, to be read without being kept; those of a data set of the
    hub from its cache, into which they are downloaded first. DataError for anything else."""
    if _on_hub(data):
        return StreamedText(data, reading, _of_hub(data, revision, files))
    _refuse_files(data, files)
    refuse_revision(data, revision)
    path = Path(data)
    if data in ("installed_docs", "generated", HUB_ID) or not (path.exists() and find_files(path)):
        raise DataError(
            f"task.streaming is for files of rows, and task.data '{data}' is none on this machine: "
            f"remove task.streaming, or give a file ({kinds()}), a folder of them, or a data set "
            "of the hub (OWNER/NAME) that has some"
        )
    return StreamedText(data, reading, find_files(path))


def open_conversations(
    data: str,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    reading: Reading = PLAIN,
    files: str | None = None,
) -> OwnText:
    """The conversations of `data`: "generated", a file or folder of rows, or a data set of the hub
    that has such files. DataError for anything else."""
    if _on_hub(data):
        of_hub = _of_hub(data, revision, files)
        return OwnText(data, reading, cache_dir, conversation, of_hub)
    _refuse_files(data, files)
    refuse_revision(data, revision)
    path = conversations_folder(cache_dir) if data == "generated" else Path(data)
    if not (path.exists() and find_files(path)):
        raise DataError(
            f"task.data '{data}' is neither 'generated', a data set of the hub (OWNER/NAME) nor a "
            "file or folder of conversations on this machine: give a file with a column messages, "
            f"or prompt and completion ({kinds()})"
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
        source = FolderSource(data)
        _refuse_unread(path, source)
        return source
    return m2d2.hub_source(cache_dir, revision) if data == HUB_ID else None


def _on_hub(data: str) -> bool:
    """Whether `data` names a repository of rows; what is written as a folder is one."""
    if data == HUB_ID or Path(data).exists() or not HUB_NAME.fullmatch(data):
        return False
    refuse_missing(data, "task.data")
    return True


def _of_hub(data: str, revision: str | None, files: str | None) -> Files:
    """The data set's files by domain and split, downloaded at first."""
    patterns = [files] if files else endings()
    instead = (
        f"give task.data a file or folder, such as a clone of it: there is none called {data} here"
    )
    called = "" if files else f"files of rows ({kinds()})"
    root, paths = hub_folder(data, patterns, revision, instead, called)
    found = files_of_repository(
        data.partition("/")[2], root, [path for path in paths if path.name not in NO_DATA]
    )
    if not found:
        raise DataError(
            f"the hub data set {data} has no file that can be read ({kinds()})"
            + (f" among {files}: change task.files" if files else "")
        )
    return found


def _refuse_unread(path: Path, source: FolderSource) -> None:
    """DataError where a folder of text files has splits in files of rows too, which would be left
    out, and for two files of one split."""
    there = source.domains()
    for domain, splits in find_files(path).items():
        own = source.splits(domain) if domain in there else []
        if other := [file.name for split in splits if split not in own for file in splits[split]]:
            raise DataError(
                f"{path}/{domain} has {', '.join(other)}, but other splits or domains of {path} "
                "are .txt files, beside which nothing else is read: give all of them as files of "
                "rows, or as <domain>/{train,valid,test}.txt"
            )


def _refuse_files(data: str, files: str | None) -> None:
    if files is not None:
        raise DataError(
            f"task.files {files} chooses among the files of a data set of the hub, and task.data "
            f"{data} is none: remove it, and give task.data the file or folder itself"
        )


def _refuse_reading(data: str, reading: Reading) -> None:
    for key, value in vars(reading).items():
        if value != vars(PLAIN)[key]:
            raise DataError(
                f"task.{key} {value} is for files of rows, and task.data {data} has its text by "
                "domain and split: remove it"
            )
