"""Files and folders written whole, private to their owner."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replaces a file atomically (readers see the old or the new text), mode 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_unwritable(path: Path, key: str) -> None:
    """ValueError unless a file can be written at `path`; its folder is made. Nothing else is left.

    key: what messages call it, such as `--out`.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # its name may be too long
        probe.touch(mode=0o600)
        probe.unlink()
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {path}: cannot be written ({error}): give another") from error


def private_dir(path: Path) -> None:
    """Makes the folder with mode 0700 if it does not exist; the mode of an existing one is the
    user's choice."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
