"""Paths as people write them in recipes and after `=`, where no shell reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from tram_ds.runtime.checked import refusal
from tram_ds.runtime.errors import DataError

# $SCRATCH, ${user}; not `$(...)`, nor a `$` within a name such as `cost$a`
VARIABLE = re.compile(r"\$(\{\w+\}|[A-Z_][A-Z0-9_]+)")
# of a database or a folder; a `~` in a server's address is the server's
FILE_URI = re.compile(r"(sqlite:///|file:(?://)?|)(.*)", re.DOTALL)


def expanded(text: str, key: str = "") -> str:
    """`~` and `~somebody` in front as the home they stand for. ValueError for a variable, which
    depends on where and when it is read; a path that is there by exactly this name is that path.

    key: what messages call it; "" in a recipe, whose messages have it already.
    """
    if (found := VARIABLE.search(text)) and not os.path.lexists(text):
        said = (
            f"{found[0]} is not expanded here: write the path out, or give it on the command line "
            "in double quotes, where the shell expands it"
        )
        raise ValueError(f"{key} {text}: {said}") if key else refusal(("", said))
    return os.path.expanduser(text)


def expanded_uri(uri: str, key: str = "") -> str:
    """The same for the address of an MLflow store, where it is a file's."""
    scheme, path = FILE_URI.fullmatch(uri).groups()  # type: ignore[union-attr] # all match
    return scheme + expanded(path, key)


def refuse_missing(path: str | None, key: str) -> None:
    """DataError where `path` is written as a folder and there is none: the hub is not asked then.

    A folder: absolute, or with `.` or `~` in front, or three parts, or in a folder that is there or
    where runs are.
    """
    if path is None or os.path.exists(os.path.expanduser(path)):
        return
    parts = Path(path).parts
    inside = len(parts) > 1 and (Path(*parts[:-1]).is_dir() or parts[0] == "runs")
    if path.startswith((".", "~", "/")) or len(parts) > 2 or inside:
        raise DataError(f"{key} {path}: there is no such folder")


Place = Annotated[str, AfterValidator(expanded)]  # a key that is a path, or may be one
