"""Texts that say whether they are still as they were written here: one that a person has changed
is theirs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

MARK = "<!-- written by tram_ds, and yours once you change it: sha256 {} -->\n"
_END = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})") + r"\Z")


def signed(text: str) -> str:
    """The text with a last line that holds its digest; Markdown does not show it."""
    # in one form: what is read back has to give the digest that was written
    text = text.rstrip("\n") + "\n\n"
    return text + MARK.format(_digest(text))


def is_signed(path: Path) -> bool:
    """Whether the file is a text of `signed`, and unchanged. False where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    end = _END.search(text)
    return end is not None and end[1] == _digest(text[: end.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
