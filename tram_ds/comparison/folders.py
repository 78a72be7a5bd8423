"""Which folders a user means by a name or a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path


def run_folders(patterns: Sequence[str]) -> list[Path]:
    """Those named, sorted. What is there by exactly this name comes before what the name matches
    as a pattern: `[1]` in a folder's name is no choice of characters. Of two names of one folder
    its own, else the first."""
    names = [os.path.expanduser(pattern) for pattern in patterns]
    found = {
        Path(path)
        for name in names
        for path in ([name] if os.path.lexists(name) else glob.glob(name))
    }
    links_last = sorted(found, key=lambda path: (path.is_symlink(), path))
    by_place: dict[Path, Path] = {}
    for path in links_last:
        by_place.setdefault(path.resolve(), path)
    return sorted(by_place.values())
