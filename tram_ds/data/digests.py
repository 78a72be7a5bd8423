"""What was found out about a large file, remembered until the file changes: gigabytes are not
hashed at every start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tram_ds.data.cache import cache_root, digest_of
from tram_ds.runtime.files import write_whole
from tram_ds.runtime.locks import locked


def remembered(
    path: Path,
    question: str,
    compute: Callable[[], Any],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """compute() about the file at `path`, as JSON on disk, valid while its size and modification
    time stay the same.

    question: what is computed, with its version. Of several processes that ask at once one
    computes it, and the others wait.
    """
    # a file that goes by a link too is asked about once
    real = path.resolve()
    stat = real.stat()
    folder = cache_root(cache_dir) / "files"
    answer = folder / f"{digest_of(question, str(real), stat.st_size, stat.st_mtime_ns)}.json"

    def read() -> Any:
        with suppress(OSError, ValueError):
            return json.loads(answer.read_text(encoding="utf-8"))
        return None  # which no question is answered by

    if (found := read()) is not None:
        return found
    with _alone(folder, answer):
        # again: another process may have answered while this one waited
        if (found := read()) is None:
            found = compute()
            # a cache that is full or read-only costs the next start the time, and this one nothing
            with suppress(OSError):
                write_whole(answer, json.dumps(found))
    return found


@contextmanager
def _alone(folder: Path, answer: Path) -> Iterator[None]:
    """With the question's lock, where one can be made."""
    with ExitStack() as held:
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            held.enter_context(locked(folder / f".{answer.stem}.lock"))
        yield


def file_digest(path: Path, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """sha256 (hex) of a file."""

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered(path, "sha256 1", compute, cache_dir)
